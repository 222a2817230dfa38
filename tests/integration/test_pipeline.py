"""The whole pipeline on real Ray, DeepSpeed and MLflow: what it writes, reuse, kill -9 in training."""

import json
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from stages.parts import Parts
from stages.training.metrics import read_metrics
from tests.integration.demo_pipeline import (
    STAGES,
    answer,
    finished,
    kill_with_children,
    vico,
    wait_until,
)
from vico.checkpoints import load_model


def read_json(path: Path):
    return json.loads(path.read_text())


def test_shards_account_for_every_row(outputs):
    manifest = read_json(outputs["shard"] / "manifest.json")
    assert manifest["read"] == manifest["written"] + manifest["quarantined"] == 96
    index = pq.read_table(outputs["shard"] / "index.parquet")
    assert len(index) == manifest["written"]
    assert set(index["split"].to_pylist()) == {"train", "calib", "test"}


def test_ratios_have_a_row_for_every_tile(outputs):
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


def test_labels_compress_what_lies_at_or_below_tau(outputs):
    rows = pq.read_table(outputs["label"] / "labels.parquet").to_pylist()
    assert all(row["label"] == int(row["ratio"] > row["tau"]) for row in rows)
    train = [row["label"] for row in rows if row["split"] == "train"]
    assert 0.3 < sum(train) / len(train) < 0.7  # the 50th percentile of a sliding window


def test_router_metrics_are_those_of_its_scores(outputs):
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


def test_the_export_holds_policy_and_router(outputs):
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


def tracked(storage: Path, run: str) -> dict:
    """MLflow runs of a run of ours by stage (`pipeline`: the parent), and a client to ask about them."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`vico.run` = '{run}'")
    return {"client": client, **{one.data.tags["vico.stage"]: one for one in found}}


def test_mlflow_has_one_run_with_a_child_for_every_stage(pipeline, outputs):
    _, _, run = pipeline
    runs = tracked(Path(run["storage"]), run["run"])
    client, parent = runs.pop("client"), runs.pop("pipeline")
    assert set(runs) == set(STAGES)
    assert {one.info.status for one in [parent, *runs.values()]} == {"FINISHED"}
    assert {one.data.tags["mlflow.parentRunId"] for one in runs.values()} == {parent.info.run_id}
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
    version = client.get_model_version_by_alias("test", "candidate")
    assert (version.run_id, version.tags["vico.run"]) == (runs["export"].info.run_id, run["run"])
    assert version.tags["vico.uri"] == (outputs["export"] / "model").as_uri()


def test_a_second_run_reuses_everything_within_seconds(pipeline):
    config, site, run = pipeline
    started = time.monotonic()
    again = answer("run", config, "--site", site)
    assert time.monotonic() - started < 15
    assert again["run"] == run["run"]
    status = answer("status", run["run"], "--site", site)
    assert all(stage["reused"] for stage in status["stages"])


def test_kill_minus_9_in_training_then_the_same_command_gives_the_same_policy(pipeline, outputs, tmp_path):
    config, _, _ = pipeline
    storage = tmp_path / "runs"
    shutil.copytree(
        Path(outputs["shard"]).parents[1], storage / "shard"
    )  # sharding is not what is tested here
    command = [
        "run",
        config,
        "--storage",
        storage,
        "--site",
        config.parent / "site.yaml",
        "--until",
        "consistency",
    ]
    driver = vico(*command, start_new_session=True)

    def past_a_checkpoint() -> bool:
        reports = list(storage.glob("consistency/*/attempts/*/metrics.jsonl"))
        steps = list(storage.glob("consistency/*/output/checkpoints/step-*"))
        return bool(reports and steps) and len(reports[0].read_text().splitlines()) >= 5

    wait_until(past_a_checkpoint, 200, driver)
    kill_with_children(driver)
    stage = next((storage / "consistency").iterdir())
    assert not (stage / "record.json").exists()
    left = [
        path.name for path in (stage / "output" / "checkpoints").iterdir() if path.name.startswith("step-")
    ]
    assert left

    code, _, err = finished(vico(*command))
    assert code == 0, err[-3000:]
    again = stage / "output" / "policy" / "model.safetensors"
    undisturbed = outputs["consistency"] / "policy" / "model.safetensors"
    assert again.read_bytes() == undisturbed.read_bytes()
    log = "".join(path.read_text() for path in stage.glob("attempts/*/rank-0.log"))
    assert "goes on from step" in log
    assert [step for step, _ in read_metrics(Parts(stage, 1))] == list(range(1, 11))
    [killed] = answer("status", "--storage", storage)
    runs = tracked(storage, killed["run"])
    losses = runs["client"].get_metric_history(runs["consistency"].info.run_id, "loss")
    assert sorted(metric.step for metric in losses) == list(
        range(1, 11)
    )  # each step once, over both attempts


@pytest.mark.slow
def test_updates_measured_before_the_training_are_told_and_change_nothing(pipeline, outputs, tmp_path):
    config, _, _ = pipeline
    storage, site = tmp_path / "runs", tmp_path / "site.yaml"
    shutil.copytree(Path(outputs["shard"]).parents[1], storage / "shard")
    settings = yaml.safe_load((config.parent / "site.yaml").read_text())
    settings["train"]["throughput_steps"] = 2
    site.write_text(yaml.safe_dump(settings))
    code, out, err = finished(
        vico("run", config, "--storage", storage, "--site", site, "--until", "consistency")
    )
    assert code == 0, err[-3000:]
    assert "consistency: measured over 2 updates" in out and "all 10 updates with validation" in out
    undisturbed = outputs["consistency"]
    [stage] = (storage / "consistency").iterdir()
    assert stage.name == undisturbed.parent.name  # nothing of it enters the fingerprint
    weights = stage / "output" / "policy" / "model.safetensors"
    assert weights.read_bytes() == (undisturbed / "policy" / "model.safetensors").read_bytes()
    [run] = answer("status", "--storage", storage)
    metrics = tracked(storage, run["run"])["consistency"].data.metrics
    assert metrics["throughput_tokens_per_second"] > 0
    assert metrics["throughput_peak_memory_bytes"] > 1e8
