"""What MLflow shows of a run as a whole, and of its model in the registry."""

import json
from pathlib import Path

import pytest

from cluster.metric_lines import MetricLine, system_metrics_file
from cluster.settings.blocks import Tracking
from cluster.site import Site
from pipeline.audit.mlflow import wanted_metrics
from pipeline.results.runs import RunAttempt
from pipeline.tracking.desired import desired_pipeline_run, desired_stage_run
from pipeline.tracking.front_page import version_description
from tests.finished_runs import finished_run

KEPT = Path(__file__).parents[4] / "docs" / "figures" / "quickstart" / "metrics.json"
METRICS = json.loads(KEPT.read_text())
COUNTS = {
    "evaluate": {"samples": 316, "last_loss": 0.25},
    "export": {
        "bytes": 7,
        "absolute_threshold": 0.8125,
        "base_model": "small-internvl",
        "base_licence": "apache-2.0\x1b[31m",
    },
}


@pytest.fixture
def run(tmp_path):
    inputs = {"model": "/models/base", "records": {"format": "demo", "num_samples": 1600}}
    run = finished_run(tmp_path, METRICS, COUNTS, inputs=inputs, evaluate={"seed": 0})
    run.attempts.append(RunAttempt(started="2026-01-01T00:00:00+00:00", host="h", pid=1, user="ada"))
    return run


def test_the_parent_shows_results_inputs_user_source_and_data(run, tmp_path):
    shown = desired_pipeline_run(run, Site(storage=tmp_path))
    assert 0.9 < shown.summary["quality_kept"] < 1.1 and 0 < shown.summary["tokens_saved"] < 1
    assert (
        shown.summary["quality_kept_low"] < shown.summary["quality_kept"] < shown.summary["quality_kept_high"]
    )
    assert shown.summary["test_questions"] == METRICS["num_samples"]
    assert shown.summary["evaluate/loss"] == 0.25
    assert (
        shown.params["inputs.model"] == "/models/base"
        and shown.params["inputs.records.num_samples"] == "1600"
    )
    assert shown.params["evaluate.seed"] == "0"
    assert (shown.tags["mlflow.user"], shown.tags["mlflow.source.name"]) == ("ada", "vico run")
    assert shown.tags["mlflow.source.type"] == "LOCAL"
    [data] = shown.datasets
    assert (data.name, data.digest, data.source["records"]["format"]) == ("records", "d" * 64, "demo")
    run.state, run.submission = "running", {"id": "job-1"}
    working = desired_pipeline_run(run, Site(storage=tmp_path))
    assert working.summary == {}, "results are those of a run that is done"
    assert (working.tags["mlflow.source.name"], working.tags["mlflow.source.type"]) == ("vico submit", "JOB")


def test_a_stage_repeats_no_last_value_of_a_metric(run, tmp_path):
    assert desired_stage_run(run, "evaluate", Site(storage=tmp_path)).summary == {"summary/samples": 316}


def test_a_version_says_how_good_its_model_is_and_where_it_is(run, tmp_path):
    tags = desired_stage_run(run, "export", Site(storage=tmp_path)).version_tags
    [point] = [point for point in METRICS["routed"] if point["threshold"] == METRICS["absolute_threshold"]]
    assert float(tags["vico.quality_kept"]) == pytest.approx(point["quality_kept"], abs=1e-3)
    assert " to " in tags["vico.quality_kept_interval"]
    assert tags["vico.threshold"] == "0.8125" and tags["vico.base_model"] == "small-internvl"
    assert tags["vico.base_license"] == "apache-2.0\\x1b[31m"
    host, _, path = tags["vico.address"].partition(":")
    assert host == "machine" and Path(path, "config.json").is_file(), "for scp"
    low, high = point["quality_kept_interval"]
    assert version_description(tags) == (
        f"Saves {point['tokens_saved']:.1%} of the visual tokens and keeps {point['quality_kept']:.3f} of "
        f"the quality (95 % interval {low:.3f} to {high:.3f}), "
        f"on {METRICS['num_samples']:,} test questions, at "
        f"threshold 0.812. Files: {tags['vico.address']}"
    )
    assert version_description({}) == ""


@pytest.mark.parametrize("is_on", [True, False])
def test_system_metrics_are_sent_by_a_switch(run, tmp_path, is_on):
    site = Site(storage=tmp_path, tracking=Tracking(system_metrics=is_on))
    folder = next(tmp_path.glob("evaluate/*/attempts/1"))
    line = MetricLine(step=0, time_s=1.0, metrics={"system/node/cpu": 1.0})
    (folder / system_metrics_file("node")).write_text(line.text())
    desired = desired_stage_run(run, "evaluate", site)
    assert desired.has_system_metrics == is_on
    assert ("system/node/cpu" in wanted_metrics(desired)) == is_on
