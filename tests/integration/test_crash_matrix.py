"""kill -9 of the driver at several moments of every stage of the real pipeline: the same command resumes and
gives the same result as an undisturbed run."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.demo_pipeline import STAGES, answer, finished, vico
from tests.integration.planted_deaths import MOMENTS

WITHOUT_RAY = ("label", "export")


def matrix() -> list[Any]:
    """Return every stage. Those that start Ray, with models on workers, take a minute or more and are
    slow."""
    return [
        stage if stage in WITHOUT_RAY else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES
    ]


def contents(output: Path) -> dict[str, bytes]:
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.mark.parametrize("stage", matrix())
def test_a_driver_killed_at_any_moment_of_a_stage_gives_the_undisturbed_result(
    pipeline, outputs, tmp_path, stage
):
    """One run is killed before the stage, in the middle, unrecorded and recorded, one after another."""
    config, site, _ = pipeline
    storage = tmp_path / "runs"
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(outputs[earlier].parents[1], storage / earlier)
    command = ["run", config, "--site", site, "--storage", storage, "--until", stage]
    for moment in MOMENTS:
        code, _, errors = finished(vico(*command, dies=f"{moment}:{stage}"))
        assert code == -signal.SIGKILL, (moment, code, errors[-3000:])
        assert list(storage.glob(f"{stage}/*/record.json")) != [] or moment != "recorded"
        assert list(storage.glob(f"{stage}/*/record.json")) == [] or moment == "recorded"
        (killed,) = answer("status", "--storage", storage)
        assert killed["state"] == "interrupted"
    done = answer(*command)
    assert done["run"] == killed["run"], "all five commands worked on one run"
    stages = {row["name"]: row for row in answer("status", "latest", "--storage", storage)["stages"]}
    status = stages[stage]
    assert status["state"] == "done" and status["reused"], "the record existed already"
    assert status["attempt"] == 3, "started three times: middle, unrecorded, recorded"
    after = contents(Path(status["path"]))
    undisturbed = contents(outputs[stage])
    assert sorted(after) == sorted(undisturbed)
    assert [name for name in after if after[name] != undisturbed[name]] == []
    record = json.loads((Path(status["path"]).parent / "record.json").read_text())
    assert (
        record["output_digest"]
        == json.loads((outputs[stage].parent / "record.json").read_text())["output_digest"]
    )
    assert list(storage.rglob("*.partial-*")) == []
