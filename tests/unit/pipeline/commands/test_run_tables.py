"""Runs and plans at 80 columns: no line is wider, ids and keys are whole, states say what they mean."""

import io
import re

import pytest

from cluster.site import Site
from pipeline.commands.run_tables import plan_table, run_view, runs_view
from pipeline.planning.estimates import StageEstimate
from pipeline.planning.plan import PlannedStage
from pipeline.results.progress_file import ProgressFile, ProgressWriter
from pipeline.results.runs import RunFile, StageEntry
from pipeline.terminal.output import Terminal, View

STAGES = ("shard", "consistency", "ratio", "label", "router", "evaluate", "export")
ORIGIN = "20261127-000000-aaaa"


class Tty(io.StringIO):
    def isatty(self):
        return True


def printed(view: View, width: int = 80) -> str:
    """Return what a terminal of this width shows, without the sequences of bold names."""
    stream = Tty()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setenv("NO_COLOR", "1")
        Terminal(stream).view(view)
    text = re.sub(r"\[\d*m", "", stream.getvalue())
    assert all(len(line) <= width or " " not in line.strip() for line in text.splitlines())
    return text


def a_run(state="running", stages=STAGES, error=None) -> RunFile:
    entries = {name: StageEntry(fingerprint=f"{n}" * 64) for n, name in enumerate(stages, start=1)}
    return RunFile(
        run="20261128-033115-mx6z",
        created="2026-11-28T03:31:15+00:00",
        pipeline="p",
        experiment="quickstart",
        config={},
        site="local",
        state=state,
        error=error,
        stages=entries,
    )


def test_a_run_until_a_stage_is_not_called_done():
    run = a_run("done", ("shard",))
    run.stages["shard"].state = "done"
    text = printed(runs_view([run]))
    assert "done until shard" in text and "1 of 1 done" in text
    whole = a_run("done")
    for entry in whole.stages.values():
        entry.state = "done"
    assert "until" not in printed(runs_view([whole])) and "7 of 7 done" in printed(runs_view([whole]))


def test_long_errors_come_whole_below_the_runs_with_their_ids():
    error = "consistency failed: " + "a long reason " * 12 + "; see /storage/" + "x" * 90 + "/driver.log"
    text = printed(runs_view([a_run("failed", error=error)]))
    assert text.count("20261128-033115-mx6z") == 2
    assert error.replace(" ", "") in re.sub(r"\s", "", text)


def test_stages_say_whether_they_wait_are_reused_or_were_not_reached(tmp_path):
    run = a_run()
    shard, consistency = run.stages["shard"], run.stages["consistency"]
    shard.state, shard.reused, shard.reused_from, shard.seconds = "done", True, ORIGIN, 9.0
    consistency.state, consistency.attempt = "running", 2
    text = printed(run_view(run, Site(storage=tmp_path / "runs")))
    assert "reused" in text and f"made in run {ORIGIN}: shard" in text
    assert "running, attempt 2" in text and text.count("waits") == 5
    assert "runs/consistency/222222222222*/output" in text  # a shell finds the folder
    run.state = "failed"
    assert printed(run_view(run, Site(storage=tmp_path / "runs"))).count("not reached") == 5


def test_a_running_training_shows_its_figures_and_the_time_left(tmp_path, monkeypatch):
    run = a_run()
    entry = run.stages["consistency"]
    entry.state, entry.attempt = "running", 1
    folder = tmp_path / "consistency" / entry.fingerprint / "attempts" / "1"
    folder.mkdir(parents=True)
    now = [1000.0]
    monkeypatch.setattr("pipeline.results.progress_file.time.time", lambda: now[0])
    monkeypatch.setattr("pipeline.results.progress_file._WRITE_EVERY_S", 0.0)
    writer = ProgressWriter(folder)
    figures = {"loss": 0.41234, "learning_rate": 2.9e-4, "tokens_per_second": 1240.4}
    for done in (0, 100, 120):
        writer.report(done, 250, "steps", figures)
        now[0] += 20
    text = printed(run_view(run, Site(storage=tmp_path)))
    assert "consistency: 120/250 steps, loss 0.412, lr 2.9e-04, 1,240 tokens/s" in text
    assert "about 2 min 10 s left" in " ".join(text.split())


def test_the_time_left_starts_anew_with_another_kind_of_work(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("pipeline.results.progress_file.time.time", lambda: now[0])
    monkeypatch.setattr("pipeline.results.progress_file._WRITE_EVERY_S", 0.0)
    writer = ProgressWriter(tmp_path)
    for done, unit in ((10, "blocks"), (20, "blocks"), (10, "samples"), (20, "samples")):
        writer.report(done, 100, unit, {})
        now[0] += 20
    assert ProgressFile.of(tmp_path).seconds_left() == 80 * 20 / 10


def test_a_folder_that_cannot_be_written_costs_no_progress(tmp_path):
    ProgressWriter(tmp_path / "gone").report(1, 2, "rows", {})


@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_has_whole_ids_and_the_estimate_among_its_reasons(width):
    reason = f"consistency.optimizer.learning_rate: 3e-4 in run {ORIGIN}, 1e-4 here"
    planned = [PlannedStage("consistency", "run", "6f331290e291" + "0" * 52, [reason])]
    estimates = {"consistency": StageEstimate(307.0, 31_000_000, 2_100_000_000, f"as in run {ORIGIN}")}
    text = printed([plan_table(planned, estimates)], width)
    words = " ".join(text.split())
    assert "6f331290e291" in words and ORIGIN in words
    assert "takes about 5 min 07 s, 31.0 MB stored, 2.1 GB memory" in words
