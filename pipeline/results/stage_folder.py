"""Finished and unfinished results of stages in the storage: `<storage>/<stage>/<fingerprint>/`.

`record.json` is written last and alone means done; it is believed only while its outputs are there and its
inputs are the ones it was made from.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.identity.file_digests import file_sha256s
from pipeline.identity.fingerprints import digest, stage_fingerprint
from pipeline.json_files import OutputFile, StoredModel
from pipeline.storage.lease import Lease
from pipeline.storage.lookup import storage_of
from pipeline.storage.output_files import published
from stages.parts import Parts
from vico.errors import UserError

RECORD_FILE = "record.json"


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
    sources: dict[str, str] = Field(default_factory=dict)
    """Source file -> sha256 as it was; empty where that was not noted."""
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
        self.storage = storage_of(storage)

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
        return record if self.storage.is_believed(self.path) else None

    def refuse_edited(self, record: Record) -> None:
        """UserError for a record that somebody changed where nothing else in it would tell."""
        content = json.loads(self.record_path.read_text(encoding="utf-8"))
        if record.record_digest is not None and record_digest(content) != record.record_digest:
            raise UserError(
                f"{self.storage.place(self.record_path)} was edited (record_digest does not fit its "
                f"content); put it back, or --force {self.stage} sets it aside and runs the stage again"
            )

    def damage(self, record: Record) -> Damage:
        """Outputs that are not there or not of the recorded size; contents are the audit's to read."""
        sizes = self.storage.sizes(self.path)
        missing = tuple(name for name in record.outputs if name not in sizes)
        resized = tuple(
            name for name, file in record.outputs.items() if sizes.get(name, file.bytes) != file.bytes
        )
        return Damage(missing, resized)

    def last_attempt(self) -> int:
        """The highest attempt number that was begun, 0 if none was."""
        found = [*self.path.glob("attempts/*"), *self.path.glob("superseded/*/attempts/*")]
        return max((int(path.name) for path in found if path.name.isdigit()), default=0)

    def last_attempt_file(self) -> AttemptFile | None:
        """The file of the latest attempt whose parts are in the output."""
        return next(iter(reversed(self.attempt_files())), None)

    def attempt_files(self) -> list[AttemptFile]:
        """Those of all attempts whose parts may be in the output, oldest first."""
        paths = sorted(self.path.glob("attempts/*/attempt.json"), key=lambda path: int(path.parent.name))
        remedy = f"--force {self.stage} starts the stage afresh"
        found = (AttemptFile.read(path, remedy) for path in paths)
        return [file for file in found if file is not None]

    def fetch(self, record: Record, sha256s: Callable[[list[Path]], list[str]]) -> Path | None:
        """Make the outputs readable here; the first output whose bytes are not those recorded."""
        return self.storage.fetch(self.path, record.outputs, sha256s)

    def has_output(self) -> bool:
        return bool(self.storage.sizes(self.path))

    def begin(
        self,
        lease: Lease,
        inputs: Mapping[str, str],
        expected: Iterable[str],
        started: str,
        sources: Mapping[str, str] | None = None,
    ) -> Parts:
        """Make the attempt's folder; what earlier attempts published is there, what they left half-written is
        not. `sources`: digests of the code that makes the attempt's parts."""
        parts = Parts(self.path, lease.attempt)
        begun = AttemptFile(
            attempt=lease.attempt,
            run=lease.holder.run,
            started=started,
            inputs=dict(inputs),
            sources=dict(sources or {}),
            expected=sorted(expected),
        )
        with lease.writing():
            self.output.mkdir(exist_ok=True)
            parts.attempt_folder.mkdir(parents=True)
            self.storage.write(parts.attempt_folder / "attempt.json", begun.content())
        self.storage.begin(self.path, lease.attempt)
        return parts

    def set_aside(self, lease: Lease) -> Path | None:
        """Move attempts, output and record to superseded/<n>, in this order: at no time is half of it
        believed."""
        names = ("attempts", self.output.name, RECORD_FILE)
        if not any((self.path / name).exists() for name in names):
            return None
        with lease.writing():
            return self.storage.set_aside(self.path, names)

    def set_record_aside(self, lease: Lease, damage: Damage) -> Path:
        """Move the record and the damaged files to superseded/<n>; the other parts stay and are gone on
        with."""
        with lease.writing():
            return self.storage.set_aside(self.path, [RECORD_FILE], [*damage.missing, *damage.resized])

    def finish(self, lease: Lease, record: Record) -> None:
        """Write the record, which makes the stage done; raises LeaseLost when another driver has taken
        over."""
        with lease.writing():
            content = record.content()
            self.storage.commit(self.record_path, {**content, "record_digest": record_digest(content)})

    def outputs(self, sha256s: Callable[[list[Path]], list[str]] = file_sha256s) -> dict[str, OutputFile]:
        """Every published file with its size and digest, sorted by name."""
        names = sorted(published(self.output))
        paths = [self.output / name for name in names]
        sizes = [path.stat().st_size for path in paths]
        return {
            name: OutputFile(bytes=size, sha256=sha256)
            for name, size, sha256 in zip(names, sizes, sha256s(paths), strict=True)
        }


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
