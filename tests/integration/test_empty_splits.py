"""Splits without pictures end a run right after sharding, or before anything starts, not after a training."""

import json

import pytest
import yaml

from tests.integration.demo_pipeline import answer, finished, vico
from tests.record_files import picture, row, write_lines, write_meta
from tests.tiny_model import make_tiny_model


@pytest.fixture
def project(tmp_path):
    """Return a function: rows -> arguments for a run on them. The pictures 0.png to 5.png exist."""
    make_tiny_model(tmp_path / "model")
    meta = write_meta(tmp_path / "records", mine={})
    for n in range(6):
        (tmp_path / "records" / "images" / f"{n}.png").write_bytes(picture(n))
    site = {
        "name": "test",
        "storage": str(tmp_path / "runs"),
        "tracking": {"enabled": False},
        "resources": {"workers": 1},
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    inputs = {"records": {"format": "internvl", "path": str(meta)}, "model": str(tmp_path / "model")}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"inputs": inputs}))

    def arguments(rows):
        write_lines(tmp_path / "records" / "mine.jsonl", rows)
        return (tmp_path / "pipeline.yaml", "--site", tmp_path / "site.yaml")

    return arguments


def stages_begun(folder):
    return sorted(path.name for path in (folder / "runs").iterdir() if list(path.glob("*/attempts")))


@pytest.mark.slow
def test_a_run_on_rows_without_pictures_ends_after_sharding(project, tmp_path):
    where = project([row(answer=str(n)) for n in range(40)])
    code, _, err = finished(vico("run", *where))
    assert code == 2 and "Traceback" not in err
    assert "consistency needs train samples with a picture and an answer" in err
    assert "no row has a picture: give inputs.records with pictures" in err
    assert stages_begun(tmp_path) == ["shard"]
    status = answer("status", "latest", "--site", tmp_path / "site.yaml")
    assert [stage["state"] for stage in status["stages"][:3]] == ["done", "failed", "pending"]
    code, _, err = finished(vico("run", *where))
    assert code == 2 and "no row has a picture" in err, "also when the shards are reused"


@pytest.mark.slow
def test_a_seed_that_the_message_names_lets_the_run_go_on(project, tmp_path):
    where = project([row(f"{n}.png", answer=str(n)) for n in range(6)])
    code, _, err = finished(vico("run", *where))
    assert code == 2 and "set shard.split_seed: " in err and stages_begun(tmp_path) == ["shard"]
    seed = err.partition("set shard.split_seed: ")[2].partition(",")[0]
    steps = ("--set", "consistency.max_steps=1", "--set", "consistency.packs_per_step=1")
    code, _, err = finished(
        vico("run", *where, "--until", "consistency", "--set", f"shard.split_seed={seed}", *steps)
    )
    assert code == 0, err
    (manifest,) = (
        json.loads(path.read_text())
        for path in (tmp_path / "runs" / "shard").glob("*/output/manifest.json")
        if min(json.loads(path.read_text())["splits"].values())
    )
    assert manifest["written"] == 6


def test_what_the_config_alone_shows_is_refused_by_plan(project, tmp_path):
    where = project([row(f"{n}.png", answer=str(n)) for n in range(6)])
    for setting, words in (
        ("shard.calib_share=0", "router needs some to calibrate the threshold on; set shard.calib_share"),
        ("shard.test_share=0", "evaluate needs some to measure on; set shard.test_share"),
        ("ratio.splits=[train,test]", "add calib to ratio.splits"),
    ):
        for command in ("plan", "run"):
            code, _, err = finished(vico(command, *where, "--set", setting))
            assert code == 2 and words in err and len(err.splitlines()) == 1
        assert finished(vico("plan", *where, "--set", setting, "--until", "consistency"))[0] == 0
    assert not (tmp_path / "runs").exists()
