"""sparse-train export: a model folder in a format of other software."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_train.errors import UserError
from sparse_train.registry import EXPORTERS
from sparse_train.stopping import handle_signals


def add_export(commands: "argparse._SubParsersAction[Any]") -> None:
    export = commands.add_parser("export", help="write a dense or sparse model folder in a format of other software")
    export.add_argument("folder", metavar="FOLDER", help="a model folder, a GGUF file or a name on the hub")
    export.add_argument("--to", metavar="FORMAT", required=True,
                        help=f"{', '.join(EXPORTERS.built_in)}, or that of another package")
    export.add_argument("out", metavar="OUT", type=Path, help="what is written; there must be nothing of this name")
    export.add_argument("--type", metavar="TYPE",
                        help="how weights are stored; needed where FORMAT has to round them; default: as in FOLDER, as "
                        "closely as FORMAT can. " + "; ".join(
                            f"{name}: {', '.join(entry.types)}" for name, entry in EXPORTERS.built_in.items()))
    export.set_defaults(command=_export)


def _export(options: argparse.Namespace, console: Console) -> None:
    try:
        types = EXPORTERS.entries[EXPORTERS.check(options.to)].types
    except ValueError as error:
        raise UserError(f"--to: {error}") from error
    if options.type is not None and options.type not in types:
        raise UserError(f"--type {options.type}: {options.to} stores no such type; choose from: {', '.join(types)}")

    from sparse_train.exporters import export  # torch takes seconds to import

    handle_signals()
    export(options.folder, options.to, options.out, options.type)
    files = [file for file in (options.out, *options.out.rglob("*")) if file.is_file()]
    console.out(f"{options.out}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB", highlight=False)
