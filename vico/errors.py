"""The errors that the command line prints as one line: what a user can mend (exit 2), and a server that does
not answer (exit 1)."""


class UserError(Exception):
    """What a user can mend. The message is one line: the field or path, the value, the remedy."""


class Unreachable(Exception):
    """A server gave no whole answer in all the time it was asked; the same command may work later."""
