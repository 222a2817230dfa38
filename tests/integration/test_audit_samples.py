"""The samples of a step and the uses of a sample, compared with what the training itself measured."""

import json
import shutil
import subprocess
import sys

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
    sample = ask("--sample", key)
    assert sample["split"] == "train"
    for stage, uses in of_step.items():
        here = [use for use in uses if use["key"] == key]
        there = [use for use in sample["uses"] if (use["stage"], use["step"]) == (stage, 2)]
        assert [(use["pack"], use["compressed"]) for use in here] == [
            (use["pack"], use["compressed"]) for use in there
        ]
    assert any(use["stage"] == "router" and use["step"] == 2 for use in sample["uses"])
    ratios = pq.read_table(outputs["ratio"] / "ratios.parquet", filters=[("key", "=", key)]).to_pylist()
    assert [row["ratio"] for row in sample["ratios"]] == [row["ratio"] for row in ratios]
    assert len(sample["ratios"]) == len(sample["labels"]) == sum(sample["tiles"])


def test_the_samples_of_a_step_are_known_when_the_training_failed(ask, pipeline, tmp_path):
    """That is when they are needed: the error of a non-finite loss names the step, the audit its samples."""
    _, site, run = pipeline
    content = yaml.safe_load(site.read_text())
    storage = shutil.copytree(content["storage"], tmp_path / "runs")
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**content, "storage": str(storage)}))
    for stage in ("consistency", "router"):
        (record,) = storage.glob(f"{stage}/*/record.json")
        record.unlink()
    file = storage / "runs" / run["run"] / "run.json"
    run_file = json.loads(file.read_text())
    run_file["state"] = run_file["stages"]["consistency"]["state"] = "failed"
    run_file["stages"]["router"] |= {"state": "pending", "attempt": 0}
    file.write_text(json.dumps(run_file))
    of_step = answer("audit", run["run"], "--step", 2, "--site", tmp_path / "site.yaml")
    assert of_step["stages"] == {"consistency": ask("--step", 2)["stages"]["consistency"]}


LIST_SAMPLES = """
import sys
from pathlib import Path
from cluster.site_files import load_site
from pipeline.audit.samples import RunSamples
stages = RunSamples(load_site(Path(sys.argv[1])), sys.argv[2]).step(2)["stages"]
print(sorted(stages), "deepspeed" in sys.modules)
"""


def test_the_samples_of_a_step_are_listed_without_importing_deepspeed(pipeline):
    _, site, run = pipeline
    command = [sys.executable, "-c", LIST_SAMPLES, str(site), run["run"]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['consistency', 'router'] False"


def test_a_sample_of_the_test_split_was_never_trained_on(ask, outputs):
    index = pq.read_table(outputs["shard"] / "index.parquet").to_pylist()
    key = next(row["key"] for row in index if row["split"] == "test" and row["num_tiles"])
    sample = ask("--sample", key)
    assert sample["uses"] == [] and sample["ratios"]


@pytest.mark.parametrize(
    "options, words",
    [
        (("--sample", "no-such-key"), "--sample no-such-key: no shard of run"),
        (("--step", "11"), "have at most 10 steps"),
        (("--step", "1", "--sample", "a"), "ask one at a time"),
    ],
)
def test_an_unknown_sample_or_step_is_an_error_of_one_line(pipeline, options, words):
    _, site, run = pipeline
    code, _, errors = finished(vico("audit", run["run"], *options, "--site", site))
    assert code == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert words in line


def test_the_report_is_in_mlflow_as_json_and_markdown(pipeline, outputs):
    from mlflow import MlflowClient

    _, site, run = pipeline
    findings = answer("audit", run["run"], "--site", site)
    assert findings["ok"]
    client = MlflowClient(f"sqlite:///{run['storage']}/mlflow.db")
    (parent,) = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()],
        f"tags.`vico.run` = '{run['run']}' and tags.`vico.stage` = 'pipeline'",
    )
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "audit")] == [
        "audit/audit.json",
        "audit/audit.md",
    ]
    from mlflow.artifacts import load_dict, load_text

    logged = load_dict(f"{parent.info.artifact_uri}/audit/audit.json")
    assert (logged["run"], logged["checked"]) == (run["run"], json.loads(json.dumps(findings["checked"])))
    assert "Everything recorded holds." in load_text(f"{parent.info.artifact_uri}/audit/audit.md")
