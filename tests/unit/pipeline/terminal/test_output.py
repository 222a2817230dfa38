"""What the commands write: texts from anywhere are shown and never obeyed."""

import io
import json
import logging
import sys

import pytest

from pipeline.terminal.output import (
    PlainStream,
    Terminal,
    TerminalHandler,
    filter_standard_streams,
    print_errors,
    print_json,
)
from pipeline.terminal.tables import TextTable

TEXT = "[/b] [red]x :smile: \x1b]0;title\x07 \x1b[2J \x9b1m \x7f \u202eabc \udcff\r"
SHOWN = "[/b] [red]x :smile: \\x1b]0;title\\x07 \\x1b[2J \\x9b1m \\x7f \\u202eabc \\udcff\\r"


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream_class", [io.StringIO, Tty])
def test_lines_and_tables_show_texts_as_they_are(stream_class, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    stream = stream_class()
    shown = Terminal(stream)
    shown.line(f"{TEXT}\n")
    shown.lines(f"{TEXT}\nb")
    shown.wrapped(TEXT)
    shown.errors(f"{TEXT}\nsecond")
    lines = stream.getvalue().splitlines()
    assert lines == [f"{SHOWN}\\n", SHOWN, "b", SHOWN, f"error: {SHOWN}", "error: second"]
    stream.seek(0)
    stream.truncate()
    shown.table(TextTable((TEXT, "b"), ((TEXT, "1\n2"), (("first", TEXT), 5)), title=TEXT))
    text = stream.getvalue()
    assert text.count(SHOWN) == 4 and "1\\n2" in text
    # rich's own bold and italic are the only sequences
    for sequence in ("\x1b[1m", "\x1b[3m", "\x1b[0m"):
        text = text.replace(sequence, "")
    assert not set(text) & set("\x1b\x07\x9b\x7f\u202e\udcff\r")


def test_a_stream_without_unicode_gets_escapes_and_exact_json():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    shown = Terminal(stream)
    shown.line("ä…")
    shown.table(TextTable(("a",), (("…",),)))
    print_json(stream, {"ä": "…\x9b"})
    *lines, answer = raw.getvalue().decode("ascii").splitlines()
    assert lines[0] == "\\xe4\\u2026" and lines[-1].strip() == "\\u2026"
    assert json.loads(answer) == {"ä": "…\x9b"}


def test_what_others_write_to_the_standard_streams_is_filtered(monkeypatch):
    """Prints of libraries, records of the logger, and tracebacks."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    filter_standard_streams()
    filter_standard_streams()
    assert isinstance(sys.stdout, PlainStream) and sys.stdout.unfiltered is out
    print(TEXT)
    print("\r 10%|#", end="")
    print("\x1b[33m(raylet)\x1b[0m", end="")
    print("\x1b[A", end="")
    assert out.getvalue() == f"{SHOWN}\n\r 10%|#(raylet)\x1b[A"
    logger = logging.getLogger("test of the terminal")
    logger.addHandler(handler := TerminalHandler())
    monkeypatch.setattr(logger, "propagate", False)  # pytest cannot send half of a pair between processes
    try:
        raise ValueError(TEXT)
    except ValueError:
        logger.exception("%s", TEXT)
        sys.excepthook(*sys.exc_info())
    logger.removeHandler(handler)
    print_errors(TEXT)
    text = err.getvalue()
    assert text.count(SHOWN) == 4 and text.endswith(f"error: {SHOWN}\n")
    assert not set(text) & set("\x1b\x07\x9b\x7f\u202e\udcff\r")
