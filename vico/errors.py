"""The errors that the command line prints as one line, without a traceback; and any message as one line."""

from collections.abc import Iterator
from contextlib import contextmanager

_LINE_CHARS = 300
_LAST_LINE_CHARS = 500


class UserError(Exception):
    """A fault that the user can fix (exit code 2). The message is one line: field or path, value, remedy."""


def missing_package(needed_by: str, package: str) -> UserError:
    """Return the error to raise where a package is not installed.

    Its command has the constraints: an unpinned install may bring versions that were not tested.
    """
    command = f"pip install --constraint constraints.txt {package}"
    return UserError(f"{needed_by} needs the package {package}; install it: {command}")


class Faults:
    """Collects the UserErrors of checks that do not need each other, so that a user sees all of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        """Add the lines of a message that are not there yet."""
        self.lines += [line for line in message.splitlines() if line not in self.lines]

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Note a UserError of the body instead of raising it."""
        try:
            yield
        except UserError as error:
            self.note(str(error))

    def raise_all(self) -> None:
        """Raise a UserError with one line per fault, if there are any."""
        if self.lines:
            raise UserError("\n".join(self.lines))


class Unreachable(Exception):
    """A server gave no complete answer within the retry time (exit code 1); try the same command later."""


def one_line(error: BaseException | str, *, max_chars: int | None = _LINE_CHARS) -> str:
    """Return the message of `error` (or a text) as one line, cut to `max_chars` characters (None: not cut).

    An error without a message gives the name of its type. Mask passwords before: a URL that is cut within its
    password is no longer recognised as one.
    """
    line = " ".join(str(error).split())
    if not line and isinstance(error, BaseException):
        line = type(error).__name__
    return line if max_chars is None or len(line) <= max_chars else f"{line[: max_chars - 3]}..."


def last_line(text: str) -> str:
    """Return the last line that is not blank, cut to 500 characters; "" if there is none.

    The output of a program, and a message with the traceback of a worker, end with the error itself.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_LAST_LINE_CHARS] if lines else ""
