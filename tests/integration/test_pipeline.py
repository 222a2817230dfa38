"""The whole pipeline on real Ray, DeepSpeed and MLflow: what it writes, reuse, kill -9 in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from stages.parts import Parts
from stages.training.metrics import read_metrics
from tests.integration.demo_pipeline import STAGES, answer, finished, kill_with_children, vico
from tests.table_readers import assert_opens_everywhere
from tests.waiting import wait_until
from vico.checkpoints import load_model

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_shards_account_for_every_row(outputs):
    manifest = read_json(outputs["shard"] / "manifest.json")
    assert manifest["read"] == manifest["written"] + manifest["quarantined"] == 96
    index = pq.read_table(outputs["shard"] / "index.parquet")
    assert len(index) == manifest["written"]
    assert set(index["split"].to_pylist()) == {"train", "calib", "test"}


def test_every_table_opens_in_pandas_polars_and_duckdb(outputs):
    tables = [path for folder in outputs.values() for path in folder.rglob("*.parquet")]
    assert {path.name for path in tables} >= {
        "index.parquet",
        "ratios.parquet",
        "labels.parquet",
        "scores.parquet",
        "predictions.parquet",
        "tiles.parquet",
        "curve.parquet",
    }
    assert all(assert_opens_everywhere(path) for path in tables), "no table is empty"


def test_ratios_have_one_row_per_tile(outputs):
    index = pq.read_table(outputs["shard"] / "index.parquet").to_pylist()
    ratios = pq.read_table(outputs["ratio"] / "ratios.parquet")
    expected = {
        (row["key"], image, tile)
        for row in index
        for image, count in enumerate(row["tiles"])
        for tile in range(count)
    }
    rows = ratios.to_pylist()
    assert {(row["key"], row["image"], row["tile"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        floored = (row["loss_compressed"] + 1e-2) / (row["loss_full"] + 1e-2)
        assert row["ratio"] == pytest.approx(floored, rel=1e-6)


def test_tiles_at_or_below_tau_are_labelled_compress(outputs):
    rows = pq.read_table(outputs["label"] / "labels.parquet").to_pylist()
    assert all(row["label"] == int(row["ratio"] > row["tau"]) for row in rows)
    train = [row["label"] for row in rows if row["split"] == "train"]
    assert 0.3 < sum(train) / len(train) < 0.7  # the 50th percentile of a sliding window


def test_router_metrics_follow_from_the_scores(outputs):
    metrics = read_json(outputs["router"] / "metrics.json")
    scores = pq.read_table(outputs["router"] / "scores.parquet").to_pylist()
    assert metrics["num_calib"] == sum(row["split"] == "calib" for row in scores)
    test = [row for row in scores if row["split"] == "test"]
    assert metrics["num_test"] == len(test)
    positives = [1 - row["p_compress"] for row in test if row["label"] == 1]
    negatives = [1 - row["p_compress"] for row in test if row["label"] == 0]
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert metrics["auc"] == pytest.approx(wins / (len(positives) * len(negatives)))


def test_evaluation_counts_tokens_exactly(outputs):
    metrics = read_json(outputs["evaluate"] / "metrics.json")
    index = pq.read_table(outputs["shard"] / "index.parquet").to_pylist()
    num_tiles = sum(row["num_tiles"] for row in index if row["split"] == "test")
    assert metrics["full"]["visual_tokens"] == metrics["reference"]["visual_tokens"] == 4 * num_tiles
    assert metrics["compressed"]["visual_tokens"] == num_tiles
    assert metrics["compressed"]["tokens_saved"] == pytest.approx(0.75)
    assert metrics["reference"]["kl"] == 0
    for entry in metrics["routed"] + metrics["random"]:
        assert entry["tokens_saved"] == pytest.approx(0.75 * entry["share_compressed"])
    assert (outputs["evaluate"] / "figures" / "quality_against_tokens.png").stat().st_size > 10_000


def test_the_exported_model_has_policy_and_router(outputs):
    exported = load_model(outputs["export"] / "model")
    policy = load_file(outputs["consistency"] / "policy" / "model.safetensors")
    tensors = exported.state_dict()
    assert all(
        torch.equal(tensors[name if name in tensors else f"base.{name}"], policy[name]) for name in policy
    )
    router = load_file(outputs["router"] / "router.safetensors")
    assert all(torch.equal(tensors[name], router[name]) for name in router)
    config = read_json(outputs["export"] / "model" / "config.json")
    threshold = read_json(outputs["router"] / "metrics.json")["absolute_threshold"]
    assert config["vico"]["absolute_threshold"] == pytest.approx(threshold)


def mlflow_client(storage: Path) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{storage}/mlflow.db")


def mlflow_runs(client: MlflowClient, run: str) -> dict[str, Run]:
    """Return the MLflow runs of a run by stage; the parent run is named `pipeline`."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`vico.run` = '{run}'")
    return {mlflow_run.data.tags["vico.stage"]: mlflow_run for mlflow_run in runs}


