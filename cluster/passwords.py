"""Find and remove passwords in URLs that are stored or shown.

All other secrets are read from the environment or from files by the libraries that need them; no setting of
this project takes one.
"""

import logging
import re
from typing import Any

_USER_INFO = re.compile(
    r"""(?<=://)(?:
        [^/@\s'"]+@
        |                                # or with a slash in the password, as databases accept it:
        [^/:@\s'"\[]*:                   # the user; [ begins an IPv6 address
        (?!\d{1,5}/)                     # in host:5000/me@x the part before the @ is port and path
        (?:(?!://)[^@\s'"])+@(?=[\w\[])
    )""",
    re.VERBOSE,
)


def without_passwords(text: str) -> str:
    """Return the text with user and password removed from every URL.

    `http://me:secret@host` becomes `http://host`.
    """
    return _USER_INFO.sub("", text)


def has_password(text: str) -> bool:
    return any(":" in user_info for user_info in _USER_INFO.findall(text))


def password_fields(value: Any, name: str = "") -> list[str]:
    """Return the dotted names of all fields of a nested value whose text is a URL with a password.

    `value` is what JSON can hold; `name` is its own dotted name.
    """
    if isinstance(value, dict):
        children = [(f"{name}.{key}" if name else str(key), child) for key, child in value.items()]
    elif isinstance(value, list | tuple):
        children = [(f"{name}.{number}", child) for number, child in enumerate(value)]
    else:
        return [name] if isinstance(value, str) and has_password(value) else []
    return [field for child_name, child in children for field in password_fields(child, child_name)]


class MaskingFormatter(logging.Formatter):
    """Format log records, tracebacks included, without the passwords that errors of libraries quote."""

    def format(self, record: logging.LogRecord) -> str:
        return without_passwords(super().format(record))
