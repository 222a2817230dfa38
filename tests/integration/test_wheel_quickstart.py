"""A wheel in an empty folder, without the checkout: from `vico init` to a routed answer."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.installed_wheel import install_wheel, without_checkout
from tests.record_files import picture
from tests.waiting import PATIENCE_S

SMALL = (
    "inputs.records.num_samples=200",
    "consistency.epochs=1",
    "router.epochs=1",
)


@pytest.mark.slow
def test_a_wheel_alone_goes_from_init_to_a_routed_answer(tmp_path):
    program = install_wheel(tmp_path / "installed")
    home = tmp_path / "empty"
    home.mkdir()

    def called(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=home,
            env=without_checkout(),
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    config, overrides = "configs/quickstart.yaml", [word for key in SMALL for word in ("--set", key)]
    assert f"next: vico run {config}" in called(program, "init", "--quickstart")
    assert {path.name for path in home.iterdir()} == {"configs", "constraints.txt", "models", "sites"}
    assert "good" in called(program, "data", "check", config, *overrides)
    output = called(program, "run", config, *overrides)
    assert "model:    runs/latest/model" in output and "quality:" in output
    (home / "picture.png").write_bytes(picture(1))
    [routed] = json.loads(called(program, "route", "runs/latest/model", "picture.png", "--json"))
    assert routed["tiles"]
    code = (
        "import vico; a = vico.load('runs/latest/model').answer('picture.png', 'What?'); print(len(a.tiles))"
    )
    python = Path(program).with_name("python")
    assert int(called(python, "-c", code)) == len(routed["tiles"])
    assert json.loads(called(program, "audit", "latest", "--json"))["ok"]
    called(program, "init", "own.yaml")
    assert "good" in called(program, "data", "check", "own.yaml")
