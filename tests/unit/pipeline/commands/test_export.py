"""`vico export`: the content of the folder that it writes, and its errors for bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.identity.fingerprints import stage_fingerprint
from pipeline.results.records import Record, outputs_digest
from pipeline.results.runs import Runs
from pipeline.results.stage_folder import StageFolder
from pipeline.storage.output_files import move_to_superseded, new_superseded_folder
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model
from vico.errors import UserError

ROOT = Path(__file__).parents[4]
IDENTITY = {"code_version": 1, "config": {}, "inputs": {}}
STAGES = ("shard", "consistency", "ratio", "label", "router", "evaluate", "export")
THRESHOLD = 0.625
ENTRY = {
    "threshold": THRESHOLD,
    "share_compressed": 0.5,
    "tokens_saved": 0.25,
    "exact_match": 0.75,
    "similarity": 0.875,
    "quality_kept": 0.97,
}
METRICS = {
    "tokens_a_tile": {"full": 4, "compressed": 1},
    "num_samples": 12,
    "absolute_threshold": THRESHOLD,
    "intervals": {"level": 0.95, "resamples": 1000, "unit": "sample", "num_units": 10, "num_groups": 0},
    "reference": ENTRY,
    "full": ENTRY,
    "compressed": ENTRY,
    "routed": [ENTRY],
    "served": [{**ENTRY, "share_compressed": 0.4375}],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The storage of a run that is done, with what an export reads."""
    folder = tmp_path_factory.mktemp("finished")
    base = make_tiny_model(folder / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    storage = folder / "store"
    fingerprints = {name: stage_fingerprint(name, IDENTITY) for name in STAGES}
    config = {"inputs": {"model": str(base)}}
    runs = Runs(storage)
    run = runs.create(pipeline="p", fingerprints=fingerprints, experiment="e", config=config, site="s")
    output = {name: storage / name / fingerprints[name] / "output" for name in STAGES}
    for path in output.values():
        path.mkdir(parents=True)
    set_states(storage, dict.fromkeys(STAGES, "done"))
    manifest = {"written": 40, "shards": [{"sha256": "a"}]}
    (output["shard"] / "manifest.json").write_text(json.dumps(manifest))
    router = {"absolute_threshold": THRESHOLD, "auc": 0.9, "num_test": 30}
    (output["router"] / "metrics.json").write_text(json.dumps(router))
    (output["evaluate"] / "metrics.json").write_text(json.dumps(METRICS))
    model = load_model(base)
    model.add_compressed_connector(1)
    model.add_router(2)
    save_model(model.state_dict(), base, output["export"] / "model", {"absolute_threshold": THRESHOLD})
    for name in STAGES:
        record(storage, name, run.run)
    return storage, run.run, base


def record(storage, stage, run, attempt=1):
    """Write the record of the stage's output as that run would."""
    folder = StageFolder(storage, stage, stage_fingerprint(stage, IDENTITY))
    outputs = folder.outputs()
    Record(
        stage=stage,
        fingerprint=folder.fingerprint,
        identity=IDENTITY,
        attempt=attempt,
        run=run,
        git={},
        source_digest="",
        sources={},
        packages={},
        outputs=outputs,
        output_digest=outputs_digest(outputs),
        inputs={},
        counts={},
        seconds=1.0,
        started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T00:00:01+00:00",
        site="s",
        facts={},
    ).write(folder.record_path)
    return folder


def set_states(storage, states):
    [path] = storage.glob("runs/*/run.json")
    content = json.loads(path.read_text())
    for name, state in states.items():
        content["stages"][name] |= {"state": state, "attempt": 1}
    path.write_text(json.dumps(content))


@pytest.fixture
def copy(finished, tmp_path):
    storage, run, _ = finished
    shutil.copytree(storage, tmp_path / "store")
    return tmp_path / "store", run


def export(storage, run, out, layout="flash"):
    arguments = ["export", run, str(out), "--layout", layout, "--storage", str(storage)]
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("layout", ["flash", "hf"])
def test_the_folder_opens_as_the_model_of_the_run(finished, tmp_path, layout):
    storage, run, base = finished
    result = export(storage, run, tmp_path / "out", layout)
    assert result.exit_code == 0, result.exception
    [source] = storage.glob("export/*/output/model")
    expected, exported = load_model(source).state_dict(), load_model(tmp_path / "out").state_dict()
    assert exported.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config if layout == "flash" else config["vico"])[
        "flash_absolute_threshold" if layout == "flash" else "absolute_threshold"
    ] == THRESHOLD
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no partial folder is left


