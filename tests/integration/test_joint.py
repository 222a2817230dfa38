"""The joint stages on real Ray, DeepSpeed and MLflow, killed in the middle: results, lineage, commands."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.integration.demo_pipeline import STAGES, answer, finished, vico
from tests.integration.test_pipeline import mlflow_client, mlflow_runs, read_json
from vico.checkpoints import load_model

JOINT = ["joint_rates", "joint_consistency", "joint_ratio", "joint_label", "joint_router"]
OPTIONS = ["--set", "joint={consistency: {random_share: 0.0}, router: {max_steps: 6}}"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(pipeline) -> list[Any]:
    config, site, _ = pipeline
    return ["run", config, "--site", site, *OPTIONS]


def with_first_stages(outputs: dict[str, Path], storage: Path) -> Path:
    """Copy the stages that a run with joint reuses."""
    for stage in STAGES[:5]:
        shutil.copytree(outputs[stage].parents[1], storage / stage)
    return storage


@pytest.fixture(scope="module")
def joint(command, outputs, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Run with joint; its driver is killed in the middle of the rates and of the training. Return its storage
    and status."""
    storage = with_first_stages(outputs, tmp_path_factory.mktemp("joint") / "runs")
    for stage in ("joint_rates", "joint_consistency"):
        process = vico(*command, "--storage", storage, dies=f"middle:{stage}")
        code, _, errors = finished(process)
        assert code == -signal.SIGKILL, (stage, errors[-3000:])
    answer(*command, "--storage", storage)
    return storage, answer("status", "latest", "--storage", storage)


@pytest.fixture(scope="module")
def folders(joint) -> dict[str, Path]:
    return {stage["name"]: Path(stage["path"]) for stage in joint[1]["stages"]}


def test_the_run_has_the_joint_stages_and_reuses_the_first_ones(joint):
    stages = joint[1]["stages"]
    assert [stage["name"] for stage in stages] == [*STAGES[:5], *JOINT, "evaluate", "export"]
    assert {stage["state"] for stage in stages} == {"done"}
    reused = [stage["name"] for stage in stages if stage["reused"]]
    assert reused == [*STAGES[:5], "joint_rates"], "the command before the last one had finished the rates"


def test_a_kill_in_the_middle_leaves_the_bytes_of_an_undisturbed_run(command, outputs, folders, tmp_path):
    storage = with_first_stages(outputs, tmp_path / "runs")
    answer(*command, "--storage", storage, "--until", "joint_consistency")
    for files_of in ("joint_rates/*.json", "joint_rates/parts/*", "joint_consistency/policy/*"):
        stage, _, pattern = files_of.partition("/")
        (undisturbed,) = storage.glob(f"{stage}/*/output")
        files = {path.relative_to(undisturbed) for path in undisturbed.glob(pattern)}
        assert files
        for name in files:
            assert (folders[stage] / name).read_bytes() == (undisturbed / name).read_bytes(), name
    attempts = folders["joint_consistency"].parent / "attempts"
    log = (attempts / "2" / "driver.log").read_text()
    assert "attempt 2 (unfinished: resumes from attempt 1)" in log


