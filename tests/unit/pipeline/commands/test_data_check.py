"""What `vico data check` prints: whole reasons, wrapped only on a terminal."""

import io

from pipeline.commands.data import show_report

MESSAGE = "turn 3 is from 'narrator'; " + "turns go human, gpt, human, gpt " * 10 + "and the end matters most"
NOTE = "shard.max_tiles=6 has no full effect: the model cuts a picture into 4 tiles at most"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def report(message):
    row = {"id": None, "source": "mine", "line": 7, "reason": "broken_row", "message": message}
    return {
        "read": 2,
        "written": 1,
        "quarantined": 1,
        "splits": {"train": 1},
        "reasons": {"broken_row": 1},
        "sources": {"mine": {"read": 2, "written": 1, "quarantined": 1}},
        "examples": {"broken_row": [row]},
        "notes": [NOTE],
    }


def test_elsewhere_than_on_a_terminal_every_reason_is_one_whole_line():
    stream = io.StringIO()
    show_report(report(MESSAGE.replace("; ", ";\n ")), stream)
    lines = stream.getvalue().splitlines()
    assert f"  mine line 8: {MESSAGE}" in lines and lines[-1] == NOTE


def test_a_terminal_wraps_reasons_below_their_beginning(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    show_report(report(MESSAGE + " /a" + "/folder" * 30), stream)
    lines = stream.getvalue().splitlines()
    assert max(len(line) for line in lines if "/folder" not in line) <= 60
    first = next(n for n, line in enumerate(lines) if line.startswith("  mine line 8"))
    assert all(line.startswith("      ") for line in lines[first + 1 : first + 5])
    assert "and the end matters most" in " ".join(" ".join(lines).split())
    assert "/a" + "/folder" * 30 in " ".join(lines).split(), "a path stays whole, to be copied"
