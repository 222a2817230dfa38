"""Run a pipeline and its ablations in one storage, where stages that two of them share are made once."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.settings.yaml_files import yaml_mapping
from pipeline.config.dotted_keys import flattened
from vico.errors import UserError

ROOT = Path(__file__).parents[2]
BASE = "base"


@dataclass(frozen=True)
class Ablation:
    """A pipeline that differs from the base by some keys."""

    name: str
    description: str
    overrides: tuple[str, ...]
    """`a.b=value`, as `vico run --set` takes them."""


def ablations(folder: Path, names: Sequence[str] = ()) -> list[Ablation]:
    """Return the base and the ablations in a folder, one YAML file each, or only the named ones.

    Raises UserError for a name without a file, and for a file without keys.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: {folder} has {', '.join(known) or 'no ablations'}")
    chosen = [Ablation(BASE, "the pipeline as it is", ())]
    for name in names or known:
        changed = yaml_mapping(known[name], "ablation")
        if not changed:
            raise UserError(f"{known[name]} changes no key; write what differs from the base, or remove it")
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in flattened(changed).items())
        chosen.append(Ablation(name, _comment(known[name]), overrides))
    return chosen


def _comment(path: Path) -> str:
    """Return the comment at the beginning of a file, as one line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


@dataclass(frozen=True)
class Command:
    """`vico run` with the options that all runs have."""

    config: Path
    storage: Path
    site: str | None = None
    overrides: tuple[str, ...] = ()

    def arguments(self, ablation: Ablation) -> list[str]:
        """Return the arguments of `vico` for an ablation, whose keys come after those of the base."""
        settings = [part for override in self._overrides(ablation) for part in ("--set", override)]
        site = [] if self.site is None else ["--site", self.site]
        return ["run", str(self.config), "--storage", str(self.storage), *site, *settings]

    def _overrides(self, ablation: Ablation) -> tuple[str, ...]:
        return (*self.overrides, *ablation.overrides)

    def run(self, ablation: Ablation) -> str:
        """Run it to the end, or resume it, and return the run's id. Its progress goes to standard error.

        Raises UserError if it does not end as done.
        """
        program = [sys.executable, "-m", "pipeline.cli", *self.arguments(ablation), "--json"]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        answer = _last_json(done.stdout)
        if done.returncode or answer.get("state") != "done":
            raise UserError(
                f"{ablation.name}: ended as {answer.get('state', 'failed')} with exit code "
                f"{done.returncode}; see the lines above, then give the same command again"
            )
        return str(answer["run"])


def _last_json(text: str) -> Mapping[str, Any]:
    lines = text.strip().splitlines()
    try:
        value = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
