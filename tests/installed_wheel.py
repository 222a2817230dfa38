"""The project as a wheel in an environment of its own, which has the dependencies of this one."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from cluster.sources.in_worker import PACKAGES

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "README.md", "LICENSE", "vico_command.py")


def copy_packages(folder: Path) -> Path:
    """Copy the project's packages, with the files that `pipeline/starter` links to."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def install_wheel(folder: Path) -> Path:
    """Build the wheel and install it into `folder`/venv; return the command `vico` there."""
    source = copy_packages(folder / "source")
    for file in FILES:
        shutil.copy(ROOT / file, source)
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-index"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(source)]
    subprocess.run(pip, check=True)
    return folder / "venv" / "bin" / "vico"


def without_checkout(**variables: str) -> dict[str, str]:
    """Return this process's environment without what points at this checkout or a cluster."""
    left_out = ("PYTHONPATH", "RAY_ADDRESS")
    own = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**own, "OMP_NUM_THREADS": "1", **variables}
