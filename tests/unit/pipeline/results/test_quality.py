"""The quality of a run's model, its gate, the short paths, and the summary that `vico run` ends with."""

import copy
import json
import os
from pathlib import Path

import pytest

from pipeline.config.quality_gate import QualityGate
from pipeline.results.latest import link_results, model_path
from pipeline.results.quality import quality_of, run_quality
from pipeline.results.run_summary import summary_lines
from pipeline.results.runs import Runs
from tests.finished_runs import finished_run

KEPT = Path(__file__).parents[4] / "docs" / "figures" / "quickstart" / "metrics.json"
METRICS = json.loads(KEPT.read_text())


def changed(**fields):
    """Return the kept metrics with fields of the calibrated point, or of the whole, changed."""
    metrics = copy.deepcopy(METRICS)
    for point in metrics["routed"]:
        if point.get("threshold") == metrics["absolute_threshold"]:
            point.update({name: value for name, value in fields.items() if name in point})
    metrics.update({name: value for name, value in fields.items() if name in metrics})
    return metrics


def test_the_quality_is_that_of_the_calibrated_point():
    quality = quality_of(METRICS)
    (point,) = [p for p in METRICS["routed"] if p["threshold"] == METRICS["absolute_threshold"]]
    assert quality.kept == point["quality_kept"] and quality.tokens_saved == point["tokens_saved"]
    assert quality.num_questions == METRICS["num_samples"]
    assert set(quality.leads) == {"random", "shuffled", "pixel_rule"}
    assert all(lead.is_certain for lead in quality.leads.values())


@pytest.mark.parametrize(
    "fields, gate, fault",
    [
        ({}, {}, None),
        ({"num_samples": 99}, {}, "measured on 99 test questions; quality_gate.min_questions is 100"),
        ({"num_samples": 99}, {"min_questions": 99}, None),
        ({"quality_kept": 0.8999}, {}, "keeps 0.900 of the quality; quality_gate.min_kept is 0.9"),
        ({"quality_kept": 0.5}, {"min_kept": 0.5}, None),
        ({"quality_kept": None}, {"min_kept": 0}, "quality not defined"),
    ],
)
def test_the_gate_asks_for_questions_and_quality(fields, gate, fault):
    faults = quality_of(changed(**fields)).faults(QualityGate(**gate))
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


def test_short_paths_lead_to_the_run_that_finished_last_and_move_with_the_storage(tmp_path):
    storage = tmp_path / "store"
    runs = [finished_run(storage, METRICS) for _ in range(2)]
    for run in runs:
        link_results(run, storage)
    assert model_path(runs[1], storage) == storage / "latest" / "model"
    assert model_path(runs[0], storage) == storage / "runs" / runs[0].run / "model"
    storage.rename(tmp_path / "moved")
    latest = tmp_path / "moved" / "latest"
    assert json.loads((latest / "model" / "config.json").read_text()) == {"of": runs[1].run}
    assert json.loads((latest / "evaluation" / "metrics.json").read_text()) == METRICS
    assert [run.run for run in Runs(tmp_path / "moved").all()] == [run.run for run in runs[::-1]]


def test_a_folder_called_latest_is_left_alone(tmp_path):
    run = finished_run(tmp_path, METRICS)
    (tmp_path / "latest").mkdir()
    link_results(run, tmp_path)
    assert not os.listdir(tmp_path / "latest")
    assert model_path(run, tmp_path) == tmp_path / "runs" / run.run / "model"


def test_the_summary_names_model_quality_controls_and_the_next_commands(tmp_path):
    run = finished_run(tmp_path, METRICS)
    link_results(run, tmp_path)
    lines = summary_lines(run, tmp_path, str(tmp_path))
    text = "\n".join(lines)
    kept = run_quality(run, tmp_path).kept
    assert lines[0] == f"model:    {tmp_path}/latest/model"
    assert f"keeps {kept:.3f} (95 % interval " in lines[1]
    assert lines[1].endswith(f", on {METRICS['num_samples']} test questions")
    assert lines[2].startswith("tokens:   saves ")
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line)
    assert "router:   beats every control" in text
    for command in ("vico route", "vico serve", f"vico export {run.run} OUT --layout flash --storage"):
        assert command in text
    assert "warning" not in text


def test_a_router_that_is_not_above_a_control_is_not_said_to_be(tmp_path):
    metrics = copy.deepcopy(METRICS)
    metrics["routed_minus"]["over_curve"]["pixel_rule"]["interval"] = [-0.01, 0.05]
    run = finished_run(tmp_path, metrics)
    assert "router:   does NOT beat every control" in "\n".join(summary_lines(run, tmp_path, str(tmp_path)))


def test_a_warning_says_that_the_model_is_no_candidate_or_was_accepted(tmp_path):
    run = finished_run(tmp_path, changed(num_samples=7), quality_gate={"min_questions": 8, "min_kept": 0.99})
    text = "\n".join(summary_lines(run, tmp_path, str(tmp_path)))
    assert "warning:  measured on 7 test questions" in text
    assert f"warning:  keeps {run_quality(run, tmp_path).kept:.3f} of the quality" in text
    assert "not the candidate" in text
    run.accepted = True
    assert "accepted with --accept" in "\n".join(summary_lines(run, tmp_path, str(tmp_path)))


def test_a_run_without_an_export_has_no_summary(tmp_path):
    run = finished_run(tmp_path, METRICS)
    run.stages["export"].state = "pending"
    assert summary_lines(run, tmp_path, str(tmp_path)) == []


def test_bounds_that_know_the_test_tiles_are_no_controls_and_fewer_tiles_are_one():
    lead = {"difference": -0.1, "interval": [-0.2, -0.05]}
    names = ("random", "fewer_tiles", "oracle", "blind_oracle", "seeing_oracle")
    metrics = {**METRICS, "routed_minus": {"over_curve": dict.fromkeys(names, lead)}}
    assert list(quality_of(metrics).leads) == ["random", "fewer_tiles"]
