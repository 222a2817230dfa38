"""A row as it was found, before any check: what every format's reader gives."""

from collections.abc import Callable
from dataclasses import dataclass

DIGEST_BYTES = 16


@dataclass(frozen=True)
class RawRow:
    """One row in InternVL's form, as the bytes of its line; `picture_bytes` reads a picture that it names.

    `refused` is (reason, message) where no line could be made of what was found.
    """

    line: int
    content: bytes
    is_duplicate: bool
    picture_bytes: Callable[[str], bytes]
    refused: tuple[str, str] | None = None
