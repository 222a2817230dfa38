"""Digests of files, remembered by what the file system says of them, and of the inputs from outside the
pipeline."""

import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from data_prep import storage
from data_prep.records import file_sha256
from data_prep.storage import Place
from pipeline.identity import digest
from pipeline.json_files import SCHEMA, write_json
from vico.errors import UserError

_THREADS = 4
_RACY_NS = 2_000_000_000
"""A file changed this shortly before it was read may change again within one tick of its clock."""

_MODEL_SUFFIXES_UNREAD = (".md", ".py", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf")
_MODEL_NAMES_UNREAD = ("LICENSE", "NOTICE", "README")
"""No loader of ours reads these: text and pictures about the model, and code, which is never run from
there."""


def file_sha256s(paths: Iterable[Path]) -> list[str]:
    """The digests of many files, read by several threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(file_sha256, paths))


class DigestCache:
    """sha256 of input files, kept in `<storage>/digests.json` so that planning need not read gigabytes
    again."""

    def __init__(self, storage: Path):
        self.path = storage / "digests.json"
        self._known = self._load()
        self._changed = False

    def sha256(self, path: Place) -> str:
        """The file's digest, from the cache while real path, size, times and inode are what they were; of a
        remote file, its size and version."""
        if isinstance(path, str):
            return self._remote_sha256(path)
        real = os.path.realpath(path)
        before = os.stat(real)
        mark = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino]
        known = self._known.get(real)
        if known is not None and known[:-1] == mark:
            return known[-1]
        value = file_sha256(Path(real))
        if time.time_ns() - max(before.st_mtime_ns, before.st_ctime_ns) > _RACY_NS:
            self._known[real] = [*mark, value]
            self._changed = True
        return value

    def _remote_sha256(self, address: str) -> str:
        mark = [*storage.mark(address), "remote", ""][:4]
        known = self._known.get(address)
        if known is not None and known[:-1] == mark:
            return known[-1]
        value = file_sha256(address)
        if len(storage.mark(address)) == 2:  # a server that names no version may change the file unseen
            self._known[address] = [*mark, value]
            self._changed = True
        return value

    def sha256s(self, paths: Iterable[Path]) -> list[str]:
        """The digests of many files; those that are not known are read by several threads."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self.sha256, paths))

    def save(self) -> None:
        """Keep what was learned; files that are gone are forgotten."""
        if self._changed:
            files = {
                path: mark
                for path, mark in list(self._known.items())
                if "://" in path or os.path.exists(path)
            }
            write_json(self.path, {"schema": SCHEMA, "files": files})
            self._changed = False

    def _load(self) -> dict[str, list]:
        """What is remembered; a cache that cannot be read is no cache."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["schema"] == SCHEMA:
                return {path: mark for path, mark in content["files"].items() if len(mark) == 5}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass
        return {}


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that loaders read, sorted by name: those of the folder itself (links
    followed), but no hidden ones, text about the model, pictures or code."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix.lower() not in _MODEL_SUFFIXES_UNREAD
        and path.stem.upper() not in _MODEL_NAMES_UNREAD
    )


def model_fingerprint(folder: Path, cache: DigestCache) -> str:
    """Digest of the model's files by name and content; where the folder lies does not enter."""
    from vico.settings import check_model_folder

    check_model_folder(folder)
    return digest({path.name: _input_sha256(path, cache) for path in model_files(folder)})


def tokenizer_fingerprint(folder: Path, cache: DigestCache) -> str:
    """Digest of what decides a sample's tokens and tiles: tokenizer files, template, sizes and limits of
    the tiling."""
    from vico.settings import TEMPLATE, load_settings, tokenizer_files

    settings = asdict(load_settings(folder))
    names = ("tile_size", "tokens_full", "image_token_id", "min_tiles", "max_tiles", "use_thumbnail")
    return digest(
        {
            "files": {path.name: _input_sha256(path, cache) for path in tokenizer_files(folder)},
            "settings": {name: settings[name] for name in names},
            "template": TEMPLATE,
        }
    )


def repaired_fingerprint(files: Sequence[Path], cache: DigestCache) -> str | None:
    """The digest of files of repaired rows in their order, None where there are none."""
    for path in files:
        if not path.is_file():
            raise UserError(
                f"inputs.repaired={path} is not a file; give rows as `vico data retry` takes them"
            )
    return digest([cache.sha256(path) for path in files]) if files else None


def _input_sha256(path: Path, cache: DigestCache) -> str:
    try:
        return cache.sha256(path)
    except OSError as error:
        raise UserError(
            f"inputs.model: {path} cannot be read ({error.strerror}); mend the file or its rights"
        ) from error
