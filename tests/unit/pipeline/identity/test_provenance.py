"""Recorded package versions: the same whatever a process has imported."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PRINT_VERSIONS = """import json, sys; from pipeline.identity.provenance import package_versions
print(json.dumps(package_versions()))"""


def last_printed(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[4],
    )
    return process.stdout.splitlines()[-1]


def test_packages_are_the_same_before_and_after_ray_is_imported():
    plain = last_printed(PRINT_VERSIONS)
    assert f'"ray": "{version("ray")}"' in plain and f'"torch": "{version("torch")}"' in plain
    assert last_printed(f"import ray; {PRINT_VERSIONS}") == plain


def test_of_a_package_that_is_on_the_path_twice_the_first_counts(tmp_path):
    info = tmp_path / "ray-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 0.0.1\n")
    assert '"ray": "0.0.1"' in last_printed(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {PRINT_VERSIONS}"
    )
