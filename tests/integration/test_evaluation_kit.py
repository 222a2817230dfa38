"""lmms-eval itself against `vico serve`: a small task, at the full rate and routed, and their comparison.

lmms-eval has its own environment; the variable VICO_LMMS_EVAL names its command (docs/serving.md).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LMMS_EVAL = os.environ.get("VICO_LMMS_EVAL")


@pytest.mark.slow
@pytest.mark.skipif(LMMS_EVAL is None, reason="VICO_LMMS_EVAL names no command of lmms-eval")
def test_lmms_eval_runs_the_demo_task_and_the_answers_are_compared(tmp_path):
    kits = ROOT / "examples" / "evaluation_kits"
    make = [sys.executable, str(kits / "make_demo_task.py"), str(tmp_path / "task"), "--questions", "12"]
    subprocess.run(make, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    vico = tmp_path / "vico"
    vico.write_text(f'#!/bin/bash\nPYTHONPATH={ROOT} exec {sys.executable} -m pipeline.cli "$@"\n')
    vico.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LMMS_EVAL": str(LMMS_EVAL),
        "LMMS_OPTIONS": f"--include_path {tmp_path / 'task'}",
        "PYTHON": sys.executable,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    model = ROOT / "models" / "small-internvl"
    # a model without router: both runs have the full rate, so every difference is 0
    command = [str(kits / "run.sh"), str(model), str(tmp_path / "out"), "vico_demo"]
    environment["RULES"] = "full full"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    [result] = (tmp_path / "out" / "1-full").rglob("*_results.json")
    scores = json.loads(result.read_text())["results"]["vico_demo"]
    assert scores["anls,none"] > 0.5
    [row] = [line for line in done.stdout.splitlines() if line.startswith("| vico_demo | anls | 12")]
    assert row.endswith("+0.0000 | +0.0000 to +0.0000 |")
