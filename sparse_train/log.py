"""Logging of this package, set up once per process, to stderr. Other packages' loggers are left as they are.

The command line shows warnings, each as a yellow line; -v adds what is being done, -q leaves only errors. Ranks log
everything from INFO up, with the time and the rank:

    2026-11-25 22:50:01 rank 3 129/1000 loss 0.394
"""

import argparse
import logging

from rich.console import Console

_LOGGER = logging.getLogger("sparse_train")


class _StderrHandler(logging.Handler):
    """Looks up sys.stderr for each record, which may have been replaced since."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            Console(stderr=True, soft_wrap=True).print(
                self.format(record), style="yellow" if record.levelno >= logging.WARNING else "dim", markup=False,
                highlight=False, emoji=False)
        except Exception:  # such as a full disk; as the handlers of `logging` do
            self.handleError(record)


def add_options(parser: argparse.ArgumentParser) -> None:
    """-v and -q, as `log_level`; nothing is set where neither is given."""
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("-v", "--verbose", dest="log_level", action="store_const", const=logging.INFO,
                        default=argparse.SUPPRESS, help="say more")
    levels.add_argument("-q", "--quiet", dest="log_level", action="store_const", const=logging.ERROR,
                        default=argparse.SUPPRESS, help="no warnings")


def set_up_command_line(level: int = logging.WARNING) -> None:
    _set_up(level, logging.Formatter("%(message)s"))


def set_up_rank(rank: int) -> None:
    _set_up(logging.INFO, logging.Formatter(f"%(asctime)s rank {rank} %(message)s", "%Y-%m-%d %H:%M:%S"))


def _set_up(level: int, formatter: logging.Formatter) -> None:
    for handler in [handler for handler in _LOGGER.handlers if isinstance(handler, _StderrHandler)]:
        _LOGGER.removeHandler(handler)
    handler = _StderrHandler()
    handler.setFormatter(formatter)
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(level)