def test_mlflow_has_one_run_with_one_child_per_stage(pipeline, outputs):
    _, _, run = pipeline
    client = mlflow_client(Path(run["storage"]))
    runs = mlflow_runs(client, run["run"])
    parent = runs.pop("pipeline")
    assert set(runs) == set(STAGES)
    assert {mlflow_run.info.status for mlflow_run in [parent, *runs.values()]} == {"FINISHED"}
    parents = {mlflow_run.data.tags["mlflow.parentRunId"] for mlflow_run in runs.values()}
    assert parents == {parent.info.run_id}
    assert runs["consistency"].data.params["packs_per_step"] == "2"
    assert runs["consistency"].inputs.dataset_inputs
    losses = client.get_metric_history(runs["consistency"].info.run_id, "loss")
    assert sorted(metric.step for metric in losses) == list(range(1, 11))
    logged = dict(read_metrics(Parts(outputs["consistency"].parent, 1)))
    assert all(metric.value == logged[metric.step]["loss"] for metric in losses)
    figures = [file.path for file in client.list_artifacts(runs["evaluate"].info.run_id, "figures")]
    tables = [file.path for file in client.list_artifacts(runs["evaluate"].info.run_id, "tables")]
    assert "tables/table.md" in tables
    assert "figures/quality_against_tokens.png" in figures
    [version] = client.search_model_versions("name = 'test'")
    assert (version.run_id, version.tags["vico.run"]) == (runs["export"].info.run_id, run["run"])
    assert version.tags["vico.uri"] == (outputs["export"] / "model").as_uri()


def test_a_second_run_reuses_everything_and_imports_nothing_heavy(pipeline):
    config, site, run = pipeline
    attempts = sorted(Path(run["storage"]).glob("*/*/attempts/*"))
    code, out, err = finished(
        vico("run", config, "--site", site, "--json", extra_environment={"PYTHONPROFILEIMPORTTIME": "1"})
    )
    assert code == 0, err[-3000:]
    assert json.loads(out.splitlines()[-1])["run"] == run["run"]
    assert sorted(Path(run["storage"]).glob("*/*/attempts/*")) == attempts
    profile = [line for line in err.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in profile}
    assert "pipeline.running.driver" in imported
    assert not imported & {"torch", "ray", "transformers", "deepspeed", "mlflow"}
    status = answer("status", run["run"], "--site", site)
    assert all(stage["reused"] for stage in status["stages"])


def test_a_run_ends_with_its_model_its_quality_and_what_to_do_next(pipeline, outputs):
    config, site, run = pipeline
    code, out, err = finished(vico("run", config, "--site", site))
    assert code == 0, err[-3000:]
    lines = out.splitlines()
    model = Path(run["storage"], "latest", "model")
    assert f"model:    {model}" in lines
    assert model.samefile(outputs["export"] / "model") and load_model(model).router is not None
    num_questions = read_json(outputs["evaluate"] / "metrics.json")["num_samples"]
    (warning,) = [line for line in lines if "min_questions" in line]
    assert f"measured on {num_questions} test questions;" in warning
    assert "router:   not compared with any control" in lines  # the random model answers nothing right
    (exported,) = [line for line in lines if "vico export" in line]
    assert f"vico export {run['run']} OUT --layout flash --storage {run['storage']}" in exported


