"""Finished and unfinished results of stages in the storage: `<storage>/<stage>/<fingerprint>/`.

`record.json` is written last, and it alone means done; it counts only while its outputs exist and its
inputs are those that it was made from.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.identity.file_digests import file_sha256s
from pipeline.identity.fingerprints import stage_fingerprint
from pipeline.json_files import OutputFile
from pipeline.results.records import (
    ATTEMPT_FILE,
    RECORD_FILE,
    AttemptFile,
    Record,
    outputs_digest,
    record_digest,
)
from pipeline.storage.folder import Sha256s
from pipeline.storage.lease import Lease
from pipeline.storage.lookup import storage_of
from pipeline.storage.output_files import published
from stages.parts import Parts
from vico.errors import UserError
from vico.own_files import check_inside


@dataclass(frozen=True)
class Damage:
    """Outputs of a record that are missing or have another size; false if there are none."""

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
        """Return the record, or None if there is none.

        Raises UserError if the record is damaged or does not belong in this folder.
        """
        remedy = f"--force {self.stage} moves it to superseded/ and runs the stage again"
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
        return record if self.storage.is_committed(self.path) else None

    def refuse_edited(self, record: Record) -> None:
        """Raise UserError if somebody changed the record, in fields that nothing else in it checks either."""
        content = json.loads(self.record_path.read_text(encoding="utf-8"))
        if record.record_digest is not None and record_digest(content) != record.record_digest:
            raise UserError(
                f"{self.storage.address(self.record_path)} was edited (record_digest does not fit its "
                f"content); restore it, or --force {self.stage} moves it to superseded/ and runs the stage "
                "again"
            )

    def damage(self, record: Record) -> Damage:
        """Return the outputs that are missing or have another size; only the audit reads contents."""
        sizes = self.storage.sizes(self.path)
        missing = tuple(name for name in record.outputs if name not in sizes)
        resized = tuple(
            name for name, file in record.outputs.items() if sizes.get(name, file.bytes) != file.bytes
        )
        return Damage(missing, resized)

    def last_attempt(self) -> int:
        """Return the highest number of an attempt that began, 0 if none did."""
        folders = [*self.path.glob("attempts/*"), *self.path.glob("superseded/*/attempts/*")]
        return max((int(path.name) for path in folders if path.name.isdigit()), default=0)

    def last_attempt_file(self) -> AttemptFile | None:
        """Return the file of the last attempt whose parts are in the output."""
        return next(iter(reversed(self.attempt_files())), None)

    def attempt_files(self) -> list[AttemptFile]:
        """Return the files of all attempts whose parts may be in the output, oldest first."""
        found = self.path.glob(f"attempts/*/{ATTEMPT_FILE}")
        numbered = (path for path in found if path.parent.name.isdigit())  # not a copy of one, such as 1.bak
        paths = sorted(numbered, key=lambda path: int(path.parent.name))
        remedy = f"--force {self.stage} starts the stage from scratch"
        files = (AttemptFile.read(path, remedy) for path in paths)
        return [file for file in files if file is not None]

    def fetch(self, record: Record, sha256s: Sha256s) -> Path | None:
        """Make the outputs readable on this machine; return the first whose bytes differ, or None."""
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
        packages: Mapping[str, str] | None = None,
    ) -> Parts:
        """Begin an attempt: create its folder, keep published parts of earlier attempts, remove
        half-written ones.

        `sources` are the digests of the code that makes the attempt's parts, `packages` the versions of what
        is installed.
        """
        parts = Parts(self.path, lease.attempt)
        attempt_file = AttemptFile(
            attempt=lease.attempt,
            run=lease.holder.run,
            started=started,
            inputs=dict(inputs),
            sources=dict(sources or {}),
            packages=dict(packages or {}),
            expected=sorted(expected),
        )
        with lease.writing():
            for path in (self.output, parts.attempt_folder):
                check_inside(path, self.path.parents[1])
            self.output.mkdir(exist_ok=True)
            parts.attempt_folder.mkdir(parents=True)
            self.storage.write(parts.attempt_folder / ATTEMPT_FILE, attempt_file.content())
        self.storage.begin(self.path, lease.attempt)
        return parts

    def supersede(self, lease: Lease) -> Path | None:
        """Move attempts, output and record to superseded/<n>, in this order: half of them never counts as a
        result. Return the new folder, or None if there is nothing to move."""
        names = ("attempts", self.output.name, RECORD_FILE)
        if not any(os.path.lexists(self.path / name) for name in names):
            return None
        with lease.writing():
            return self.storage.supersede(self.path, names)

    def supersede_record(self, lease: Lease, damage: Damage) -> Path:
        """Move the record and the damaged files to superseded/<n>; the next attempt continues with the other
        parts."""
        with lease.writing():
            return self.storage.supersede(self.path, [RECORD_FILE], [*damage.missing, *damage.resized])

    def finish(self, lease: Lease, record: Record) -> None:
        """Write the record, which makes the stage done; raise LeaseLost if another driver has taken over."""
        with lease.writing():
            content = record.content()
            self.storage.commit(self.record_path, {**content, "record_digest": record_digest(content)})

    def outputs(self, sha256s: Sha256s = file_sha256s) -> dict[str, OutputFile]:
        """Return every published file with its size and digest, sorted by name."""
        names = sorted(published(self.output))
        paths = [self.output / name for name in names]
        sizes = [path.stat().st_size for path in paths]
        return {
            name: OutputFile(bytes=size, sha256=sha256)
            for name, size, sha256 in zip(names, sizes, sha256s(paths), strict=True)
        }


def records_of(storage: Path, stage: str) -> list[Record]:
    """Return the readable records of a stage under all fingerprints, the latest last."""
    records = []
    for path in storage.glob(f"{stage}/*/{RECORD_FILE}"):
        try:
            record = StageFolder(storage, stage, path.parent.name).record()
        except UserError:
            continue  # reported by commands that need this very record; here it only serves to compare
        if record is not None:
            records.append(record)
    return sorted(records, key=lambda record: record.ended)
