"""`vico export`: write the model of a finished run as a folder in the layout of Hugging Face or of published
InternVL Flash models.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.shards.names import MANIFEST_FILE
from pipeline.config.graph import last_of
from pipeline.identity.file_digests import DigestCache
from pipeline.results.run_results import RunRecord, record_of
from pipeline.results.runs import RunFile, Runs
from pipeline.results.stage_folder import StageFolder
from pipeline.storage.lookup import storage_of
from pipeline.storage.output_files import published
from stages.durable_files import sync_folder, sync_tree
from stages.export.model_card import CARD_FILE, CardSources, Layout, model_card
from stages.export.start_model import start_model
from stages.export.thresholds import write_thresholds
from stages.outputs import METRICS_FILE, MODEL_FOLDER
from vico.checkpoints.hub import model_folder
from vico.errors import UserError

_STAGES = ("shard", "consistency", "router", "evaluate", "export")


def export(storage: Path, run_name: str, out: Path, layout: Layout) -> None:
    """Write the run's model to the folder `out`, completely or not at all.

    Raises UserError if the run is not done, if its results or its start model are gone, and if `out` exists
    or is not writable.
    """
    run = Runs(storage).named(run_name)
    results = stage_results(run, storage)
    base = base_folder(run)
    router, shards = _json(results["router"], METRICS_FILE), _json(results["shard"], MANIFEST_FILE)
    evaluation = _json(results["evaluate"], METRICS_FILE)
    threshold = evaluation["absolute_threshold"]
    with new_folder(out) as folder:
        from vico.checkpoints.write import write_hf_folder, write_published_folder  # imports torch

        source = results["export"].output / MODEL_FOLDER
        if layout == "flash":
            write_published_folder(source, folder, base=base, absolute_threshold=threshold)
        else:
            write_hf_folder(source, folder, absolute_threshold=threshold)
        sources = CardSources(
            start=start_model(base),
            manifest=shards,
            evaluation=evaluation,
            router=router,
            layout=layout,
            run=run.run,
        )
        (folder / CARD_FILE).write_text(model_card(sources), encoding="utf-8")
        write_thresholds(folder, evaluation)


def stage_results(run: RunFile, storage: Path) -> Mapping[str, RunRecord]:
    """Return the results that an export reads, as this run made or reused them, with their files available.

    A run with joint stages has the joint policy as `consistency` and the second router as `router`.

    Raises UserError if a stage is not done or its result is gone.
    """
    results = {}
    for role in _STAGES:
        name = last_of(run.stages, role)
        entry = run.stages.get(name)
        state = "not part of it" if entry is None else entry.state
        if entry is None or entry.state != "done":
            raise UserError(
                f"RUN={run.run}: its stage {name} is {state}; an export needs a run that is done, "
                "`vico run` resumes it"
            )
        result = _result(run, name, storage)
        _fetch(result, run, storage)
        if not result.output.is_dir():
            address = storage_of(storage).address(result.output)
            raise UserError(f"RUN={run.run}: {address} is gone; {_remedy(result)}")
        results[role] = result
    return results


def _result(run: RunFile, stage: str, storage: Path) -> RunRecord:
    """Return what the run made or reused of a stage. If another run has replaced it, the replacement counts
    only if its bytes are the same; else it is the superseded one."""
    folder = StageFolder(storage, stage, run.stages[stage].fingerprint)
    result, current = record_of(run, stage, storage), folder.record()
    if result is None:
        address = folder.storage.address(folder.path)
        replaced = f", where run {current.run} has put its own" if current is not None else ""
        raise UserError(
            f"RUN={run.run}: what it made of {stage} is gone from {address}{replaced}; "
            "`vico run` completes the newest run, export that"
        )
    if result.is_superseded and current is not None:
        same = current.output_digest == result.record.output_digest
        return RunRecord(current, folder.path) if same else result
    return result


def _fetch(result: RunRecord, run: RunFile, storage: Path) -> None:
    """Make the output available as files. Raises UserError if a file differs from the record; a missing file
    is an error of whatever opens it."""
    store = storage_of(storage)
    present = set(published(result.output)) if result.is_superseded else store.sizes(result.folder)
    outputs = {name: file for name, file in result.record.outputs.items() if name in present}
    bad = store.fetch(result.folder, outputs, DigestCache(storage).sha256s)
    if bad is not None:
        raise UserError(f"RUN={run.run}: {store.address(bad)} is not what was recorded; {_remedy(result)}")


def _remedy(result: RunRecord) -> str:
    if result.is_superseded:
        return "another run has made the stage again; export that run"
    return f"`vico run --force {result.record.stage}` makes it again"


def base_folder(run: RunFile) -> Path:
    """Return the folder of the model that the run started from. Raises UserError if it is gone."""
    model = Path(run.config["inputs"]["model"])
    base = model if model.is_absolute() else model_folder(str(model))
    if not (base / "config.json").is_file():
        raise UserError(
            f"RUN={run.run}: inputs.model={base} is gone; its config, template and digest go into an export, "
            "so put it there again"
        )
    return base


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` at the end, or removed after an exception.

    Raises UserError if `out` exists or is not writable.
    """
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
        raise UserError(f"OUT={out} is not writable ({error}); give another path") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _json(result: RunRecord, name: str) -> dict[str, Any]:
    path = result.output / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is gone; {_remedy(result)}") from error
