"""What the command line tells in one line. Anything else that escapes is our bug and keeps its traceback."""

import errno


class UserError(ValueError):
    """The user can mend it: a mistake in a config, a path or an argument. Its text names the value, the rule and the
    remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())


class StageFailed(Exception):
    """A stage ended without its artifact. The text is one line and names the log."""


_OF_PATHS = {
    errno.EACCES: "ask its owner for access, or give another path",
    errno.EPERM: "ask its owner for access, or give another path",
    errno.EROFS: "give a path that can be written to",
    errno.ENOTDIR: "a part of this path is a file; give another one",
    errno.EISDIR: "this is a folder; give a file",
    errno.EEXIST: "there is a file of this name; give another path",
    errno.ENOENT: "check the path",
    errno.ENOSPC: "free some space; the same command goes on",
    errno.EDQUOT: "free some space; the same command goes on",
    errno.ELOOP: "a link here leads back to itself; give another path",
    errno.ENAMETOOLONG: "give a shorter name",
}


def is_of_a_path(error: OSError) -> bool:
    """The user can mend it: a path that cannot be used, or a full disk."""
    return error.errno in _OF_PATHS


def told_of(error: UserError | OSError) -> str:
    """`error` in one line, with the remedy where there is one."""
    if isinstance(error, UserError):
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    remedy = f"; {_OF_PATHS[error.errno]}" if error.errno in _OF_PATHS else ""
    return printable(f"{where}{error.strerror or error}{remedy}")


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters, and halves of characters, escaped: what comes from a file must not steer a
    terminal. `keep`: those that are meant."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """Of its message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
