"""Texts from configs and errors in MLflow's fields, and in the Markdown that an audit stores there."""

from pipeline.audit.findings import Findings
from pipeline.audit.report import report_texts
from pipeline.results.runs import RunFile, StageEntry
from pipeline.tracking.desired import DesiredRun

PLANTED = "[x](http://a)<b>|\x1b]0;t\x07\u202e\udcff"
RUN = RunFile(
    run="r1",
    created="2026-01-01T00:00:00+00:00",
    pipeline="p",
    experiment=PLANTED,
    config={},
    site="s",
    stages={"shard": StageEntry(fingerprint="f1")},
)


def test_fields_have_escapes_in_place_of_control_characters():
    texts = {"vico.run": "r1", "key\x1b": f"{PLANTED}\nsecond line"}
    desired = DesiredRun("pipeline", "1", f"{PLANTED}\n", "RUNNING", 0.0, None, params=texts, tags=texts)
    shown = "[x](http://a)<b>|\\x1b]0;t\\x07\\u202e\\udcff"
    assert desired.params == desired.tags == {"vico.run": "r1", "key\\x1b": f"{shown}\nsecond line"}
    assert desired.title == f"{shown}\\n"


def test_a_report_of_an_audit_shows_texts_as_they_are():
    findings = Findings()
    findings.problem(PLANTED, "changed", f"a`{PLANTED}", PLANTED)
    findings.note("pipeline", PLANTED)
    text = report_texts(RUN, findings, "now")["audit.md"]
    (line,) = [line for line in text.splitlines() if "changed" in line]
    shown = r"\[x\](http://a)\<b\>\|\\x1b\]0;t\\x07\\u202e\\udcff"
    assert line.count(shown) == 2 and line.count(" | ") == 3
    assert r"`a'[x](http://a)<b>\|\x1b]0;t\x07\u202e\udcff`" in line
    assert not set(text) & set("\x1b\x07\u202e\udcff")
