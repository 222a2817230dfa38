"""The `inputs` block of a pipeline file: its fields, a check against the stages, and absolute paths."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from data_prep.records.config import RecordsConfig
from pipeline.config.graph import Graph
from vico.checkpoints.hub import model_folder, pinned_hub_id
from vico.errors import Faults
from vico.shown_text import CONTROL, printable


class Inputs(BaseModel):
    """What a pipeline reads from outside: records, held-out records, and the model to start from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    records: RecordsConfig
    """The rows to train on, from which the shard stage also splits off calibration and test samples."""
    heldout: RecordsConfig | None = None
    """Rows that are used only for testing. null: none, and the test samples come from `records`."""
    model: Path
    """The model to start from: a folder, or a Hub id as `owner/name` or `owner/name@revision`."""
    repaired: tuple[Path, ...] = ()
    """Files of repaired rows, in order. Each file repairs rows that were quarantined with the files before it
    (`vico data retry`)."""
    adopt: dict[str, Path] = {}
    """Stage -> folder with a result that was made elsewhere. The stage does not run; its result is copied and
    identified by the digest of its files."""

    @model_validator(mode="after")
    def _paths_have_no_control_characters(self) -> Self:
        for field, path in _paths(self):
            if CONTROL.search(str(path)):
                raise ValueError(
                    f"inputs.{field}={printable(path)} has a line break or a control character; give a path "
                    "without, such as a link"
                )
        return self

    @property
    def model_folder(self) -> Path:
        """The model's folder on this machine. A model on the Hub is downloaded if it is not here yet; raises
        what `vico.checkpoints.hub.model_folder` raises."""
        return self.model if self.model.is_absolute() else model_folder(str(self.model))


def _paths(inputs: Inputs) -> Iterator[tuple[str, Path | str]]:
    """Yield (field, path) of everything that a pipeline reads."""
    yield "model", inputs.model
    yield from (("repaired", path) for path in inputs.repaired)
    yield from ((f"adopt.{stage}", folder) for stage, folder in inputs.adopt.items())
    for name, records in (("records", inputs.records), ("heldout", inputs.heldout)):
        for source in (records, *records.sources) if records is not None else ():
            for field, path in (("path", source.path), ("root", source.root)):
                if path is not None:
                    yield f"{name}.{field}", path


def check_inputs(inputs: Inputs, graph: Graph) -> None:
    """Raise UserError if an adopted stage does not exist, or would have to read repaired rows: it does not
    run, so they would have no effect."""
    faults = Faults()
    for stage in inputs.adopt:
        with faults.collected():
            graph.check_name(stage, "inputs.adopt")
    for spec in graph.stages:
        if inputs.repaired and spec.name in inputs.adopt and "repaired" in spec.inputs:
            faults.note(
                f"inputs.repaired={', '.join(map(str, inputs.repaired))} has no effect while "
                f"inputs.adopt.{spec.name}={inputs.adopt[spec.name]} takes its result from elsewhere; "
                f"leave out inputs.repaired or inputs.adopt.{spec.name}"
            )
    faults.raise_all()


def with_absolute_paths(inputs: Inputs, *, pin_model: bool = True) -> Inputs:
    """Return the inputs with absolute paths, and with `pin_model` a Hub model with its commit.

    A relative path starts from the working directory of the command; workers have another one.
    """
    return inputs.model_copy(
        update={
            "records": _with_absolute_records(inputs.records),
            "heldout": None if inputs.heldout is None else _with_absolute_records(inputs.heldout),
            "model": _pinned_model(inputs.model) if pin_model else inputs.model,
            "repaired": tuple(_absolute(path) for path in inputs.repaired),
            "adopt": {stage: _absolute(folder) for stage, folder in inputs.adopt.items()},
        }
    )


def _with_absolute_records(records: RecordsConfig) -> RecordsConfig:
    return records.model_copy(
        update={
            "path": _absolute_address(records.path),
            "root": _absolute_address(records.root),
            "sources": tuple(map(_with_absolute_records, records.sources)),
        }
    )


def _pinned_model(model: Path) -> Path:
    """Return the absolute path, or the Hub id with the commit it means now, so that a resumed, submitted or
    reproduced run takes the same one. If `owner` is a folder here, `owner/name` is a path."""
    hub_id = pinned_hub_id(str(model))
    return _absolute(model) if hub_id is None else Path(hub_id)


def _absolute_address(path: str | None) -> str | None:
    """Return an absolute path; an address such as s3:// stays as it is."""
    return path if path is None or "://" in path else str(_absolute(Path(path)))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))
