"""What the Dockerfiles copy is enough to install vico. tests/dockerfile_steps.py runs their steps."""

import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.dockerfile_steps import Build, instructions

ROOT = Path(__file__).parents[2]
COPIES = {
    name: [
        shlex.split(text)
        for instruction, text in instructions(ROOT / "docker" / name)
        if instruction == "COPY"
    ]
    for name in ("Dockerfile", "Dockerfile.cpu")
}


def test_both_images_have_the_same_files_and_the_context_holds_them():
    assert COPIES["Dockerfile"] == COPIES["Dockerfile.cpu"]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(kept) == sorted(source for *sources, _ in COPIES["Dockerfile"] for source in sources)


def test_vico_can_be_installed_from_what_an_image_copies(tmp_path):
    build = Build(tmp_path / "image", ROOT, {})
    for paths in COPIES["Dockerfile"]:
        build.copy(*paths)
    options = ["--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-index"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        *options,
        "--wheel-dir",
        tmp_path,
        tmp_path / "image" / "src",
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("vico-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    shown = subprocess.run(
        [sys.executable, "-c", "from vico_command import main; main()", "--version"],
        cwd=tmp_path / "installed",
        env={"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert (shown.returncode, shown.stdout[:5]) == (0, "vico "), shown.stderr
    assert (tmp_path / "installed" / "pipeline" / "starter" / "sites" / "kuberay.yaml").is_file()
