"""`vico reproduce RUN`: the config and command that repeat a run, and with `--verify` the proof."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from cluster.settings.yaml_files import yaml_text
from cluster.site import Site
from pipeline.config.graph import Graph
from pipeline.config.pipeline_file import load_config
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.provenance import git_state, package_versions
from pipeline.planning.reasons import mixed_code
from pipeline.planning.request import RunRequest
from pipeline.planning.tasks import resolve
from pipeline.results.run_results import RunRecord, readable_records
from pipeline.results.runs import RunFile, Runs
from vico.errors import UserError


@dataclass
class Recipe:
    """How to repeat a run. `differs`: the outputs that `verify` found to differ; None before `verify`."""

    run: str
    config: Path
    command: str
    commit: str | None
    storage: Path
    until: str
    site_file: str | None = None
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


def write_recipe(
    site: Site, name: str, out: Path | None, storage: Path | None, graph: Graph, site_file: str | None = None
) -> Recipe:
    """Write the resolved config of a run to `out`, by default `<run>.yaml`.

    The command of the recipe runs it in `storage`, by default a new folder beside the site's storage, with
    `site_file`, by default that of the run. Raises UserError if `out` exists.
    """
    run = Runs(site.storage).named(name)
    path = (out or Path(f"{run.run}.yaml")).absolute()
    if path.exists():
        raise UserError(f"--out={path} exists; name another file")
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: {path.parent} is not a folder; create it or name another file")
    local = Path("runs") if site.remote else site.storage
    fresh = (storage or local.parent / f"{local.name}-again-{run.run}").absolute()
    records = readable_records(run, site.storage)
    commits = _commits(records)
    code = ", ".join(commits) or "unknown"
    header = f"# run {run.run}, every default and seed filled in; code: {code}\n"
    text = yaml_text(run.config)
    path.write_text(header + text, encoding="utf-8")
    until = list(run.stages)[-1]
    known_file = site_file or run.site_file
    words = ["vico", "run", str(path)]
    if known_file is not None:
        words += ["--site", known_file]
    words += ["--storage", str(fresh)]
    if until != graph.names[-1]:
        words += ["--until", until]
    commit = next(iter(commits), None)
    recipe = Recipe(run.run, path, shlex.join(words), commit, fresh, until, known_file)
    recipe.notes = [
        *_site_notes(run, known_file),
        *_code_notes(records),
        *_identity_notes(run, path, graph, site.storage),
    ]
    return recipe


def _site_notes(run: RunFile, site_file: str | None) -> list[str]:
    """Return a line if the site file of the run is not known or not here."""
    if site_file is None and run.site != "local":
        return [f"the file of the run's site {run.site} is not recorded; add --site FILE"]
    if site_file is not None and not Path(site_file).is_file():
        return [f"the run's site file {site_file} is not here; give another with --site"]
    return []


def _commits(records: Mapping[str, RunRecord]) -> list[str]:
    """Return the commits that made the results, sorted; none for code without a commit."""
    commits = {run_record.record.git.get("commit") for run_record in records.values()}
    return sorted(commit for commit in commits if commit is not None)


def _code_notes(records: Mapping[str, RunRecord]) -> list[str]:
    """Return one line per difference in code and packages between the run and this machine."""
    notes, now, commits = [], git_state(), _commits(records)
    if len(commits) > 1:
        notes.append(f"the stages were made by several commits: {', '.join(commits)}")
    elif commits and now["commit"] not in commits:
        notes.append(f"check out the code of the run: git checkout {commits[0]}")
    if now.get("error"):
        notes.append(f"git does not say which code is here: {now['error']}")
    for error in sorted({git["error"] for git in (r.record.git for r in records.values()) if "error" in git}):
        notes.append(f"commit and patch of the run are not recorded; git said: {error}")
    if any(run_record.record.git.get("dirty") for run_record in records.values()):
        notes.append("tracked files differed from the commit; the records have their digests")
    notes += [f"{stage}: {mixed}" for stage, run in records.items() if (mixed := mixed_code(run.record))]
    changed: dict[str, str] = {}
    installed = package_versions()
    for run_record in records.values():
        packages = run_record.record.packages
        changed |= {name: old for name, old in packages.items() if installed.get(name) != old}
    if changed:
        versions = " ".join(f"{name}=={old}" for name, old in sorted(changed.items()))
        notes.append(f"packages of the run that differ here: {versions}")
    return notes


def _identity_notes(run: RunFile, path: Path, graph: Graph, storage: Path) -> list[str]:
    """Return one line per stage whose config, inputs and code give another fingerprint here."""
    try:
        config = load_config(path, graph)
        requested = config.stages_of(graph).until(list(run.stages)[-1])
        pipeline = resolve(requested, config, DigestCache(storage))
    except UserError as error:
        return [f"cannot run here: {line}" for line in str(error).splitlines()]
    return [
        f"{name}: inputs or code_version have changed, its fingerprint is {value[:12]} here and "
        f"{run.stages[name].fingerprint[:12]} in the run"
        for name, value in pipeline.fingerprints.items()
        if run.stages[name].fingerprint != value
    ]


def verify(recipe: Recipe, site: Site, graph: Graph, stream: TextIO) -> None:
    """Run the recipe in its fresh storage, and set `differs` to the outputs that are not the same byte for
    byte.

    Raises UserError if that storage exists, or if the run does not end as done.
    """
    from pipeline.running.runner import run_pipeline
    from pipeline.terminal.progress import Display

    if recipe.storage.exists():
        raise UserError(f"--fresh-storage={recipe.storage} exists; name a folder that does not")
    fresh_site = type(site).model_validate({**site.as_given(), "storage": str(recipe.storage), "work": None})
    with Display(stream) as display:
        request = RunRequest(recipe.config, fresh_site, until=recipe.until, site_file=recipe.site_file)
        result = run_pipeline(request, graph, display)
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
