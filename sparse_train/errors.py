"""Errors that the command line prints as one line. Any other that escapes is a bug and keeps its traceback."""

import errno


class UserError(ValueError):
    """The user can correct it: a mistake in a config, a path or an argument. Its message names the value, the rule and
    the remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())


class StageFailed(Exception):
    """A stage ended without its artifact. The message is one line and names the log."""


_MAKE_ROOM = "make room there, or give folder=ELSEWHERE; the same command goes on from what is saved"
REMEDIES = {
    errno.EACCES: "ask its owner for access, or give another path",
    errno.EPERM: "ask its owner for access, or give another path",
    errno.EROFS: "give a path that can be written to",
    errno.ENOTDIR: "a part of this path is a file; give another one",
    errno.EISDIR: "this is a folder; give a file",
    errno.EEXIST: "there is a file of this name; give another path",
    errno.ENOENT: "check the path",
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.ELOOP: "a link here leads back to itself; give another path",
    errno.ENAMETOOLONG: "give a shorter name",
}
"""For errors of the operating system that the user can correct: a path that cannot be used, a full disk."""


def describe_error(error: UserError | OSError) -> str:
    """`error` in one line, with the remedy where there is one."""
    if isinstance(error, UserError):
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
    return printable(f"{where}{error.strerror or error}{remedy}")


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters and lone surrogates escaped: text from a file must not control the terminal.
    `keep`: characters to leave as they are."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of its message, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
