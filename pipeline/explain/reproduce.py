"""`vico reproduce RUN`: the config and the command that give a run again, and on demand the proof."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import yaml

from cluster.site import Site
from pipeline.config.graph import Graph
from pipeline.config.pipeline_file import load_config
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.provenance import git_state, package_versions
from pipeline.planning.request import RunRequest
from pipeline.planning.tasks import resolve
from pipeline.results.run_results import RunRecord, readable_records
from pipeline.results.runs import RunFile, Runs
from vico.errors import UserError


@dataclass
class Recipe:
    """How to get a run again. `differs`: outputs that a verification found to be others; None before it."""

    run: str
    config: Path
    command: str
    commit: str | None
    storage: Path
    until: str
    notes: list[str] = field(default_factory=list)
    differs: list[str] | None = None

    def as_json(self) -> dict[str, Any]:
        verified = None if self.differs is None else not self.differs
        return {
            "run": self.run,
            "config": str(self.config),
            "command": self.command,
            "commit": self.commit,
            "notes": self.notes,
            "verified": verified,
            "differs": self.differs or [],
        }


def write_recipe(site: Site, name: str, out: Path | None, storage: Path | None, graph: Graph) -> Recipe:
    """Write the run's resolved config; UserError when the file is there already."""
    run = Runs(site.storage).named(name)
    path = (out or Path(f"{run.run}.yaml")).absolute()
    if path.exists():
        raise UserError(f"--out={path} exists; name another file")
    if not path.parent.is_dir():
        raise UserError(f"--out={path} lies in no folder; make {path.parent} or name another file")
    near = Path("runs") if site.remote else site.storage
    fresh = (storage or near.parent / f"{near.name}-again-{run.run}").absolute()
    records = readable_records(run, site.storage)
    commits = {made.record.git.get("commit") for made in records.values()} - {None}
    code = ", ".join(sorted(commits)) or "unknown"
    header = f"# run {run.run}, every default and seed filled in; code: {code}\n"
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    path.write_text(header + text, encoding="utf-8")
    until = list(run.stages)[-1]
    words = ["vico", "run", str(path), "--site", run.site, "--storage", str(fresh)]
    if until != graph.names[-1]:
        words += ["--until", until]
    recipe = Recipe(run.run, path, shlex.join(words), next(iter(commits), None), fresh, until)
    recipe.notes = [*_code_notes(records, commits), *_identity_notes(run, path, graph, site.storage)]
    return recipe


def _code_notes(records: Mapping[str, RunRecord], commits: set[str]) -> list[str]:
    """What of code and packages must be as it was, and is not here."""
    notes, now = [], git_state()
    if len(commits) > 1:
        notes.append(f"stages were made by several commits: {', '.join(sorted(commits))}")
    elif commits and now["commit"] not in commits:
        notes.append(f"check out the code of then: git checkout {next(iter(commits))}")
    if any(made.record.git.get("dirty") for made in records.values()):
        notes.append("tracked files differed from the commit then; the records have their digests")
    moved: dict[str, str] = {}
    installed = package_versions()
    for made in records.values():
        moved |= {name: old for name, old in made.record.packages.items() if installed.get(name) != old}
    if moved:
        notes.append("packages of then: " + " ".join(f"{name}=={old}" for name, old in sorted(moved.items())))
    return notes


def _identity_notes(run: RunFile, path: Path, graph: Graph, storage: Path) -> list[str]:
    """Whether config, inputs and code as they are here still stand for the same results."""
    try:
        pipeline = resolve(graph.until(list(run.stages)[-1]), load_config(path, graph), DigestCache(storage))
    except UserError as error:
        return [f"cannot run here as it is: {line}" for line in str(error).splitlines()]
    return [
        f"{name}: inputs or code_version have changed, its fingerprint is {value[:12]} here and "
        f"{run.stages[name].fingerprint[:12]} in the run"
        for name, value in pipeline.fingerprints.items()
        if run.stages[name].fingerprint != value
    ]


def verify(recipe: Recipe, site: Site, graph: Graph, stream: TextIO) -> None:
    """Run the recipe in its fresh storage and enter which outputs are not byte for byte the same. Raises
    UserError when that storage is in use or the run does not end well."""
    from pipeline.progress import Display
    from pipeline.running.runner import run_pipeline

    if recipe.storage.exists():
        raise UserError(f"--fresh-storage={recipe.storage} exists; name a folder that does not")
    again = type(site).model_validate({**site.as_given(), "storage": str(recipe.storage), "work": None})
    with Display(stream) as display:
        result = run_pipeline(RunRequest(recipe.config, again, until=recipe.until), graph, display)
    if result.state != "done":
        raise UserError(f"the run of {recipe.config} ended as {result.state}: {result.message}")
    before = readable_records(Runs(site.storage).named(recipe.run), site.storage)
    after = readable_records(Runs(recipe.storage).named(result.run), recipe.storage)
    recipe.differs = []
    for stage in after:
        old = before[stage].record.outputs if stage in before else {}
        new = after[stage].record.outputs
        recipe.differs += [
            f"{stage}/{name}" for name in sorted({**old, **new}) if old.get(name) != new.get(name)
        ]
