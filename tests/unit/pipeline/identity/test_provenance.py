"""Packages as they are recorded: the same whatever a process has imported."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

TELL = "import json, sys; from pipeline.identity.provenance import package_versions; print(json.dumps(package_versions()))"


def told(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[4],
    )
    return done.stdout.splitlines()[-1]


def test_packages_are_the_same_before_and_after_ray_is_imported():
    plain = told(TELL)
    assert f'"ray": "{version("ray")}"' in plain and f'"torch": "{version("torch")}"' in plain
    assert told(f"import ray; {TELL}") == plain


def test_of_a_package_that_stands_on_the_path_twice_the_first_counts(tmp_path):
    info = tmp_path / "ray-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 0.0.1\n")
    assert '"ray": "0.0.1"' in told(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {TELL}")
