"""What was sent to MLflow: which steps are new, and the state file of a run."""

import tracemalloc

from cluster.site import Site
from pipeline.tracking.sent import (
    STATE_FILE,
    SentRun,
    SentState,
    SentSteps,
    StepSet,
    is_complete,
    is_incomplete,
    mark_incomplete,
)


def test_after_a_kill_exactly_the_missing_steps_are_new():
    """MLflow has steps 1, 2 and 4: the last step alone would lose 3."""
    steps = SentSteps({"loss": 4}, {"loss": StepSet({1, 2, 4})})
    assert [step for step in range(1, 6) if steps.is_new("loss", step)] == [3, 5]
    for step in (3, 5):
        steps.add("loss", step)
    assert [step for step in range(1, 8) if steps.is_new("loss", step)] == [6, 7]
    assert steps.is_new("other", 0)
    assert steps.last == {"loss": 5}


def test_a_rarely_reported_metric_may_come_out_of_order():
    """After a restart of the ranks, a checkpoint may be taken at a step before the last checkpoint's."""
    steps = SentSteps({}, {})
    steps.add("seconds_checkpoint", 200)
    assert steps.is_new("seconds_checkpoint", 150)
    steps.add("seconds_checkpoint", 150)
    assert not steps.is_new("seconds_checkpoint", 150) and not steps.is_new("seconds_checkpoint", 200)
    assert steps.last == {"seconds_checkpoint": 200}


def test_a_set_of_steps_has_what_was_added_and_needs_one_bit_per_step():
    added = {0, 1, 7, 8, 4095, 4096, 10**12, -1}
    steps = StepSet(added)
    neighbours = {step + offset for step in added for offset in (-1, 0, 1)}
    assert {step for step in neighbours if step in steps} == added
    tracemalloc.start()
    StepSet(range(100_000))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000, "a run may have a million steps of some sixty metrics"


def test_the_state_of_another_mlflow_and_a_damaged_state_are_not_used(tmp_path, caplog):
    site = Site(storage=tmp_path)
    assert not is_complete(tmp_path, site)
    state = SentState(uri=site.tracking_address, runs={"draw": SentRun(id="1", began="1")}, complete=True)
    state.write(tmp_path / STATE_FILE)
    assert is_complete(tmp_path, site)
    other_site = Site.model_validate({"storage": tmp_path, "tracking": {"uri": "http://elsewhere"}})
    assert not is_complete(tmp_path, other_site)
    (tmp_path / STATE_FILE).write_text('{"schema": 1,')
    assert SentState.of(tmp_path, site).runs == {}
    assert "is damaged" in caplog.text


def test_a_run_that_was_never_sent_is_neither_complete_nor_incomplete(tmp_path):
    site = Site(storage=tmp_path)
    assert not is_complete(tmp_path, site) and not is_incomplete(tmp_path, site)
    mark_incomplete(tmp_path, site)
    assert is_incomplete(tmp_path, site)
    (tmp_path / STATE_FILE).write_text("damaged")
    assert is_incomplete(tmp_path, site)


def test_a_moved_storage_is_the_same_mlflow_and_its_files_are_sent_again(tmp_path):
    before, now = (Site(storage=tmp_path / name) for name in ("before", "now"))
    state = SentState.of(tmp_path, before)
    state.runs["draw"], state.complete = SentRun(id="1", began="1", files={"a.json": [1, 2]}), True
    state.write(tmp_path / STATE_FILE)
    assert is_complete(tmp_path, before)
    moved = SentState.of(tmp_path, now)
    assert (moved.uri, moved.runs["draw"].id, moved.runs["draw"].files) == (now.tracking_address, "1", {})
    assert not is_complete(tmp_path, now), "the same command has to look"
    assert not is_incomplete(tmp_path, now), "but nothing of the run is missing"
    state.complete = False
    state.write(tmp_path / STATE_FILE)
    assert is_incomplete(tmp_path, now)
    stated = Site.model_validate({"storage": tmp_path, "tracking": {"uri": before.tracking_uri}})
    SentState.of(tmp_path, stated).write(tmp_path / STATE_FILE)
    assert SentState.of(tmp_path, now).runs == {}, "a database that a site file names does not move"
