"""Find and remove secrets in texts that are stored or shown: passwords and tokens in URLs, authorization
headers, and the values of environment variables that are secrets by their names.

Secrets are read from the environment or from files by the libraries that need them; no setting of this
project takes one.
"""

import logging
import os
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
_WORDS = (
    "token|password|passwd|passphrase|pwd|secret|signature|sig|credentials?|api[-_]?key|"
    "(?:access|private|secret)[-_]?key"
)
_QUERY = re.compile(
    rf"""(?P<start>[?&;](?:[\w.-]*[-_.])?(?:{_WORDS})(?:[-_.][\w.-]*)?=)(?!\*\*\*)[^&;\s'"#<>|]+""",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"""(?P<start>\bauthorization['"]?\s*[:=]\s*['"]?(?:\w+\s+)?|\bbearer\s+(?=\S*\d))(?!\*\*\*)[\w.~+/=-]{8,}""",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(rf"(?:.*[-_])?(?:{_WORDS})", re.IGNORECASE)
_MIN_CHARACTERS = 8
"""Of the value of a variable that is masked; shorter ones are part of ordinary words."""
_MASK = "***"


def without_passwords(text: str) -> str:
    """Return the text without secrets: user and password of a URL are removed, tokens in its query, those
    after `Bearer` and values of variables such as HF_TOKEN become `***`.

    `http://me:secret@host/?token=secret` becomes `http://host/?token=***`.
    """
    text = _USER_INFO.sub("", text)
    for pattern in (_QUERY, _HEADER):
        text = pattern.sub(rf"\g<start>{_MASK}", text)
    for value in _secret_values():
        text = text.replace(value, _MASK)
    return text


def has_password(text: str) -> bool:
    """Return whether a text has a URL with a password, or with a token in its query."""
    has_query = "://" in text and _QUERY.search(text) is not None
    return has_query or any(":" in user_info for user_info in _USER_INFO.findall(text))


def is_secret_name(variable: str) -> bool:
    """Return whether the value of an environment variable is a secret by its name, as that of HF_TOKEN."""
    return _SECRET_NAME.fullmatch(variable) is not None and variable not in ("PWD", "OLDPWD")


def _secret_values() -> list[str]:
    """Return the values of the environment that are secrets, the longest first."""
    values = {
        value for name, value in os.environ.items() if len(value) >= _MIN_CHARACTERS and is_secret_name(name)
    }
    return sorted(values, key=len, reverse=True)


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
