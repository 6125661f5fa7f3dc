"""sparse-train: run a recipe, look at runs and models, generate.

Exit codes: 0 done; 1 a stage failed (its log is named); 2 user error, in one line; 130 stopped by Ctrl-C or
another signal.
"""

import argparse
import io
import logging
import os
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from sparse_train import log
from sparse_train.errors import StageFailed, UserError, is_of_a_path, printable, told_of
from sparse_train.launch.monitor.cancel import add_cancel
from sparse_train.launch.monitor.logs import add_logs
from sparse_train.launch.monitor.status import add_status
from sparse_train.launch.submit.bench import add_commands as add_bench_commands
from sparse_train.launch.submit.command import add_run


def main(arguments: list[str] | None = None) -> int:
    try:
        try:
            return _answer(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # such as | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def _answer(arguments: list[str] | None) -> int:
    """Every mistake of the user's and every path that cannot be used becomes one line here."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of ASCII, a path that is not UTF-8
    options = _parse(arguments)
    log.set_up_command_line(options.log_level)
    # Outside a terminal, 160 columns, so that tables are not wrapped.
    console = Console(width=None if sys.stdout and sys.stdout.isatty() else 160)
    complaints = Console(stderr=True, soft_wrap=True)
    try:
        return options.command(options, console) or 0
    except StageFailed as error:
        told, code = str(error), 1
    except UserError as error:
        told, code = str(error), 2
    except OSError as error:
        if not is_of_a_path(error):
            raise
        told, code = told_of(error), 2
    except KeyboardInterrupt:
        return 130
    complaints.print(f"sparse-train: {told}", style="red", markup=False, highlight=False)
    return code


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse takes key=value only right after CONFIG; users write them after options too.
    options, rest = parser.parse_known_args(arguments)
    if hasattr(options, "overrides"):
        options.overrides = [*options.overrides, *(text for text in rest if not text.startswith("-"))]
        rest = [text for text in rest if text.startswith("-")]
        for text in rest:
            if re.match(r"--?[a-z_]+(\.\w+)*=", text):
                parser.error(f"{text}: keys of the config have no dashes; write {text.lstrip('-')}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A mistake is one line, not the usage."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(prog="sparse-train", description="Train LLMs to be sparse, and run them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    parser.add_argument("--version", action="version", version=f"sparse-train {version('sparse-train')}")
    add_run(commands)
    add_status(commands)
    add_logs(commands)
    add_cancel(commands)

    inspect = commands.add_parser("inspect", help="tensors, shapes, sparsity and bytes of a checkpoint folder")
    inspect.add_argument("folder", type=Path, metavar="FOLDER")
    inspect.set_defaults(command=_inspect)

    bench = commands.add_parser("bench", help="measure kernels and training steps on this machine")
    add_bench_commands(bench)

    generate = commands.add_parser("generate", help="generate text with a dense or sparse model folder")
    generate.add_argument("folder", metavar="FOLDER", help="or a name on the hub")  # a Path would drop the "./"
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, metavar="N",
                          help="128 unless given, or as many as the model has positions for")
    generate.set_defaults(command=_generate)

    parser.set_defaults(log_level=logging.WARNING)
    for each in (parser, *commands.choices.values()):
        log.add_options(each)
    return parser


def _inspect(options: argparse.Namespace, console: Console) -> None:
    from sparse_train.launch.monitor.inspect import print_folder

    print_folder(options.folder, console)


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


if __name__ == "__main__":
    sys.exit(main())
