"""The command line: its parser, its exit codes, and errors in one line.

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
from typing import NoReturn

from rich.console import Console

from sparse_train import log
from sparse_train.errors import REMEDIES, StageFailed, UserError, describe_error
from sparse_train.launch.model.export import add_export
from sparse_train.launch.model.generate import add_generate
from sparse_train.launch.model.import_model import add_import
from sparse_train.launch.model.push import add_push
from sparse_train.launch.monitor.cancel import add_cancel
from sparse_train.launch.monitor.inspect import add_inspect
from sparse_train.launch.monitor.logs import add_logs
from sparse_train.launch.monitor.status import add_status
from sparse_train.launch.submit.bench import add_bench
from sparse_train.launch.submit.command import add_run


def main(arguments: list[str] | None = None) -> int:
    try:
        return _run_command(arguments)
    except BrokenPipeError:  # such as | head
        return 1
    finally:
        try:
            _flush()
        except OSError:  # was told; Python would try once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _run_command(arguments: list[str] | None) -> int:
    """Run the command and return its exit code. A UserError, and an error of a path, is printed in one line."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal of ASCII, or a path that is not UTF-8
    options = _parse(arguments)
    log.set_up_command_line(options.log_level)
    # Outside a terminal, 160 columns, so that tables are not wrapped.
    console = Console(width=None if sys.stdout and sys.stdout.isatty() else 160)
    errors = Console(stderr=True, soft_wrap=True)
    try:
        code = options.command(options, console) or 0
        _flush()
        return code
    except StageFailed as error:
        message, code = str(error), 1
    except UserError as error:
        message, code = str(error), 2
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        message, code = describe_error(error), 2
    except KeyboardInterrupt:
        return 130
    errors.print(f"sparse-train: {message}", style="red", markup=False, highlight=False)
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
        """Print the mistake in one line, without the usage."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(prog="sparse-train", description="Train LLMs to be sparse, and run them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parser.add_argument("--version", action="version", version=f"sparse-train {version('sparse-train')}")
    for add_command in (add_run, add_status, add_logs, add_cancel, add_inspect, add_bench, add_generate, add_export,
                        add_import, add_push):
        add_command(commands)
    parser.set_defaults(log_level=logging.WARNING)
    for each in (parser, *commands.choices.values()):
        log.add_options(each)
    return parser


if __name__ == "__main__":
    sys.exit(main())
