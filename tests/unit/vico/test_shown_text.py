"""Texts as they are shown: nothing in them is obeyed, and JSON stays exact."""

import json
import sys
import unicodedata

import pytest

from vico.shown_text import json_line, markdown, markdown_code, printable, printable_lines

DIRECTION = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
EVERY_CHARACTER = "".join(map(chr, range(sys.maxunicode + 1)))


def is_obeyed(character: str) -> bool:
    """Whether a terminal or text layout obeys a character: control, separator, direction, half of a pair."""
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return True
    marks = "\u200e\u200f\u061c"
    return unicodedata.bidirectional(character) in DIRECTION or character in marks


@pytest.mark.parametrize("shown, kept", [(printable, ""), (printable_lines, "\n\t")])
def test_no_character_that_is_obeyed_is_shown(shown, kept):
    text = shown(EVERY_CHARACTER)
    assert {character for character in text if is_obeyed(character)} == set(kept)
    letters = "aä漢字 हिन्दी فارسی می\u200cخواهم 👩\u200d🚀 ☃ \u0301 [red] $x$ \\"
    assert shown(letters) == letters


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("\u202eabc\udcff", "\\u202eabc\\udcff"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_a_character_that_is_not_shown_becomes_its_escape(text, expected):
    assert printable(text) == expected


def test_json_is_exact_and_has_no_such_character_either():
    line = json_line({EVERY_CHARACTER: [EVERY_CHARACTER, 1.5, None]})
    assert not any(map(is_obeyed, line))
    # Python reads two halves in a row as one character: a value with them is not text in any encoding.
    halves = EVERY_CHARACTER.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert json.loads(json_line(halves)) == halves
    assert json.loads(json_line("\udcff\x9b\x7f\U000e0041")) == "\udcff\x9b\x7f\U000e0041"


def test_markdown_shows_a_text_as_it_is():
    text = "a|b\n*c* _d_ [e](f) <script> `g` ~h~ # i &lt; x_y \x1b"
    expected = r"a\|b \*c\* \_d\_ \[e\](f) \<script\> \`g\` \~h\~ \# i \&lt; x_y \x1b"
    assert markdown(text) == expected.removesuffix(r"\x1b") + r"\\x1b"
    assert markdown_code("a`b|c\n") == r"`a'b\|c\n`"
