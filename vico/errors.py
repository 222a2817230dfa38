"""The error that a user can mend; the command line prints it as one line and exits with 2."""


class UserError(Exception):
    """What a user can mend. The message is one line: the field or path, the value, the remedy."""
