"""Messages of errors as one line."""

import pytest

from vico.errors import last_line, one_line


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("first\n  second\tthird \n"), "first second third"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (RuntimeError(" \n"), "RuntimeError"),
        ("a text\nof two lines", "a text of two lines"),
        ("", ""),
    ],
)
def test_an_error_becomes_one_line(error, line):
    assert one_line(error) == line


def test_a_very_long_message_is_cut_and_says_so():
    line = one_line(ValueError("word " * 1000))
    assert len(line) == 300 and line.startswith("word word") and line.endswith("...")
    assert one_line(ValueError("x" * 300)) == "x" * 300
    assert one_line(ValueError("x" * 1000), max_chars=None) == "x" * 1000


def test_the_last_line_of_a_text_is_the_last_that_is_not_blank():
    assert last_line("Job failed, last logs:\n\nTraceback\nerror: no such file\n\n") == "error: no such file"
    assert last_line("") == last_line(" \n\n") == ""
    assert len(last_line("first\n" + "x" * 1000)) == 500
