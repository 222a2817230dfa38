"""The elements of a JSON list in a file, one at a time with their byte offsets; the list is never held whole.

The standard decoder finds where an element ends. It works on text, so bytes are shown to it as Latin-1, where
a byte is a letter: structure and escapes are ASCII in UTF-8 too.
"""

import json
from collections.abc import Iterator
from typing import BinaryIO

from vico.errors import UserError

_CHUNK_BYTES = 1 << 20
_MAX_ELEMENT_BYTES = 64 << 20
_CUT_BYTES = 16  # an element that ends with the buffer may be cut within a word or an escape
_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder(strict=False)


def first_byte(file: BinaryIO) -> bytes:
    """The first byte of a file that is no space and no mark, and the file as it was; empty at its end."""
    start = file.tell()
    head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(start)
    return head[:1]


def list_elements(file: BinaryIO, name: str, offset: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each element from the one at `offset` on (None: the first of the list).

    UserError names the file and the byte where the list breaks off or is no JSON.
    """
    window = _Window(file, name, offset or 0)
    if offset is None:
        window.skip("\xef\xbb\xbf" + _SPACE)  # a mark of Windows comes before some lists
        window.expect("[")
        window.skip(_SPACE)
        if window.peek() == "]":
            return
    while True:
        yield window.element()
        window.skip(_SPACE)
        if window.peek() == "]":
            return
        window.expect(",")
        window.skip(_SPACE)


class _Window:
    """A part of the file as Latin-1 text, `at` being the place in it and `base` the byte where it starts."""

    def __init__(self, file: BinaryIO, name: str, offset: int):
        self.file, self.name, self.base, self.at, self.text, self.ended = file, name, offset, 0, "", False
        file.seek(offset)

    def more(self) -> bool:
        """Read another chunk and forget what lies behind; False at the end of the file."""
        data = self.file.read(_CHUNK_BYTES)
        self.base, self.text, self.at = self.base + self.at, self.text[self.at :] + data.decode("latin-1"), 0
        self.ended = not data
        return not self.ended

    def peek(self) -> str:
        while self.at >= len(self.text):
            if not self.more():
                raise self.broken("the file ends inside the list")
        return self.text[self.at]

    def skip(self, letters: str) -> None:
        while self.peek() in letters:
            self.at += 1

    def expect(self, letter: str) -> None:
        if self.peek() != letter:
            raise self.broken(f"{letter!r} is expected")
        self.at += 1

    def element(self) -> tuple[int, bytes]:
        self.peek()
        while True:
            try:
                _, end = _DECODER.raw_decode(self.text, self.at)
                # a number at the end of the window may go on in the next
                if end < len(self.text) or self.ended:
                    break
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos + _CUT_BYTES >= len(self.text)
                if self.ended or not is_cut or len(self.text) - self.at > _MAX_ELEMENT_BYTES:
                    at = self.base + error.pos
                    raise self.broken(f"{error.msg} at byte {at}") from None
            except RecursionError:
                raise self.broken("an element is nested too deep") from None
            self.more()
        found = self.base + self.at, self.text[self.at : end].encode("latin-1")
        self.at = end
        return found

    def broken(self, what: str) -> UserError:
        return UserError(
            f"{self.name} is no JSON list from byte {self.base + self.at} on: {what}; mend the file, "
            "or write one row a line"
        )
