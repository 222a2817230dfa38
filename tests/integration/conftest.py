"""One undisturbed run of the small real pipeline, shared by the tests of several files."""

from pathlib import Path

import pytest

from tests.integration.demo_pipeline import STAGES, answer, write_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> tuple[Path, Path, dict[str, str]]:
    """Pipeline file, site file, and what the run printed last."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = write_pipeline(folder)
    site = folder / "site.yaml"
    return config, site, answer("run", config, "--site", site)


@pytest.fixture(scope="session")
def outputs(pipeline) -> dict[str, Path]:
    """Output folder of each stage of the run."""
    _, site, run = pipeline
    status = answer("status", run["run"], "--site", site)
    assert [stage["name"] for stage in status["stages"]] == STAGES
    assert {stage["state"] for stage in status["stages"]} == {"done"}
    return {stage["name"]: Path(stage["path"]) for stage in status["stages"]}