def test_tiles_train_at_the_rates_that_the_router_chooses_at_its_threshold(joint, folders):
    storage, status = joint
    threshold = read_json(folders["router"] / "metrics.json")["absolute_threshold"]
    tables = [pq.read_table(path) for path in sorted((folders["joint_rates"] / "parts").glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    routed: dict[str, list[bool]] = {}
    for row in rows:
        routed.setdefault(row["key"], []).append(row["p_compress"] >= np.float32(threshold))
    metrics = read_json(folders["joint_rates"] / "metrics.json")
    decisions = [flag for flags in routed.values() for flag in flags]
    assert metrics["tiles"] == len(decisions)
    assert metrics["share_compressed"] == pytest.approx(np.mean(decisions))
    assert 0 < np.mean(decisions) < 1
    for step in (1, 10):
        uses = answer("audit", status["run"], "--step", step, "--storage", storage)["stages"]
        assert uses["joint_consistency"]
        for use in uses["joint_consistency"]:
            assert use["compressed"] == routed.get(use["key"], [])


def test_the_model_is_the_joint_policy_with_the_second_router(joint, folders, tmp_path):
    storage, status = joint
    out = tmp_path / "exported"
    code, _, errors = finished(vico("export", status["run"], out, "--layout", "hf", "--storage", storage))
    assert code == 0, errors[-3000:]
    policy = load_file(folders["joint_consistency"] / "policy" / "model.safetensors")
    router = load_file(folders["joint_router"] / "router.safetensors")
    first = load_file(folders["consistency"] / "policy" / "model.safetensors")
    assert not all(torch.equal(policy[name], first[name]) for name in policy)
    threshold = read_json(folders["joint_router"] / "metrics.json")["absolute_threshold"]
    for folder in (folders["export"] / "model", out):
        tensors = load_model(folder).state_dict()
        assert all(
            torch.equal(tensors[name if name in tensors else f"base.{name}"], policy[name]) for name in policy
        )
        assert all(torch.equal(tensors[name], router[name]) for name in router)
        config = read_json(folder / "config.json")
        assert config["vico"]["absolute_threshold"] == pytest.approx(threshold)


def test_the_audit_follows_the_joint_stages_to_the_evaluation(joint, folders):
    storage, status = joint
    findings = answer("audit", status["run"], "--storage", storage)
    assert findings["problems"] == []
    record = read_json(folders["evaluate"].parent / "record.json")
    assert {"joint_consistency", "joint_label", "joint_router"} <= record["identity"]["inputs"].keys()
    assert not {"consistency", "label", "router"} & record["identity"]["inputs"].keys()
    labels = pq.read_table(folders["joint_label"] / "labels.parquet", filters=[("split", "=", "train")])
    key = labels["key"][0]
    sample = answer("audit", status["run"], "--sample", key, "--storage", storage)
    assert {use["stage"] for use in sample["uses"]} >= {"consistency", "joint_consistency"}
    assert len(sample["labels"]) == len(sample["joint_labels"]) == sum(sample["tiles"])
    assert sample["ratios"] != sample["joint_ratios"]


def test_labels_of_the_joint_policy_are_made_from_its_losses(folders):
    from stages.losses_policy import policy_digest

    for prefix in ("", "joint_"):
        digest = policy_digest(folders[f"{prefix}consistency"] / "policy")
        for stage, name in (("ratio", "ratios.parquet"), ("label", "labels.parquet")):
            metadata = pq.read_schema(folders[f"{prefix}{stage}"] / name).metadata
            assert metadata[b"vico.policy"].decode() == digest


def test_plan_gc_and_reproduce_know_the_joint_stages(joint, command, tmp_path):
    storage, status = joint
    options = [*command[1:], "--storage", storage]
    assert {row["action"] for row in answer("plan", *options)} == {"reuse"}
    forced = {row["stage"]: row["action"] for row in answer("plan", *options, "--force", "joint_label")}
    rerun = {stage for stage, action in forced.items() if action == "run"}
    assert rerun == {"joint_label", "joint_router", "evaluate", "export"}
    removed = answer("gc", "--dry-run", "--storage", storage)["removed"]
    assert [piece for piece in removed if "joint" in json.dumps(piece)] == []
    recipe = answer("reproduce", status["run"], "--out", tmp_path / "again.yaml", "--storage", storage)
    assert not [note for note in recipe["notes"] if "fingerprint" in note or "cannot run" in note]


def test_mlflow_has_a_run_for_each_joint_stage(joint):
    storage, status = joint
    runs = mlflow_runs(mlflow_client(storage), status["run"])
    assert set(JOINT) <= set(runs)
    assert runs["joint_consistency"].data.params["random_share"] == "0.0"
    assert runs["joint_consistency"].data.metrics["loss"] > 0
    assert runs["joint_router"].data.params["max_steps"] == "6"
    assert runs["pipeline"].data.params["joint.router.max_steps"] == "6"
