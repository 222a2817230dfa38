"""The elements of a JSON list in a file, one at a time with their byte offsets; memory stays bounded.

The standard decoder finds the end of an element. It works on text, so it gets the bytes decoded as Latin-1,
one character per byte: structure and escapes are ASCII in UTF-8 too.
"""

import json
from collections.abc import Iterator
from typing import BinaryIO

from vico.errors import UserError

_CHUNK_BYTES = 1 << 20
_MAX_ELEMENT_BYTES = 64 << 20
_CUT_BYTES = 16  # an element that ends with the buffer may be cut within a word or an escape
_SPACE = " \t\r\n"
END_FINDER = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)
"""Finds where a value ends; numbers stay text, since Python converts none of over 4300 digits."""


def first_byte(file: BinaryIO) -> bytes:
    """Return the first byte after white space and byte order mark, b"" at the end; keep the position."""
    start = file.tell()
    head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(start)
    return head[:1]


def list_elements(file: BinaryIO, name: str, offset: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, bytes) of each element, starting with the one at `offset` (None: the first).

    Raises UserError with the file's name and the byte where the list ends early or is not JSON, or where
    something follows it.
    """
    window = _Window(file, name, offset or 0)
    if offset is None:
        window.skip("\xef\xbb\xbf" + _SPACE)  # some lists start with the byte order mark of Windows
        window.expect("[")
        window.skip(_SPACE)
        if window.peek() == "]":
            window.expect_the_end()
            return
    while True:
        yield window.element()
        window.skip(_SPACE)
        if window.peek() == "]":
            window.expect_the_end()
            return
        window.expect(",")
        window.skip(_SPACE)


class _Window:
    """A part of the file as Latin-1 text: it starts at byte `base`, and `position` is the next character."""

    def __init__(self, file: BinaryIO, name: str, offset: int) -> None:
        self.file, self.name = file, name
        self.base, self.position, self.text, self.ended = offset, 0, "", False
        file.seek(offset)

    def more(self) -> bool:
        """Read another chunk and drop the text before `position`; return False at the end of the file."""
        data = self.file.read(_CHUNK_BYTES)
        self.base, self.text = self.base + self.position, self.text[self.position :] + data.decode("latin-1")
        self.position, self.ended = 0, not data
        return not self.ended

    def peek(self) -> str:
        while self.position >= len(self.text):
            if not self.more():
                raise self.broken("the file ends inside the list")
        return self.text[self.position]

    def skip(self, characters: str) -> None:
        while self.peek() in characters:
            self.position += 1

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self.broken(f"{character!r} is expected")
        self.position += 1

    def expect_the_end(self) -> None:
        """Go past the end of the list; another list, for example, may follow in the file."""
        self.position += 1
        while self.position < len(self.text) or self.more():
            if self.text[self.position] not in _SPACE:
                raise self.broken("the list has ended before")
            self.position += 1

    def element(self) -> tuple[int, bytes]:
        self.peek()
        while True:
            try:
                _, end = END_FINDER.raw_decode(self.text, self.position)
                # a number at the end of the window may continue in the next chunk
                if end < len(self.text) or self.ended:
                    break
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos + _CUT_BYTES >= len(self.text)
                if self.ended or not is_cut or len(self.text) - self.position > _MAX_ELEMENT_BYTES:
                    raise self.broken(f"{error.msg} at byte {self.base + error.pos}") from None
            except RecursionError:
                raise self.broken("an element is nested too deep") from None
            self.more()
        element = self.base + self.position, self.text[self.position : end].encode("latin-1")
        self.position = end
        return element

    def broken(self, problem: str) -> UserError:
        return UserError(
            f"{self.name} is not a JSON list from byte {self.base + self.position} on: {problem}; "
            "fix the file, or write one row per line"
        )
