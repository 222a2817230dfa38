"""Finished and unfinished results of stages on disk: `<storage>/<stage>/<fingerprint>/`.

`record.json` is written last and alone means done; it is believed only while its outputs are there and its
inputs are the ones it was made from.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.digests import file_sha256s
from pipeline.identity import digest, stage_fingerprint
from pipeline.json_files import StoredModel, write_json
from pipeline.lease import Lease
from stages.parts import Parts, sync_folder
from vico.errors import UserError

RECORD_FILE = "record.json"


class OutputFile(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    bytes: int
    sha256: str


class Record(StoredModel):
    """record.json: what was made, from what, by which code, where."""

    stage: str
    fingerprint: str
    identity: dict[str, Any]
    attempt: int
    run: str
    git: dict[str, Any]
    source_digest: str
    sources: dict[str, str]
    packages: dict[str, str]
    outputs: dict[str, OutputFile]
    output_digest: str
    inputs: dict[str, str]
    counts: dict[str, Any]
    seconds: float
    started: str
    ended: str
    site: str
    facts: dict[str, Any]
    mlflow_run_id: str | None = None
    record_digest: str | None = None
    """Of all the rest of the file, by `finish`; the audit sees by it what was edited by hand."""


class AttemptFile(StoredModel):
    """attempts/<n>/attempt.json, written before the attempt's first part."""

    attempt: int
    run: str
    started: str
    inputs: dict[str, str]
    """Digests of what the parts are made from; parts made from something else are not gone on with."""
    expected: list[str] = Field(default_factory=list)
    """Outputs that an earlier record names and that were found missing or damaged; the stage must make
    them again."""


@dataclass(frozen=True)
class Damage:
    """What keeps a record from being believed: outputs that are missing or have another size."""

    missing: tuple[str, ...]
    resized: tuple[str, ...]

    def __str__(self) -> str:
        words = [f"output/{name} is missing" for name in self.missing]
        words += [f"output/{name} has another size than recorded" for name in self.resized]
        more = f" and {len(words) - 1} more" if len(words) > 1 else ""
        return words[0] + more

    def __bool__(self) -> bool:
        return bool(self.missing or self.resized)


NO_DAMAGE = Damage((), ())


