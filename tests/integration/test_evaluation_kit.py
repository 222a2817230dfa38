"""lmms-eval itself against `vico serve`: a small task, at the full rate and routed, and their comparison.

lmms-eval has its own environment; the variable VICO_LMMS_EVAL names its command (docs/serving.md).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
KITS = ROOT / "examples" / "evaluation_kits"
LMMS_EVAL = os.environ.get("VICO_LMMS_EVAL")


def compared(folder: Path, rules: str, lmms_eval: str) -> subprocess.CompletedProcess[str]:
    """Run `run.sh` on the demo model and the task in `folder`/task."""
    vico = folder / "vico"
    vico.write_text(f'#!/bin/bash\nPYTHONPATH={ROOT} exec {sys.executable} -m pipeline.cli "$@"\n')
    vico.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "LMMS_EVAL": lmms_eval,
        "LMMS_OPTIONS": f"--include_path {folder / 'task'}",
        "PYTHON": sys.executable,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "RULES": rules,
    }
    model = ROOT / "models" / "small-internvl"
    command = [str(KITS / "run.sh"), str(model), str(folder / "out"), "vico_demo"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, cwd=folder
    )


@pytest.mark.slow
@pytest.mark.skipif(LMMS_EVAL is None, reason="VICO_LMMS_EVAL names no command of lmms-eval")
def test_lmms_eval_runs_the_demo_task_and_the_answers_are_compared(tmp_path):
    make = [sys.executable, str(KITS / "make_demo_task.py"), str(tmp_path / "task"), "--questions", "12"]
    subprocess.run(make, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    # a model without router: both runs have the full rate, so every difference is 0
    done = compared(tmp_path, "full full", str(LMMS_EVAL))
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    [result] = (tmp_path / "out" / "1-full").rglob("*_results.json")
    scores = json.loads(result.read_text())["results"]["vico_demo"]
    assert scores["anls,none"] > 0.5
    [row] = [line for line in done.stdout.splitlines() if line.startswith("| vico_demo | anls | 12")]
    assert row.endswith("+0.0000 | +0.0000 to +0.0000 |")


@pytest.mark.slow
def test_a_kit_that_ends_well_without_results_is_an_error(tmp_path):
    """lmms-eval ends with 0 after an error."""
    done = compared(tmp_path, "full full", "/bin/true")
    assert done.returncode == 1 and not list((tmp_path / "out").iterdir())
    assert done.stderr.splitlines()[-1].startswith("error: lmms-eval wrote no samples of vico_demo to ")