def test_the_card_names_run_licence_and_both_rules(finished, tmp_path):
    storage, run, _ = finished
    export(storage, run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (f"`{run}`", "apache-2.0", "`flash_absolute_threshold`", "**ours**", "**served**", "43.8%"):
        assert part in card


def test_a_run_that_is_not_done_is_refused(copy, tmp_path):
    storage, run = copy
    set_states(storage, {"evaluate": "failed"})
    with pytest.raises(UserError, match="its stage evaluate is failed"):
        raise export(storage, run, tmp_path / "out").exception
    assert not (tmp_path / "out").exists()


def test_missing_results_and_a_missing_start_model_are_named(copy, tmp_path):
    storage, run = copy
    [output] = storage.glob("router/*/output")
    (output / "metrics.json").unlink()
    assert "--force router" in str(export(storage, run, tmp_path / "out").exception)
    shutil.rmtree(output)
    assert f"{output} is gone" in str(export(storage, run, tmp_path / "out").exception)
    output.mkdir()
    [path] = storage.glob("runs/*/run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "config": {"inputs": {"model": "/gone"}}}))
    assert "inputs.model=/gone is gone" in str(export(storage, run, tmp_path / "out").exception)


def replace_result(storage, stage, change):
    """Replace a result as `--force` of another run does: supersede the old one, record changed files."""
    folder = StageFolder(storage, stage, stage_fingerprint(stage, IDENTITY))
    superseded = new_superseded_folder(folder.path)
    move_to_superseded(folder.path, superseded, ["output", "record.json"], [])
    shutil.copytree(superseded / "output", folder.output)
    change(folder.output)
    record(storage, stage, "another", attempt=2)
    return superseded


def test_a_stage_that_another_run_made_again_is_not_taken_for_this_runs(copy, tmp_path):
    storage, run = copy

    def other_threshold(output):
        path = output / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "absolute_threshold": 0.125}))

    superseded = replace_result(storage, "router", other_threshold)
    result = export(storage, run, tmp_path / "out")
    assert result.exit_code == 0, result.exception
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["flash_absolute_threshold"] == THRESHOLD, "the threshold of the run that was named"
    shutil.rmtree(superseded)
    error = str(export(storage, run, tmp_path / "again").exception)
    assert f"RUN={run}: what it made of router is gone" in error and "where run another has put" in error


def test_what_another_run_made_again_with_the_same_bytes_is_as_good(copy, tmp_path):
    storage, run = copy
    superseded = replace_result(storage, "export", lambda output: None)
    shutil.rmtree(superseded / "output")
    result = export(storage, run, tmp_path / "out")
    assert result.exit_code == 0, result.exception


def test_a_superseded_result_that_is_damaged_is_refused(copy, tmp_path):
    storage, run = copy
    superseded = replace_result(storage, "router", lambda output: (output / "more").write_text("x"))
    (superseded / "output" / "metrics.json").write_text("{}")
    error = str(export(storage, run, tmp_path / "out").exception)
    assert f"{superseded}/output/metrics.json is not what was recorded" in error
    assert "export that run" in error


def test_an_output_folder_that_exists_or_is_not_writable_is_refused(finished, tmp_path):
    storage, run, _ = finished
    (tmp_path / "there").mkdir()
    assert "there exists" in str(export(storage, run, tmp_path / "there").exception)
    assert "does not exist" in str(export(storage, run, tmp_path / "no" / "out").exception)
    long = tmp_path / ("o" * 250)  # the partial name beside it is too long
    assert "is not writable" in str(export(storage, run, long).exception)


def test_an_error_while_writing_leaves_no_folder(copy, tmp_path):
    storage, run = copy
    [weights] = storage.glob("export/*/output/model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    record(storage, "export", run)
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        raise export(storage, run, tmp_path / "out").exception
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_kill_while_writing_leaves_only_a_partial_folder(finished, tmp_path):
    storage, run, _ = finished
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipeline.cli", "export", run, str(out)]
    command += ["--layout", "flash", "--storage", str(storage)]
    with subprocess.Popen(command, cwd=ROOT) as exporter:
        while not any(tmp_path.iterdir()):
            assert exporter.poll() is None
        exporter.kill()
    assert not out.exists()
    [partial] = tmp_path.iterdir()
    assert partial.name.startswith(".out.partial-")
    assert export(storage, run, out).exit_code == 0
    assert load_model(out).router is not None
