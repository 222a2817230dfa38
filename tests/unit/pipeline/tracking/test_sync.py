"""Tracking without MLflow: reading metrics as they are written, what is new, how things are named."""

import json
import tracemalloc

import pytest

from cluster.site import Site
from pipeline.config.pipeline_file import flattened
from pipeline.results.metric_lines import MetricFiles
from pipeline.tracking.client import metric_key
from pipeline.tracking.sent import STATE_FILE, SentRun, SentState, SentSteps, StepSet, is_complete


def line(step, **metrics):
    return json.dumps({"step": step, "time": 100.0 + step, "metrics": metrics}) + "\n"


@pytest.fixture
def attempts(tmp_path):
    """Appends text to a file of an attempt."""

    def append(attempt, text, name="metrics.jsonl"):
        folder = tmp_path / "attempts" / str(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a") as file:
            file.write(text)

    append.folder = tmp_path / "attempts"
    return append


def read(files, num_values=1000):
    lines = files.unread(num_values)
    files.take(lines)
    return [(one.step, dict(one.metrics)) for one in lines]


def test_half_a_line_waits_until_it_is_whole(attempts):
    files = MetricFiles(attempts.folder)
    assert read(files) == []
    whole = line(2, loss=0.5)
    attempts(1, line(1, loss=1.0) + whole[:20])
    assert read(files) == [(1, {"loss": 1.0})]
    assert read(files) == []
    attempts(1, whole[20:])
    assert read(files) == [(2, {"loss": 0.5})]


def test_half_a_line_of_a_killed_attempt_is_never_sent(attempts):
    files = MetricFiles(attempts.folder)
    attempts(1, line(1, loss=1.0) + line(2, loss=0.5)[:20])
    attempts(2, line(2, loss=0.6))
    assert read(files) == [(1, {"loss": 1.0}), (2, {"loss": 0.6})]


def test_attempts_come_in_order_of_their_numbers_with_all_their_files(attempts):
    attempts(10, line(3, loss=0.1))
    attempts(9, line(2, loss=0.2))
    attempts(9, line(0, cpu=50.0), "system-node.jsonl")
    assert [step for step, _ in read(MetricFiles(attempts.folder))] == [2, 0, 3]


def test_lines_that_were_not_taken_come_again(attempts):
    """What is read while the server is away must not be lost."""
    files = MetricFiles(attempts.folder)
    attempts(1, "".join(line(step, a=0.0, b=0.0) for step in range(10)))
    first = files.unread(4)
    assert [one.step for one in first] == [0, 1]
    assert files.unread(4) == first
    files.take(first)
    assert [step for step, _ in read(files)] == list(range(2, 10))


@pytest.mark.parametrize("bad", ["{}", "[1]", "no json", '{"step": 1, "time": 2, "metrics": {"a": "b"}}'])
def test_a_line_that_is_no_metrics_is_logged_and_skipped(attempts, caplog, bad):
    attempts(1, line(1, loss=1.0) + bad + "\n" + line(2, loss=0.5))
    values = [one for one in read(MetricFiles(attempts.folder)) if one[1]]
    assert values == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
    assert "is no metrics" in caplog.text


def test_nan_is_a_metric(attempts):
    attempts(1, line(1, loss=float("nan"), grad=float("inf")))
    ((_, metrics),) = read(MetricFiles(attempts.folder))
    assert metrics["loss"] != metrics["loss"]
    assert metrics["grad"] == float("inf")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("loss", "loss"),
        ("system/node-1/cpu", "system/node-1/cpu"),
        ("kl@0.5", "kl_0.5"),
        ("../up", "_up"),
        ("a//b", "a__b"),
        ("/root", "_root"),
        ("", "_"),
    ],
)
def test_metric_names_become_names_that_mlflow_takes(name, key):
    assert metric_key(name) == key


def test_configs_flatten_to_text():
    config = {"lr": 1e-5, "optimizer": {"betas": [0.9, 0.95], "name": "adamw"}, "max": None, "none": {}}
    assert flattened(config) == {
        "lr": "1e-05",
        "optimizer.betas": "[0.9, 0.95]",
        "optimizer.name": "adamw",
        "max": "null",
        "none": "{}",
    }


def test_after_a_kill_exactly_the_missing_steps_are_new():
    """MLflow has steps 1, 2 and 4: the last step alone would lose 3."""
    steps = SentSteps({"loss": 4}, {"loss": StepSet({1, 2, 4})})
    assert [step for step in range(1, 6) if steps.is_new("loss", step)] == [3, 5]
    for step in (3, 5):
        steps.add("loss", step)
    assert [step for step in range(1, 8) if steps.is_new("loss", step)] == [6, 7]
    assert steps.is_new("other", 0)
    assert steps.last == {"loss": 5}


def test_a_metric_that_comes_only_now_and_then_need_not_come_in_order():
    """After a restart of ranks a checkpoint is taken at a step before that of the last one."""
    steps = SentSteps({}, {})
    steps.add("seconds_checkpoint", 200)
    assert steps.is_new("seconds_checkpoint", 150)
    steps.add("seconds_checkpoint", 150)
    assert not steps.is_new("seconds_checkpoint", 150) and not steps.is_new("seconds_checkpoint", 200)
    assert steps.last == {"seconds_checkpoint": 200}


def test_a_set_of_steps_holds_what_was_added_and_takes_a_bit_each():
    added = {0, 1, 7, 8, 4095, 4096, 10**12, -1}
    steps = StepSet(added)
    near = {step + by for step in added for by in (-1, 0, 1)}
    assert {step for step in near if step in steps} == added
    tracemalloc.start()
    StepSet(range(100_000))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000, "a run has more steps, of some sixty metrics"


def test_state_of_another_mlflow_or_a_damaged_one_starts_afresh(tmp_path, caplog):
    site = Site(storage=tmp_path)
    assert not is_complete(tmp_path, site)
    state = SentState(uri=site.tracking_place, runs={"draw": SentRun(id="1", began="1")}, complete=True)
    state.write(tmp_path / STATE_FILE)
    assert is_complete(tmp_path, site)
    elsewhere = Site.model_validate({"storage": tmp_path, "tracking": {"uri": "http://elsewhere"}})
    assert not is_complete(tmp_path, elsewhere)
    (tmp_path / STATE_FILE).write_text('{"schema": 1,')
    assert SentState.of(tmp_path, site.tracking_place).runs == {}
    assert "is damaged" in caplog.text


def test_passwords_of_a_tracking_server_stay_out_of_files(tmp_path):
    site = Site.model_validate({"tracking": {"uri": "postgresql://me:secret@host:5432/mlflow"}})
    assert site.tracking_place == "postgresql://host:5432/mlflow"
