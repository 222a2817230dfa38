"""Tables at 80 columns: texts wrap between words, and ids, keys and paths stay whole."""

import io
import re

import pytest

from pipeline.terminal.live import LiveView
from pipeline.terminal.output import Terminal, View
from pipeline.terminal.tables import TextTable

RUN, KEY = "20261128-033115-mx6z", "consistency.optimizer.learning_rate"
PATH = "/mnt/storage/" + "long/" * 14 + "driver.log"


class Tty(io.StringIO):
    def isatty(self):
        return True


def lines_of(view: View, stream=None) -> list[str]:
    stream = Tty() if stream is None else stream
    Terminal(stream).view(view)
    return re.sub(r"\x1b\[\d*m", "", stream.getvalue()).splitlines()


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_columns_share_the_width_and_no_word_is_broken():
    reason = f"{KEY}: 3e-4 in run {RUN}, 1e-4 here, and " + "more words " * 9
    table = TextTable(("run", "experiment", "why"), ((RUN, "a-long-name-of-an-experiment", reason),))
    lines = lines_of([table])
    assert all(len(line) <= 80 for line in lines)
    words = " ".join(lines).split()
    assert words.count(RUN) == 1 and "a-long-name-of-an-experiment" in words
    whole = TextTable(("run", "why"), ((RUN, reason),))
    assert {RUN, f"{KEY}:", f"{RUN},"} <= set(" ".join(lines_of([whole])).split())


def test_a_terminal_without_escapes_has_its_own_width(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "100")
    table = TextTable(("run", "why"), ((RUN, "more words " * 20),))
    lines = lines_of([table])
    assert RUN in lines[1] and 90 < max(map(len, lines)) <= 100


def test_words_that_are_too_long_for_columns_are_shown_row_by_row():
    """A terminal continues a line that is too long, and what is copied from it is whole."""
    table = TextTable(("stage", "where"), (("shard", PATH), ("label", ("x", "y"))), title="2 problems")
    assert lines_of([table]) == [
        "2 problems",
        "",
        "stage: shard",
        "where:",
        f"    {PATH}",
        "",
        "stage: label",
        "where: x",
        "    y",
    ]


def test_without_a_terminal_no_line_breaks():
    text = "word " * 100 + PATH
    lines = lines_of([TextTable(("what",), ((text,), ("short",)))], io.StringIO())
    assert lines == ["what", text, "short"]


def test_a_long_word_of_a_line_is_not_broken():
    assert PATH in [line.strip() for line in lines_of([f"consistency failed: see {PATH}"])]


def test_wide_characters_count_as_two():
    lines = lines_of([TextTable(("a", "b"), (("字" * 30, "字 " * 20),))])
    assert lines[1].startswith("字" * 30 + "  字")
    assert all(len(line.rstrip()) + line.count("字") <= 80 for line in lines)


@pytest.mark.parametrize("stream", [Tty(), io.StringIO()])
def test_a_live_view_ends_with_the_last_state(stream):
    hostile = "\x1b]0;title\x07[red]"
    with LiveView(stream) as live:
        for state in ("running", "running", "done"):
            live.show([f"run {hostile}: {state}", TextTable(("stage",), ((hostile,),))])
    text = stream.getvalue()
    assert "\x1b]0" not in text and "\x07" not in text and text.count("\\x1b]0;title\\x07[red]") >= 2
    assert ": done" in text
    if not stream.isatty():
        assert text.count("running") == 1, "the same view is not written twice"
