"""Text from data, configs, file names and errors as it is shown: with nothing that a reader obeys.

Such a text may hold terminal control sequences, marks that reverse the direction of the rest of a line,
halves of surrogate pairs (file names that are not UTF-8), or Markdown. When a text leaves this project for a
terminal, a model card or MLflow, it passes a function of this module. Results keep texts as they are.
"""

import json
import re
from typing import Any

# Control characters C0, DEL and C1; soft hyphen; marks, embeddings, overrides and isolates of direction;
# separators of lines; invisible operators; the byte order mark; interlinear marks; surrogates; tags.
# The joiners U+200C and U+200D stay: scripts and emoji need them.
_UNSHOWN = (
    r"\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f"
)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
"""What ends a line or is obeyed: no name that goes into messages, scripts and comments may have it."""
_IN_LINE = re.compile(f"[{_UNSHOWN}]")
_IN_LINES = re.compile(f"(?![\n\t])[{_UNSHOWN}]")
# An underscore between letters is no emphasis.
_MARKDOWN = re.compile(r"([\\`*\[\]<>|#~&$]|(?<![^\W_])_|_(?![^\W_]))")


def printable(text: object) -> str:
    """Return `str(text)` as one line: a character that is not shown becomes its escape, such as `\\x1b`."""
    return _IN_LINE.sub(_escape, str(text))


def printable_lines(text: object) -> str:
    """Return `str(text)` with its line feeds and tabs; other characters as in `printable`."""
    return _IN_LINES.sub(_escape, str(text))


def markdown(text: object) -> str:
    """Return `str(text)` as one line that Markdown shows as it is, also in a table."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(str(text).split())))


def markdown_code(text: object) -> str:
    """Return `str(text)` as one line of code in Markdown, also in a table; a backtick becomes `'`."""
    shown = printable(text).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`"


def json_line(value: Any) -> str:
    """Return a value as JSON in one line. Characters that are not shown are JSON escapes: it is exact."""
    return _IN_LINE.sub(_json_escape, json.dumps(value, ensure_ascii=False))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[match[0]]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1] if match[0] != "\x7f" else "\\u007f"
