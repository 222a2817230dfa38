"""`vico export`: the model of a finished run as a folder that others open, in Hugging Face's layout or the
published Flash one.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pipeline.identity.file_digests import DigestCache
from pipeline.results.run_results import RunRecord, record_of
from pipeline.results.runs import RunFile, Runs
from pipeline.results.stage_folder import StageFolder
from pipeline.storage.lookup import storage_of
from pipeline.storage.output_files import published
from stages.durable_files import sync_folder, sync_tree
from stages.export.model_card import model_card, stated_licence
from stages.export.stage import weights_digest
from stages.outputs import MODEL_FOLDER
from vico.checkpoints.hub import model_folder
from vico.errors import UserError

ExportLayout = Literal["flash", "hf"]
_STAGES = ("shard", "consistency", "router", "evaluate", "export")


def export(storage: Path, run_name: str, out: Path, layout: ExportLayout) -> None:
    """Writes the run's model to `out`, whole or not at all.

    Raises UserError for a run that is not done, results or a base model that are gone, and a place that
    exists or cannot be written.
    """
    from vico.checkpoints.write import write_hf_folder, write_published_folder

    run = Runs(storage).named(run_name)
    made = stage_outputs(run, storage)
    base = base_folder(run)
    router, shards = _json(made["router"], "metrics.json"), _json(made["shard"], "manifest.json")
    threshold = router["absolute_threshold"]
    with whole_folder(out) as folder:
        source = made["export"].output / MODEL_FOLDER
        if layout == "flash":
            write_published_folder(source, folder, base=base, absolute_threshold=threshold)
        else:
            write_hf_folder(source, folder, absolute_threshold=threshold)
        card = model_card(
            base=weights_digest(base),
            licence=stated_licence(base),
            data=shards,
            metrics=_json(made["evaluate"], "metrics.json"),
            router=router,
            layout=layout,
            run=run.run,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def stage_outputs(run: RunFile, storage: Path) -> Mapping[str, RunRecord]:
    """What an export reads: of each stage what this run made or reused, also where another run has made the
    stage again since; UserError where it is not done or gone."""
    found = {}
    for name in _STAGES:
        entry = run.stages.get(name)
        state = "not part of it" if entry is None else entry.state
        if entry is None or entry.state != "done":
            raise UserError(
                f"RUN={run.run}: its stage {name} is {state}; an export needs a run that is done, "
                "`vico run` goes on with it"
            )
        made = _made(run, name, storage)
        _fetch(made, run, storage)
        if not made.output.is_dir():
            place = storage_of(storage).place(made.output)
            raise UserError(f"RUN={run.run}: {place} is gone; {_remedy(made)}")
        found[name] = made
    return found


def _made(run: RunFile, stage: str, storage: Path) -> RunRecord:
    """The record of what the run made of the stage and where it lies: what another run put in its place
    counts as that only if the bytes are the same."""
    folder = StageFolder(storage, stage, run.stages[stage].fingerprint)
    found, current = record_of(run, stage, storage), folder.record()
    if found is None:
        where = folder.storage.place(folder.path)
        by = f", where run {current.run} has put its own" if current is not None else ""
        raise UserError(
            f"RUN={run.run}: what it made of {stage} is gone from {where}{by}; "
            "`vico run` goes on with the newest run, export that"
        )
    if found.is_superseded and current is not None:
        same = current.output_digest == found.record.output_digest
        return RunRecord(current, folder.path) if same else found
    return found


def _fetch(made: RunRecord, run: RunFile, storage: Path) -> None:
    """Have the output at hand; UserError when a file of it is not what was recorded. Of one that is missing
    says whoever opens it."""
    where = storage_of(storage)
    there = set(published(made.output)) if made.is_superseded else where.sizes(made.folder)
    outputs = {name: file for name, file in made.record.outputs.items() if name in there}
    bad = where.fetch(made.folder, outputs, DigestCache(storage).sha256s)
    if bad is not None:
        raise UserError(f"RUN={run.run}: {where.place(bad)} is not what was recorded; {_remedy(made)}")


def _remedy(made: RunRecord) -> str:
    if made.is_superseded:
        return "it was set aside when the stage was made again; export the run that did"
    return f"`vico run --force {made.record.stage}` makes it again"


def base_folder(run: RunFile) -> Path:
    """The folder of the model that the run started from."""
    given = Path(run.config["inputs"]["model"])
    base = given if given.is_absolute() else model_folder(str(given))
    if not (base / "config.json").is_file():
        raise UserError(
            f"RUN={run.run}: inputs.model={base} is gone; its config, template and digest go into an export, "
            "so put it there again"
        )
    return base


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` when all went well and is removed when not."""
    if out.exists() or out.is_symlink():
        raise UserError(f"OUT={out} exists; name a folder that does not, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"OUT={out}: the folder {out.parent} does not exist; create it first")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        sync_tree(partial)
        os.rename(partial, out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"OUT={out} cannot be written ({error}); give another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _json(made: RunRecord, name: str) -> dict:
    path = made.output / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is gone; {_remedy(made)}") from error
