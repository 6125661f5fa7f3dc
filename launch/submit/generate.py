"""sparse-train generate: complete a prompt with a dense or sparse model folder."""

import argparse
from typing import Any

from rich.console import Console

from sparse_train.errors import UserError, printable


def add_generate(commands: "argparse._SubParsersAction[Any]") -> None:
    generate = commands.add_parser("generate", help="generate text with a dense or sparse model folder")
    generate.add_argument("folder", metavar="FOLDER", help="or a name on the hub")  # a Path would drop the "./"
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, metavar="N",
                          help="default: 128, or as many as the model has positions for")
    generate.set_defaults(command=_generate)


def _generate(options: argparse.Namespace, console: Console) -> None:
    from sparse_train import kernels
    from sparse_train.cpus import set_threads
    from sparse_train.inference import load

    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: it must be at least 1")
    set_threads()
    model = load(options.folder)
    if model.is_sparse and kernels.backend() == "portable":
        Console(stderr=True, soft_wrap=True).print(kernels.PORTABLE_NOTE, style="yellow", highlight=False)
    answer = model.complete(options.prompt, options.max_new_tokens)
    console.print(printable(answer, keep="\n\t"), markup=False, highlight=False, soft_wrap=True)
