"""kill -9 of the driver at every place of every stage of the real pipeline: the same command goes on,
and gives what an undisturbed run gives."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.integration.demo_pipeline import STAGES, answer, finished, vico
from tests.integration.planted_deaths import PLACES

WITHOUT_RAY = ("label", "export")


def matrix() -> list:
    """Every stage; those that start Ray, and models on workers, take a minute or more and are slow."""
    return [
        stage if stage in WITHOUT_RAY else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES
    ]


def contents(output: Path) -> dict[str, bytes]:
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.mark.parametrize("stage", matrix())
def test_a_driver_killed_at_every_place_of_a_stage_gives_the_undisturbed_result(
    pipeline, outputs, tmp_path, stage
):
    """One run, killed before the stage, in the middle, unrecorded and recorded, one after another."""
    config, site, _ = pipeline
    storage = tmp_path / "runs"
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(outputs[earlier].parents[1], storage / earlier)
    command = ["run", config, "--site", site, "--storage", storage, "--until", stage]
    for place in PLACES:
        code, _, errors = finished(vico(*command, dies=f"{place}:{stage}"))
        assert code == -signal.SIGKILL, (place, code, errors[-3000:])
        assert list(storage.glob(f"{stage}/*/record.json")) != [] or place != "recorded"
        assert list(storage.glob(f"{stage}/*/record.json")) == [] or place == "recorded"
        (killed,) = answer("status", "--storage", storage)
        assert killed["state"] == "interrupted"
    done = answer(*command)
    assert done["run"] == killed["run"], "all five commands worked on one run"
    (entry,) = [
        one for one in answer("status", "latest", "--storage", storage)["stages"] if one["name"] == stage
    ]
    assert entry["state"] == "done" and entry["reused"], "the record was there already"
    assert entry["attempt"] == 3, "begun in the middle, unrecorded, recorded"
    after = contents(Path(entry["path"]))
    undisturbed = contents(outputs[stage])
    assert sorted(after) == sorted(undisturbed)
    assert [name for name in after if after[name] != undisturbed[name]] == []
    record = json.loads((Path(entry["path"]).parent / "record.json").read_text())
    assert (
        record["output_digest"]
        == json.loads((outputs[stage].parent / "record.json").read_text())["output_digest"]
    )
    assert list(storage.rglob("*.partial-*")) == []
