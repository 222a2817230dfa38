"""Which samples made a step and where a sample was used, held against what the training itself measured."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import yaml

from stages.parts import Parts
from stages.training.metrics import read_metrics
from tests.integration.demo_pipeline import answer, finished, vico


@pytest.fixture(scope="module")
def ask(pipeline):
    _, site, run = pipeline
    return lambda *options: answer("audit", run["run"], *options, "--site", site)


def test_the_samples_of_a_step_are_those_that_the_training_counted(ask, outputs):
    index = {row["key"]: row for row in pq.read_table(outputs["shard"] / "index.parquet").to_pylist()}
    measured = dict(read_metrics(Parts(outputs["consistency"].parent, 1)))
    for step in (1, 9):
        uses = ask("--step", step)["stages"]["consistency"]
        rates = [rate for use in uses for rate in use["compressed"]]
        assert len(uses) == measured[step]["samples"]
        assert len(rates) == measured[step]["tiles"]
        assert sum(rates) / len(rates) == pytest.approx(measured[step]["share_compressed"])
        assert {index[use["key"]]["split"] for use in uses} == {"train"}
        tokens = sum(index[use["key"]]["text_tokens"] + 4 * len(use["compressed"]) for use in uses)
        assert tokens == measured[step]["reference_tokens"]


def test_a_sample_is_found_in_its_steps_packs_and_ratios(ask, outputs):
    of_step = ask("--step", 2)["stages"]
    key = of_step["router"][0]["key"]
    found = ask("--sample", key)
    assert found["split"] == "train"
    for stage, uses in of_step.items():
        here = [use for use in uses if use["key"] == key]
        there = [use for use in found["uses"] if (use["stage"], use["step"]) == (stage, 2)]
        assert [(use["pack"], use["compressed"]) for use in here] == [
            (use["pack"], use["compressed"]) for use in there
        ]
    assert any(use["stage"] == "router" and use["step"] == 2 for use in found["uses"])
    ratios = pq.read_table(outputs["ratio"] / "ratios.parquet", filters=[("key", "=", key)]).to_pylist()
    assert [one["ratio"] for one in found["ratios"]] == [row["ratio"] for row in ratios]
    assert len(found["ratios"]) == len(found["labels"]) == sum(found["tiles"])


def test_the_samples_of_a_step_are_known_where_the_training_failed(ask, pipeline, tmp_path):
    """Then they are asked for: a loss that is no number names its step, and this its samples."""
    _, site, run = pipeline
    content = yaml.safe_load(site.read_text())
    storage = shutil.copytree(content["storage"], tmp_path / "runs")
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**content, "storage": str(storage)}))
    for stage in ("consistency", "router"):
        (record,) = storage.glob(f"{stage}/*/record.json")
        record.unlink()
    file = storage / "runs" / run["run"] / "run.json"
    kept = json.loads(file.read_text())
    kept["state"] = kept["stages"]["consistency"]["state"] = "failed"
    kept["stages"]["router"] |= {"state": "pending", "attempt": 0}
    file.write_text(json.dumps(kept))
    found = answer("audit", run["run"], "--step", 2, "--site", tmp_path / "site.yaml")
    assert found["stages"] == {"consistency": ask("--step", 2)["stages"]["consistency"]}


def test_a_sample_of_the_test_split_was_never_trained_on(ask, outputs):
    index = pq.read_table(outputs["shard"] / "index.parquet").to_pylist()
    key = next(row["key"] for row in index if row["split"] == "test" and row["num_tiles"])
    found = ask("--sample", key)
    assert found["uses"] == [] and found["ratios"]


@pytest.mark.parametrize(
    "options, words",
    [
        (("--sample", "no-such-key"), "--sample no-such-key: no shard of run"),
        (("--step", "11"), "have at most 10 steps"),
        (("--step", "1", "--sample", "a"), "ask one at a time"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(pipeline, options, words):
    _, site, run = pipeline
    code, _, errors = finished(vico("audit", run["run"], *options, "--site", site))
    assert code == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert words in line


def test_the_report_is_in_mlflow_as_json_and_markdown(pipeline, outputs):
    from mlflow import MlflowClient

    _, site, run = pipeline
    found = answer("audit", run["run"], "--site", site)
    assert found["ok"]
    client = MlflowClient(f"sqlite:///{run['storage']}/mlflow.db")
    (parent,) = client.search_runs(
        [one.experiment_id for one in client.search_experiments()],
        f"tags.`vico.run` = '{run['run']}' and tags.`vico.stage` = 'pipeline'",
    )
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "audit")] == [
        "audit/audit.json",
        "audit/audit.md",
    ]
    from mlflow.artifacts import load_dict, load_text

    logged = load_dict(f"{parent.info.artifact_uri}/audit/audit.json")
    assert (logged["run"], logged["checked"]) == (run["run"], json.loads(json.dumps(found["checked"])))
    assert "Everything recorded holds." in load_text(f"{parent.info.artifact_uri}/audit/audit.md")
