"""sparse-train import: a sparse folder of a checkpoint that other software made sparse."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sparse_train.errors import UserError
from sparse_train.registry import IMPORTERS
from sparse_train.stopping import handle_signals

if TYPE_CHECKING:  # torch takes seconds to import
    from sparse_train.importers import Imported

_MIN_SPARSITY = 0.25  # 3:4 has as many zeros; rounding to four bits leaves fewer, a tenth in Q4_0
_NUM_NAMES = 3


def add_import(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser("import", help="make a sparse folder of a model that other software made sparse")
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint folder, a GGUF file or a name on the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; there must be nothing of this name")
    parser.add_argument("--min-sparsity", type=float, metavar="S", default=_MIN_SPARSITY,
                        help=f"linears become sparse that have at least this share of zeros; default: {_MIN_SPARSITY}")
    parser.add_argument("--from", metavar="KIND", dest="kind",
                        help=f"only where SOURCE is of several kinds: {', '.join(IMPORTERS.built_in)}, or that of "
                             "another package")
    parser.set_defaults(command=_import)


def _import(options: argparse.Namespace, console: Console) -> None:
    try:
        kind = options.kind and IMPORTERS.check(options.kind)
    except ValueError as error:
        raise UserError(f"--from: {error}") from error
    if not 0 < options.min_sparsity <= 1:
        raise UserError(f"--min-sparsity {options.min_sparsity}: it must be above 0 and at most 1")

    from sparse_train.importers import import_model

    handle_signals()
    for line in _describe(import_model(options.source, options.out, options.min_sparsity, kind), options):
        console.out(line, highlight=False)


def _describe(imported: "Imported", options: argparse.Namespace) -> list[str]:
    num_linears = len(imported.sparse) + len(imported.dense)
    size = sum(file.stat().st_size for file in options.out.glob("*.safetensors"))
    lines = [f"{options.out}: {len(imported.sparse)} of {num_linears} linears are sparse: sparsity "
             f"{imported.sparsity:.3f}, {imported.pattern or 'unstructured'}; {size / 1e6:.1f} MB"]
    if imported.dense:
        names = sorted(imported.dense, key=lambda name: -imported.dense[name].sparsity)
        more = f" and {len(names) - _NUM_NAMES} others" if len(names) > _NUM_NAMES else ""
        words = "linear has" if len(names) == 1 else "linears have"
        lines.append(f"{len(names)} {words} fewer zeros than --min-sparsity {options.min_sparsity:g} and "
                     f"{'stays' if len(names) == 1 else 'stay'} dense: {', '.join(names[:_NUM_NAMES])}{more}")
    if not imported.has_bits:
        lines.append("in sparse linears every weight that was exactly 0.0 counts as pruned, whether it had been pruned "
                     "or not")
    return lines
