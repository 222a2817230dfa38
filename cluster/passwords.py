"""Passwords within URLs: cut out of what is kept or shown. Other secrets are read from the environment, or
from the files of the libraries that need them, by those libraries; no setting of ours takes one.
"""

import logging
import re
from typing import Any

_USER_INFO = re.compile(
    r"""(?<=://)(?:
        [^/@\s'"]+@
        |                                # or with a slash in the password, as databases take it:
        [^/:@\s'"\[]*:                   # the user; [ begins an IPv6 address
        (?!\d{1,5}/)                     # of host:5000/me@x the part before the @ is port and path
        (?:(?!://)[^@\s'"])+@(?=[\w\[])
    )""",
    re.VERBOSE,
)


def without_passwords(text: str) -> str:
    """The text with user and password cut out of every URL: `http://me:secret@host` gives `http://host`."""
    return _USER_INFO.sub("", text)


def has_password(text: str) -> bool:
    return any(":" in found for found in _USER_INFO.findall(text))


def places_of_passwords(value: Any, name: str = "") -> list[str]:
    """Dotted names of the texts below a value that are URLs with a password."""
    if isinstance(value, dict):
        inner = [(f"{name}.{key}" if name else str(key), one) for key, one in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(f"{name}.{number}", one) for number, one in enumerate(value)]
    else:
        return [name] if isinstance(value, str) and has_password(value) else []
    return [place for key, one in inner for place in places_of_passwords(one, key)]


class MaskingFormatter(logging.Formatter):
    """Lines of a log, tracebacks included, without the passwords that errors of libraries name."""

    def format(self, record: logging.LogRecord) -> str:
        return without_passwords(super().format(record))
