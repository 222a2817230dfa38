"""The parts of a stage in an object store, as the attempt that works on the stage uploads and lists them.

parts.json is replaced only if nobody else replaced it since it was read, and every attempt begins by
replacing it: what an attempt uploads after another one took over is listed nowhere.
"""

import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.json_files import OutputFile, write_bytes
from pipeline.storage.folder import Conflict, Sha256s
from pipeline.storage.output_files import published, remove_partials
from pipeline.storage.part_downloads import download_files
from pipeline.storage.parts_file import PartsFile, address_of, file_key, file_keys, read_parts
from pipeline.storage.parts_journal import PartsJournal
from pipeline.storage.working_copy import PARTS_FILE, THREADS, WorkingCopy
from stages.durable_files import delete, locked
from stages.parts import HELD_FILE, JOURNAL_FILE, Parts, is_within
from stages.stops import LeaseLost

logger = logging.getLogger(__name__)


class StoredParts:
    """The parts of the stage with this folder in the working copy.

    `sha256s` computes digests of local files; `ship` uploads the logs of an attempt.
    """

    def __init__(self, copy: WorkingCopy, folder: Path, sha256s: Sha256s, ship: Callable[[Path], None]):
        self.copy, self.folder, self.output = copy, folder, folder / "output"
        self._sha256s, self._ship = sha256s, ship
        self.attempt = 0
        self._journal = PartsJournal(self._logs / JOURNAL_FILE, self.output)
        self._flushed = False
        self._changing = threading.Lock()
        """Held while parts.json is changed, by the stage's thread or the one in the background."""

    @property
    def _logs(self) -> Path:
        return self.folder / "attempts" / str(self.attempt)

    def begin(self, attempt: int) -> None:
        """Fetch all parts that earlier attempts finished, remove everything else from the output, and prevent
        those attempts from publishing more."""
        remove_partials(self.output)
        stored = read_parts(self.folder)
        while (damaged := download_files(self.copy, self.folder, stored.files, self._sha256s)) is not None:
            logger.warning("%s is damaged or gone; its part is made again", address_of(self.copy, damaged))
            name = damaged.relative_to(self.output).as_posix()
            stored.parts = {part: files for part, files in stored.parts.items() if name not in files}
        for name in set(published(self.output)) - set(stored.files):
            (self.output / name).unlink()  # of an attempt that did not upload it
        _remove_empty_folders(self.output)
        self.attempt, self._flushed = attempt, False
        self._journal = PartsJournal(self._logs / JOURNAL_FILE, self.output)
        self._replace(stored.parts)

    def fence(self, attempt: int) -> None:
        """Prevent all attempts before this one from listing more; what is listed stays."""
        stored = read_parts(self.folder)
        self.attempt = attempt
        self._replace(stored.parts, stored.record)

    def publish_new(self) -> None:
        """Upload the parts that the attempt's journal names since the last call, in its order."""
        with self._changing:
            if self._journal.path.exists() and not self._flushed:
                self._follow_journal()

    def _follow_journal(self) -> None:
        """Upload batch by batch until nothing waits.

        A batch has the files, and of each kind of folder (checkpoints) the newest: if the store is slower
        than the stage, the newest one is uploaded, and none is removed before a newer one is listed.
        """
        while True:
            with locked(self.folder):
                self._journal.read()
                batch = self._journal.next_batch()
                self._hold(batch)
            if not batch and not self._journal.removed:
                return
            try:
                self._upload_batch(batch)
            finally:
                with locked(self.folder):
                    self._journal.read()
                    hidden_paths = self._release(batch)
                for path in hidden_paths:
                    delete(path, self.folder.parents[1])

    def _hold(self, batch: list[str]) -> None:
        """Keep these parts in the output until `_release`, even if the stage removes them."""
        held = self._logs / HELD_FILE
        if batch:
            write_bytes(held, json.dumps(batch).encode())
        else:
            held.unlink(missing_ok=True)

    def _release(self, batch: list[str]) -> list[Path]:
        """Hold these parts no longer; hide those that the stage removed meanwhile and return their paths."""
        (self._logs / HELD_FILE).unlink(missing_ok=True)
        removed = [part for part in batch if any(is_within(part, name) for name in self._journal.removed)]
        paths = [self.output / part for part in removed if (self.output / part).exists()]
        return [Parts(self.folder, self.attempt).hide(path) for path in paths]

    def _upload_batch(self, batch: list[str]) -> None:
        """Upload the parts of a batch; then list them, and no longer those that the stage removed."""
        stored, removed = read_parts(self.folder), list(self._journal.removed)
        stored_keys = file_keys(self.copy, self.folder, [stored])  # a part may have had another name before
        uploaded: dict[str, dict[str, OutputFile]] = {}
        for part in batch:
            files = self._files_of(part)
            try:
                self._upload(
                    {
                        name: file
                        for name, file in files.items()
                        if file_key(self.copy, self.folder, name, file) not in stored_keys
                    }
                )
            except FileNotFoundError:
                logger.warning("%s is gone and was not uploaded", self.output / part)
                continue
            if files:
                uploaded[part] = files
        kept = stored
        for name in removed:
            kept = PartsFile(parts=kept.without(name))
        if uploaded or kept.parts != stored.parts:
            if uploaded:
                self._ship(self._logs)  # a part is listed only after the metrics of its steps
            self._replace({**kept.parts, **uploaded})
            self._delete_unlisted(stored)
        self._journal.mark_done(batch, removed)

    def flush(self) -> None:
        """List every file of the output and nothing else; `publish_new` does nothing after that."""
        with self._changing:
            self._ship(self._logs)
            self._list_output()
            self._flushed = True

    def _list_output(self) -> None:
        stored = read_parts(self.folder)
        output_files = self._output_files(sorted(published(self.output)))
        if output_files == stored.files:
            return
        kept = {name: files for name, files in stored.parts.items() if files.items() <= output_files.items()}
        kept_files = {name for files in kept.values() for name in files}
        new = {name: file for name, file in output_files.items() if name not in kept_files}
        self._upload(new)
        self._replace({**kept, **{name: {name: file} for name, file in new.items()}})
        self._delete_unlisted(stored)

    def commit(self, record_sha256: str) -> None:
        """Enter the digest of the committed record.json; raise LeaseLost if another attempt has begun."""
        self._replace(read_parts(self.folder).parts, record_sha256)

    def supersede(self, superseded: Path, damaged: Iterable[str] | None) -> None:
        """Write the current list to superseded/<n>; then list no part, or with `damaged` only the parts
        without one of these files."""
        stored = read_parts(self.folder)
        kept = {
            name: files
            for name, files in stored.parts.items()
            if damaged is not None and not set(files) & set(damaged)
        }
        self.copy.write(superseded / PARTS_FILE, stored.content())
        self._replace(kept)

    def _files_of(self, part: str) -> dict[str, OutputFile]:
        """Return the files of a published part; none if the stage has removed it since."""
        path = self.output / part
        names = [part] if path.is_file() else [f"{part}/{inner}" for inner in sorted(published(path))]
        try:
            return self._output_files(names)
        except FileNotFoundError:
            return {}

    def _output_files(self, names: list[str]) -> dict[str, OutputFile]:
        sha256s = self._sha256s([self.output / name for name in names])
        return {
            name: OutputFile(bytes=(self.output / name).stat().st_size, sha256=sha256)
            for name, sha256 in zip(names, sha256s, strict=True)
        }

    def _replace(self, parts: dict[str, dict[str, OutputFile]], record: str | None = None) -> None:
        new = PartsFile(attempt=self.attempt, nonce=secrets.token_hex(8), record=record, parts=parts)
        try:
            self.copy.write(self.folder / PARTS_FILE, new.content())
        except Conflict as error:
            raise LeaseLost(f"another driver works on {address_of(self.copy, self.folder)} now") from error

    def _upload(self, files: Mapping[str, OutputFile]) -> None:
        def upload(name: str) -> None:
            key = file_key(self.copy, self.folder, name, files[name])
            self.copy.bucket.upload(key, self.output / name)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(upload, files))

    def _delete_unlisted(self, before: PartsFile) -> None:
        """Delete the bytes of files of an earlier list that no list names now, also in superseded results."""
        folders = [self.folder, *self.folder.glob("superseded/*")]
        listed = file_keys(self.copy, self.folder, (read_parts(folder) for folder in folders))
        self.copy.bucket.delete(sorted(file_keys(self.copy, self.folder, [before]) - listed))


def _remove_empty_folders(output: Path) -> None:
    for parent, _, _ in os.walk(output, topdown=False):
        if parent != str(output) and not os.listdir(parent):
            os.rmdir(parent)
