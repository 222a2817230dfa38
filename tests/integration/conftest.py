"""One undisturbed run of the small real pipeline, which several files of tests look at."""

from pathlib import Path

import pytest

from tests.integration.demo_pipeline import STAGES, answer, write_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Pipeline and site file, and the last line of one undisturbed run."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = write_pipeline(folder)
    site = folder / "site.yaml"
    return config, site, answer("run", config, "--site", site)


@pytest.fixture(scope="session")
def outputs(pipeline) -> dict[str, Path]:
    _, site, run = pipeline
    status = answer("status", run["run"], "--site", site)
    assert [stage["name"] for stage in status["stages"]] == STAGES
    assert {stage["state"] for stage in status["stages"]} == {"done"}
    return {stage["name"]: Path(stage["path"]) for stage in status["stages"]}
