"""`vico submit --print` of every kind of site, compared with texts in tests/data/submit.

After a wanted change: python -m tests.unit.pipeline.submission.test_printed_jobs
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from cluster.site_files import SITES_FOLDER, load_site
from pipeline.config.graph import pipeline_graph
from pipeline.planning.request import RunRequest, open_pipeline
from pipeline.submission.submit import printed_job
from tests.tiny_model import make_tiny_model

GOLDEN = Path(__file__).parents[3] / "data" / "submit"
KINDS = ("local", "ray", "kuberay", "slurm")


def request_for(kind: str, folder: Path) -> RunRequest:
    """Return the request of `vico submit` with an example site and a small pipeline in `folder`."""
    if not (folder / "model").exists():
        make_tiny_model(folder / "model")
        pipeline = {
            "inputs": {"records": {"format": "demo", "num_samples": 96}, "model": str(folder / "model")},
            "consistency": {"packs_per_step": 16},
            "router": {"packs_per_step": 16},
        }
        (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    site = load_site(SITES_FOLDER / f"{kind}.yaml", storage=folder / "runs")
    return RunRequest(folder / "pipeline.yaml", site, until="ratio")


def printed(kind: str, folder: Path) -> str:
    """Return the text of --print without what differs between machines, commits and versions, and without
    the config and the site, which have tests of their own."""
    text = printed_job(request_for(kind, folder), pipeline_graph())
    text = re.sub(r"(?ms)\n\n# \S*git\.patch\n.*?(?=\n\n# |\Z)", "", text).replace(
        ", submitted/git.patch", ""
    )
    text = re.sub(r"(?ms)^# (\S*submitted/\S*)\n.*?(?=\n\n# |\Z)", r"# \1\n...", text)
    for value, name in (
        (str(folder.resolve()), "/FOLDER"),
        (str(folder), "/FOLDER"),
        (sys.executable, "PYTHON"),
        (f"rayVersion: {importlib.metadata.version('ray')}", "rayVersion: RAY_VERSION"),
    ):
        text = text.replace(value, name)
    return text + "\n"


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_job_is_the_golden_one(kind, tmp_path):
    assert printed(kind, tmp_path) == (GOLDEN / f"{kind}.txt").read_text()
    assert not (tmp_path / "runs").exists(), "--print writes nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_can_be_planned_with_every_example_site(kind, tmp_path):
    planned = open_pipeline(request_for(kind, tmp_path), pipeline_graph()).planned
    assert [stage.action for stage in planned] == ["run"] * len(planned)


def test_the_scripts_of_a_slurm_job_are_valid_for_bash(tmp_path):
    text = printed("slurm", tmp_path)
    for name in ("job.sh", "node.sh"):
        script = text.split(f"/{name}\n#!/bin/bash\n")[1].split("\n\n# /FOLDER")[0]
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, ""), name


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            (GOLDEN / f"{kind}.txt").write_text(printed(kind, Path(folder)))


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    main()
