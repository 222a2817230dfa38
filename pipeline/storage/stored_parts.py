"""The parts of one stage in an object store: which there are (`parts.json`), how they get there and back.

Bytes lie under `parts/<stage>/<fingerprint>/<sha256>/<file name>`: the same whoever writes them. `parts.json`
is replaced only where nobody else has replaced it, and each attempt begins by doing so: what an attempt that
was taken over brings there afterwards is named nowhere.
"""

import json
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import Field

from data_prep.records.config import file_sha256
from pipeline.json_files import OutputFile, StoredModel
from pipeline.storage.folder import Conflict, Sha256s
from pipeline.storage.output_files import partials, published
from pipeline.storage.parts_journal import PartsNews
from pipeline.storage.working_copy import BYTES_PREFIX, PARTS_FILE, THREADS, WorkingCopy
from stages.durable_files import delete, locked
from stages.parts import HELD_FILE, JOURNAL_FILE, Parts, is_within
from stages.stops import LeaseLost
from vico.errors import UserError

logger = logging.getLogger(__name__)
_REMEDY = "--force its stage sets it aside"


class PartsFile(StoredModel):
    """parts.json. `record`: sha256 of the record.json that is believed; None before the stage is done."""

    attempt: int = 0
    nonce: str = ""
    record: str | None = None
    parts: dict[str, dict[str, OutputFile]] = Field(default_factory=dict)
    """Name of a part -> its files, by their names within the output."""

    @property
    def files(self) -> dict[str, OutputFile]:
        return {name: file for files in self.parts.values() for name, file in files.items()}

    def without(self, name: str) -> dict[str, dict[str, OutputFile]]:
        """The parts but this one, and those in a folder of that name."""
        return {own: files for own, files in self.parts.items() if not is_within(own, name)}


def read_parts(folder: Path) -> PartsFile:
    return PartsFile.read(folder / PARTS_FILE, _REMEDY) or PartsFile()


def _key(copy: WorkingCopy, folder: Path, name: str, sha256: str) -> str:
    return f"{BYTES_PREFIX}{copy.key(folder)}/{sha256}/{name.rpartition('/')[2]}"


def place_of(copy: WorkingCopy, path: Path) -> str:
    """Return the address of a file of the working copy in the store."""
    key = copy.key(path)
    stage, _, name = key.partition("/output/")
    if name:
        file = read_parts(copy.folder / stage).files.get(name)
        key = _key(copy, copy.folder / stage, name, file.sha256) if file else key
    return copy.bucket.address if key == "." else copy.bucket.place(key)


