"""Tables for people: nothing is cut, also on a narrow terminal, and no text is read as markup."""

import io
import re

from pipeline.commands.tables import differences_table, text_table
from pipeline.terminal.output import Terminal


class Tty(io.StringIO):
    def isatty(self):
        return True


def printed(table, width: int, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Tty()
    Terminal(stream).table(table)
    return re.sub(r"\x1b\[\d*m", "", stream.getvalue())


def test_long_texts_wrap_and_are_never_cut(monkeypatch):
    path = "/a/storage/" + "0123456789" * 12 + "/output"
    text = printed(text_table(("what", "where"), [("x", path), ("some words " * 20, "")]), 60, monkeypatch)
    first, _, second = text.partition("some")
    assert "…" not in text and second.count("some") == 19
    assert path in "".join(first.removeprefix("what").replace("where", "").split()).removeprefix("x")


def test_brackets_are_text(monkeypatch):
    values = ("[/b] [red] [Errno 2]", "splits: [train] -> [train, test]")
    text = printed(text_table(("[a]", "b"), [values], title="[title]"), 200, monkeypatch)
    assert all(value in text for value in (*values, "[a]", "[title]"))


def test_values_that_differ_only_at_their_end_are_shown_to_their_end(monkeypatch):
    long = "/shared/data/of/several/projects/and/people/with/long/names/"
    difference = {"stage": None, "name": "inputs.records.path", "a": f"{long}first", "b": f"{long}second"}
    text = printed(differences_table({"runs": ["r1", "r2"], "config": [difference]}), 240, monkeypatch)
    assert f"{long}first" in text and f"{long}second" in text