def test_a_model_below_the_gate_is_no_candidate_until_it_is_accepted(pipeline):
    from mlflow.exceptions import MlflowException

    config, site, run = pipeline
    client = mlflow_client(Path(run["storage"]))
    with pytest.raises(MlflowException, match="candidate"):
        client.get_model_version_by_alias("test", "candidate")
    for _ in range(2):
        code, out, err = finished(vico("run", config, "--site", site, "--accept"))
        assert code == 0, err[-3000:]
        assert "accepted with --accept" in out
        version = client.get_model_version_by_alias("test", "candidate")
        assert version.tags["vico.run"] == run["run"]
    assert len(client.search_model_versions("name = 'test'")) == 1


@pytest.mark.slow  # two trainings; test_training_resume.py kills ranks, test_runner_crash.py drivers
def test_after_a_kill_in_training_the_same_command_gives_the_same_policy(pipeline, outputs, tmp_path):
    config, site, _ = pipeline
    storage = tmp_path / "runs"
    shutil.copytree(outputs["shard"].parents[1], storage / "shard")  # this test is not about sharding
    command = ["run", config, "--storage", storage, "--site", site, "--until", "consistency"]
    driver = vico(*command, start_new_session=True)

    def past_a_checkpoint() -> bool:
        reports = list(storage.glob("consistency/*/attempts/*/metrics.jsonl"))
        steps = list(storage.glob("consistency/*/output/checkpoints/step-*"))
        return bool(reports and steps) and len(reports[0].read_text().splitlines()) >= 5

    wait_until(past_a_checkpoint, driver)
    kill_with_children(driver)
    stage = next((storage / "consistency").iterdir())
    assert not (stage / "record.json").exists()
    assert list((stage / "output" / "checkpoints").glob("step-*"))

    code, _, err = finished(vico(*command))
    assert code == 0, err[-3000:]
    policy = Path("policy", "model.safetensors")
    assert (stage / "output" / policy).read_bytes() == (outputs["consistency"] / policy).read_bytes()
    log = "".join(path.read_text() for path in stage.glob("attempts/*/rank-0.log"))
    assert "resuming from step" in log
    assert [step for step, _ in read_metrics(Parts(stage, 1))] == list(range(1, 11))
    [killed] = answer("status", "--storage", storage)
    client = mlflow_client(storage)
    run_id = mlflow_runs(client, killed["run"])["consistency"].info.run_id
    steps = sorted(metric.step for metric in client.get_metric_history(run_id, "loss"))
    assert steps == list(range(1, 11)), "each step once, over both attempts"


@pytest.mark.slow
def test_updates_measured_before_the_training_are_reported_and_change_nothing(pipeline, outputs, tmp_path):
    config, site_file, _ = pipeline
    storage, site = tmp_path / "runs", tmp_path / "site.yaml"
    shutil.copytree(outputs["shard"].parents[1], storage / "shard")
    settings = yaml.safe_load(site_file.read_text())
    settings["train"]["profiling"] = {"throughput_steps": 2}
    site.write_text(yaml.safe_dump(settings))
    code, out, err = finished(
        vico("run", config, "--storage", storage, "--site", site, "--until", "consistency")
    )
    assert code == 0, err[-3000:]
    assert "consistency: measured over 2 updates" in out and "all 10 updates with validation" in out
    undisturbed = outputs["consistency"]
    [stage] = (storage / "consistency").iterdir()
    assert stage.name == undisturbed.parent.name, "the fingerprint moved"
    weights = stage / "output" / "policy" / "model.safetensors"
    assert weights.read_bytes() == (undisturbed / "policy" / "model.safetensors").read_bytes()
    [run] = answer("status", "--storage", storage)
    metrics = mlflow_runs(mlflow_client(storage), run["run"])["consistency"].data.metrics
    assert metrics["throughput_tokens_per_second"] > 0
    assert metrics["throughput_peak_memory_bytes"] > 1e8