class StoredParts:
    """The parts of the stage whose folder in the working copy this is."""

    def __init__(
        self, copy: WorkingCopy, folder: Path, sha256s: Sha256s, ship: Callable[[Path], None] | None = None
    ):
        self.copy, self.folder, self.output = copy, folder, folder / "output"
        self._sha256s, self._ship = sha256s, ship
        self.attempt = 0
        self._news = PartsNews(self._logs / JOURNAL_FILE, self.output)
        self._settled = False
        self._changing = threading.Lock()
        """Held while parts.json is changed: the stage's thread and the one in the background take turns."""

    def key(self, name: str, sha256: str) -> str:
        return _key(self.copy, self.folder, name, sha256)

    def fetch(self, files: Mapping[str, OutputFile], sha256s: Sha256s) -> Path | None:
        """Have these files in the output; the first that the store has with other bytes, or not at all."""
        sized = [name for name, file in files.items() if _size(self.output / name) == file.bytes]
        found = zip(sized, sha256s([self.output / name for name in sized]), strict=True)
        here = {name for name, sha256 in found if sha256 == files[name].sha256}
        missing = {name: file for name, file in files.items() if name not in here}
        self._refuse_small_disk(sum(file.bytes for file in missing.values()))
        with ThreadPoolExecutor(THREADS) as pool:
            whole = list(pool.map(lambda item: self._download(*item), missing.items()))
        return next((self.output / name for name, ok in zip(missing, whole, strict=True) if not ok), None)

    def begin(self, attempt: int) -> None:
        """Have all parts here that earlier attempts finished, and nothing else; fence those attempts off."""
        for leftover in list(partials(self.output)):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        stored = read_parts(self.folder)
        while (bad := self.fetch(stored.files, self._sha256s)) is not None:
            logger.warning("%s is damaged or gone; its part is made again", place_of(self.copy, bad))
            name = bad.relative_to(self.output).as_posix()
            stored.parts = {part: files for part, files in stored.parts.items() if name not in files}
        for name in set(published(self.output)) - set(stored.files):
            (self.output / name).unlink()  # of an attempt that did not bring it to the store
        _remove_empty_folders(self.output)
        self.attempt, self._settled = attempt, False
        self._news = PartsNews(self._logs / JOURNAL_FILE, self.output)
        self._replace(stored.parts)

    def publish_new(self) -> None:
        """Bring the parts to the store that the journal of the attempt names since the last call, in its
        order."""
        with self._changing:
            if self._news.journal.exists() and not self._settled:
                self._follow(self._news)

    @property
    def _logs(self) -> Path:
        return self.folder / "attempts" / str(self.attempt)

    def _follow(self, news: PartsNews) -> None:
        """Files first and the newest of each kind of folder (checkpoints): where the store is slower than the
        stage, the newest that there is gets there, and none is dropped before a newer one is named."""
        while True:
            with locked(self.folder):
                news.read()
                batch = news.next_batch()
                self._hold(batch)
            if not batch and not news.dropped:
                return
            try:
                self._bring(batch)
            finally:
                with locked(self.folder):
                    news.read()
                    gone = self._let_go(batch)
                for path in gone:
                    delete(path)

    def _hold(self, batch: list[str]) -> None:
        """Keep these parts here until they are let go, whatever the stage removes."""
        held = self._logs / HELD_FILE
        held.write_text(json.dumps(batch)) if batch else held.unlink(missing_ok=True)

    def _let_go(self, batch: list[str]) -> list[Path]:
        """Hold these parts no longer; what the stage removed meanwhile and left to us, out of sight."""
        (self._logs / HELD_FILE).unlink(missing_ok=True)
        removed = [part for part in batch if any(is_within(part, name) for name in self._news.dropped)]
        here = [self.output / part for part in removed if (self.output / part).exists()]
        return [Parts(self.folder, self.attempt).out_of_sight(path) for path in here]

    def settle(self) -> None:
        """Make the store name every file of the output, and nothing else; nothing is published after that."""
        with self._changing:
            self._ship(self._logs)
            self._settle()
            self._settled = True

    def _settle(self) -> None:
        stored = read_parts(self.folder)
        names = sorted(published(self.output))
        sha256s = self._sha256s([self.output / name for name in names])
        now = {
            name: OutputFile(bytes=(self.output / name).stat().st_size, sha256=sha256)
            for name, sha256 in zip(names, sha256s, strict=True)
        }
        if now == stored.files:
            return
        kept = {name: files for name, files in stored.parts.items() if files.items() <= now.items()}
        held = {name for files in kept.values() for name in files}
        more = {name: {name: file} for name, file in now.items() if name not in held}
        self._upload({name: file for files in more.values() for name, file in files.items()})
        self._replace({**kept, **more})
        self._delete_unnamed(stored)

    def commit(self, record_sha256: str) -> None:
        """Say which record.json is believed. Raises LeaseLost when another attempt has begun."""
        self._replace(read_parts(self.folder).parts, record_sha256)

    def set_aside(self, aside: Path, damaged: Iterable[str] | None) -> None:
        """Name no part any more, or all but those with a damaged file; superseded/<n> gets the old list."""
        stored = read_parts(self.folder)
        kept = {
            name: files
            for name, files in stored.parts.items()
            if damaged is not None and not set(files) & set(damaged)
        }
        self.copy.write(aside / PARTS_FILE, stored.content())
        self._replace(kept)

    def _bring(self, batch: list[str]) -> None:
        """Upload the parts of a batch; then the store names them, and no longer those that were dropped."""
        stored, dropped = read_parts(self.folder), list(self._news.dropped)
        known = {self.key(name, file.sha256) for name, file in stored.files.items()}  # under an earlier name
        new = {}
        for part in batch:
            files = self._files_of(part)
            try:
                more = {one: file for one, file in files.items() if self.key(one, file.sha256) not in known}
                self._upload(more)
            except FileNotFoundError:
                logger.warning("%s is gone and was not brought to the store", self.output / part)
                continue
            new |= {part: files} if files else {}
        kept = stored
        for name in dropped:
            kept = PartsFile(parts=kept.without(name))
        if new or kept.parts != stored.parts:
            if new:
                self._ship(self._logs)  # no part without the metrics of the steps in it
            self._replace({**kept.parts, **new})
            self._delete_unnamed(stored)
        self._news.done(batch, dropped)

    def _files_of(self, part: str) -> dict[str, OutputFile]:
        """The files of a published part; none of one that the stage has dropped since."""
        path = self.output / part
        names = [part] if path.is_file() else [f"{part}/{inner}" for inner in sorted(published(path))]
        try:
            sha256s = self._sha256s([self.output / name for name in names])
            return {
                name: OutputFile(bytes=(self.output / name).stat().st_size, sha256=sha256)
                for name, sha256 in zip(names, sha256s, strict=True)
            }
        except FileNotFoundError:
            return {}

    def _replace(self, parts: Mapping[str, Mapping[str, OutputFile]], record: str | None = None) -> None:
        new = PartsFile(
            attempt=self.attempt, nonce=secrets.token_hex(8), record=record, parts={**parts}
        ).content()
        try:
            self.copy.write(self.folder / PARTS_FILE, new)
        except Conflict as error:
            raise LeaseLost(f"another driver works on {place_of(self.copy, self.folder)} now") from error

    def _upload(self, files: Mapping[str, OutputFile]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(
                pool.map(
                    lambda item: self.copy.bucket.upload(
                        self.key(item[0], item[1].sha256), self.output / item[0]
                    ),
                    files.items(),
                )
            )

    def _delete_unnamed(self, before: PartsFile) -> None:
        """Delete the bytes of an earlier list that none names now, those of superseded results included."""
        lists = [self.folder, *self.folder.glob("superseded/*")]
        named = {self.key(name, file.sha256) for one in lists for name, file in read_parts(one).files.items()}
        keys = {self.key(name, file.sha256) for name, file in before.files.items()}
        self.copy.bucket.delete(sorted(keys - named))

    def _download(self, name: str, file: OutputFile) -> bool:
        target = self.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # Several commands may fetch the same file at once: readers hold no lease of it.
        partial = target.parent / f".{target.name}.partial-{secrets.token_hex(8)}"
        try:
            with partial.open("wb") as out:
                for window in self.copy.bucket.windows(self.key(name, file.sha256), file.bytes):
                    out.write(window)
            if file_sha256(partial) == file.sha256:
                os.replace(partial, target)
                return True
        except FileNotFoundError:
            pass
        partial.unlink(missing_ok=True)
        return False

    def _refuse_small_disk(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self.copy.folder).free
        if num_bytes > free:
            raise UserError(
                f"work={self.copy.folder} has {free / 1e9:.1f} GB free, {self.folder.parent.name} needs "
                f"{num_bytes / 1e9:.1f} GB of {self.copy.bucket.address} there; free space or set `work` "
                "in the site to a larger disk"
            )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _remove_empty_folders(output: Path) -> None:
    for parent, _, _ in os.walk(output, topdown=False):
        if parent != str(output) and not os.listdir(parent):
            os.rmdir(parent)
