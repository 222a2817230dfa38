"""Print as JSON what a device measurement depends on: device, versions, and dependencies that are missing.

python -m benchmarks.device_environment
"""

import importlib.metadata
import json
import platform
import tomllib
from pathlib import Path

import torch
from packaging.requirements import Requirement

_SHOWN = (
    *("torch", "transformers", "deepspeed", "ray", "mlflow", "triton"),
    *("flash-attn", "flash-attn-4", "liger-kernel", "trl"),
)


def missing_dependencies() -> list[str]:
    """Return the requirements of `pyproject.toml` that are not installed, or in another version."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    missing = []
    for requirement in map(Requirement, project["dependencies"]):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(requirement))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement} ({version} is installed)")
    return missing


def main() -> None:
    versions = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    device = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    facts = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "device": device.name if device else None,
        "memory_gb": device.total_memory / 1e9 if device else None,
        "packages": {name: versions[name] for name in _SHOWN if name in versions},
        "missing": missing_dependencies(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