class StageFolder:
    """The folder of one stage under one fingerprint."""

    def __init__(self, storage: Path, stage: str, fingerprint: str):
        self.stage, self.fingerprint = stage, fingerprint
        self.path = storage / stage / fingerprint
        self.output = self.path / "output"
        self.record_path = self.path / RECORD_FILE

    def record(self) -> Record | None:
        """The record, None if there is none; UserError if it is damaged or does not belong here."""
        remedy = f"--force {self.stage} sets it aside and runs the stage again"
        record = Record.read(self.record_path, remedy)
        if record is None:
            return None
        identity_is_right = stage_fingerprint(record.stage, record.identity) == record.fingerprint
        if (record.stage, record.fingerprint) != (self.stage, self.fingerprint) or not identity_is_right:
            raise UserError(f"{self.record_path} does not belong here (its identity differs); {remedy}")
        if outputs_digest(record.outputs) != record.output_digest:
            raise UserError(
                f"{self.record_path} was changed (output_digest does not fit its outputs); {remedy}"
            )
        return record

    def damage(self, record: Record) -> Damage:
        """Outputs that are not there or not of the recorded size; contents are the audit's to read."""
        missing, resized = [], []
        for name, file in record.outputs.items():
            path = self.output / name
            if not path.is_file():
                missing.append(name)
            elif path.stat().st_size != file.bytes:
                resized.append(name)
        return Damage(tuple(missing), tuple(resized))

    def last_attempt(self) -> int:
        """The highest attempt number that was begun, 0 if none was."""
        found = [*self.path.glob("attempts/*"), *self.path.glob("superseded/*/attempts/*")]
        return max((int(path.name) for path in found if path.name.isdigit()), default=0)

    def last_attempt_file(self) -> AttemptFile | None:
        """The file of the latest attempt whose parts are in the output."""
        paths = self.path.glob("attempts/*/attempt.json")
        latest = max(paths, key=lambda path: int(path.parent.name), default=None)
        return AttemptFile.read(latest, f"--force {self.stage} starts the stage afresh") if latest else None

    def changed(self, record: Record, sha256s: Callable[[list[Path]], list[str]]) -> Path | None:
        """The first output whose bytes are not those recorded."""
        paths = [self.output / name for name in record.outputs]
        found = zip(paths, sha256s(paths), record.outputs.values(), strict=True)
        return next((path for path, sha256, file in found if sha256 != file.sha256), None)

    def has_output(self) -> bool:
        return self.output.is_dir() and any(self.output.iterdir())

    def begin(self, lease: Lease, inputs: Mapping[str, str], expected: Iterable[str], started: str) -> Parts:
        """Make the attempt's folder and clear what earlier attempts left half-written."""
        parts = Parts(self.path, lease.attempt)
        begun = AttemptFile(
            attempt=lease.attempt,
            run=lease.holder.run,
            started=started,
            inputs=dict(inputs),
            expected=sorted(expected),
        )
        with lease.writing():
            self.output.mkdir(exist_ok=True)
            parts.attempt_folder.mkdir(parents=True)
            begun.write(parts.attempt_folder / "attempt.json")
        for leftover in list(partials(self.output)):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return parts

    def set_aside(self, lease: Lease) -> Path | None:
        """Move attempts, output and record to superseded/<n>, in this order: at no time is half of it
        believed."""
        present = [path for path in (self.path / "attempts", self.output, self.record_path) if path.exists()]
        if not present:
            return None
        with lease.writing():
            aside = self._superseded()
            for path in present:
                os.rename(path, aside / path.name)
            sync_folder(self.path)
        return aside

    def set_record_aside(self, lease: Lease, damage: Damage) -> Path:
        """Move the record and the damaged files to superseded/<n>; the other parts stay and are gone on
        with."""
        with lease.writing():
            aside = self._superseded()
            for name in damage.resized:
                target = aside / "output" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(self.output / name, target)
            os.rename(self.record_path, aside / RECORD_FILE)
            sync_folder(self.path)
        return aside

    def finish(self, lease: Lease, record: Record) -> None:
        """Write the record, which makes the stage done; raises LeaseLost when another driver has taken
        over."""
        with lease.writing():
            content = record.model_dump(mode="json", by_alias=True)
            write_json(self.record_path, {**content, "record_digest": record_digest(content)})

    def output_names(self) -> list[str]:
        return sorted(_published(self.output))

    def outputs(self, sha256s: Callable[[list[Path]], list[str]] = file_sha256s) -> dict[str, OutputFile]:
        """Every published file with its size and digest, sorted by name."""
        names = self.output_names()
        paths = [self.output / name for name in names]
        sizes = [path.stat().st_size for path in paths]
        return {
            name: OutputFile(bytes=size, sha256=sha256)
            for name, size, sha256 in zip(names, sizes, sha256s(paths), strict=True)
        }

    def _superseded(self) -> Path:
        number = 1
        while True:
            folder = self.path / "superseded" / str(number)
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1


def outputs_digest(outputs: Mapping[str, OutputFile]) -> str:
    """One digest over names, sizes and contents of a stage's output."""
    return digest({name: file.model_dump() for name, file in outputs.items()})


def record_digest(content: Mapping[str, Any]) -> str:
    """Digest of a record.json by its content, its own digest left out."""
    rest = {name: value for name, value in content.items() if name != "record_digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def records_of(storage: Path, stage: str) -> list[Record]:
    """The readable records of a stage under all fingerprints, the latest last."""
    found = []
    for path in storage.glob(f"{stage}/*/{RECORD_FILE}"):
        try:
            record = StageFolder(storage, stage, path.parent.name).record()
        except UserError:
            continue  # whoever needs that very record is told; here it is only compared with
        if record is not None:
            found.append(record)
    return sorted(found, key=lambda record: record.ended)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and ".partial-" in name


def partials(output: Path) -> Iterator[Path]:
    """Files and folders of an output that were not published."""
    for parent, folders, files in os.walk(output):
        for name in [*folders, *files]:
            if _is_partial(name):
                yield Path(parent, name)
        folders[:] = [name for name in folders if not _is_partial(name)]


def _published(output: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(output):
        folders[:] = [name for name in folders if not _is_partial(name)]
        for name in files:
            if not _is_partial(name):
                yield os.path.relpath(os.path.join(parent, name), output)
