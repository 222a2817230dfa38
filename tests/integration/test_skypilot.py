"""The SkyPilot example, read by SkyPilot's own parser in an environment of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.demo_pipeline import finished, vico

EXAMPLE = Path(__file__).parents[2] / "examples" / "skypilot.yaml"
SCRIPT = """
import sky, sys
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
assert resources.accelerators == {"H100": 8} and resources.use_spot, resources
assert "vico run" in task.run and "DS_BUILD_OPS=0" in task.setup
print(task.name)
"""


@pytest.mark.slow  # installs SkyPilot
def test_skypilot_reads_the_example(tmp_path):
    """SkyPilot pins other versions than this project, so that it is installed beside it."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "skypilot==0.14.1"], check=True)
    done = subprocess.run(
        [python, "-c", SCRIPT, EXAMPLE],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path)},
        cwd=EXAMPLE.parents[1],
    )
    assert (done.returncode, done.stdout.strip()) == (0, "vico"), done.stderr


def test_its_scripts_are_valid_for_bash(tmp_path):
    task = yaml.safe_load(EXAMPLE.read_text())
    for part in ("setup", "run"):
        checked = subprocess.run(["bash", "-n"], input=task[part], text=True, capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, ""), part


def test_its_site_can_run_its_config(tmp_path):
    task = yaml.safe_load(EXAMPLE.read_text())
    site = task["run"].split("<<END\n")[1].split("END\n")[0]
    values = {"$STORAGE": str(tmp_path / "runs"), "$SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    for name, value in values.items():
        site = site.replace(name, value)
    (tmp_path / "site.yaml").write_text(site)
    config = EXAMPLE.parents[1] / task["envs"]["CONFIG"]
    code, out, err = finished(vico("plan", config, "--site", tmp_path / "site.yaml"))
    assert code == 0 and "consistency" in out, err
