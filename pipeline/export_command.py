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

from pipeline.digests import DigestCache
from pipeline.runs import RunFile, Runs
from pipeline.store import StageFolder
from stages.export import MODEL_FOLDER, weights_digest
from stages.model_card import model_card, stated_licence
from stages.parts import sync_folder, sync_tree
from vico.errors import UserError

ExportLayout = Literal["flash", "hf"]
_STAGES = ("shard", "consistency", "router", "evaluate", "export")


def export(storage: Path, run_name: str, out: Path, layout: ExportLayout) -> None:
    """Writes the run's model to `out`, whole or not at all.

    Raises UserError for a run that is not done, results or a base model that are gone, and a place that
    exists or cannot be written.
    """
    from vico.layout_folders import write_hf_folder, write_published_folder

    run = Runs(storage).named(run_name)
    outputs = stage_outputs(run, storage)
    base = base_folder(run)
    router, shards = _json(outputs["router"] / "metrics.json"), _json(outputs["shard"] / "manifest.json")
    threshold = router["absolute_threshold"]
    with whole_folder(out) as folder:
        source = outputs["export"] / MODEL_FOLDER
        if layout == "flash":
            write_published_folder(source, folder, base=base, absolute_threshold=threshold)
        else:
            write_hf_folder(source, folder, absolute_threshold=threshold)
        card = model_card(
            base=weights_digest(base),
            licence=stated_licence(base),
            data=shards,
            metrics=_json(outputs["evaluate"] / "metrics.json"),
            router=router,
            layout=layout,
            run=run.run,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def stage_outputs(run: RunFile, storage: Path) -> Mapping[str, Path]:
    """Output folders of the stages that an export reads; UserError where one is not done or gone."""
    found = {}
    for name in _STAGES:
        entry = run.stages.get(name)
        state = "not part of it" if entry is None else entry.state
        if entry is None or entry.state != "done":
            raise UserError(
                f"RUN={run.run}: its stage {name} is {state}; an export needs a run that is done, "
                "`vico run` goes on with it"
            )
        folder = StageFolder(storage, name, entry.fingerprint)
        _fetch(folder, run)
        if not folder.output.is_dir():
            raise UserError(
                f"RUN={run.run}: {folder.storage.place(folder.output)} is gone; `vico run` makes it again"
            )
        found[name] = folder.output
    return found


def _fetch(folder: StageFolder, run: RunFile) -> None:
    """Have the output at hand; UserError when a file of it is not what was recorded."""
    record = folder.record()
    if record is None or folder.damage(record):
        return  # whoever opens a file of it says what is missing
    bad = folder.fetch(record, DigestCache(folder.path.parents[1]).sha256s)
    if bad is not None:
        raise UserError(
            f"RUN={run.run}: {folder.storage.place(bad)} is not what was recorded; "
            f"`vico run --force {folder.stage}` makes it again"
        )


def base_folder(run: RunFile) -> Path:
    """The folder of the model that the run started from."""
    base = Path(run.config["inputs"]["model"])
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


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is gone; `vico run --force {path.parents[2].name}` makes it again"
        ) from error
