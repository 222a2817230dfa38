"""The named sets of a records config: which rows each has and what holds for all of them.

Planning imports this, so it imports nothing heavy.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from data_prep.records.config import Format, RecordsConfig
from data_prep.records.internvl import MetaSet, read_meta
from data_prep.remote_files import (
    Location,
    as_location,
    is_file,
    is_folder,
    matching_files,
    name_of,
    parent,
)
from vico.errors import UserError

_JSON: tuple[Format, ...] = ("internvl", "llava", "sharegpt")
_SLUG_LENGTH = 64  # the name of a tar member has 100 bytes: slug, line, picture number, extension
SUFFIXES: dict[str, tuple[str, ...]] = {
    "llava": (".json", ".jsonl", ".ndjson"),
    "sharegpt": (".json", ".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"),
}


@dataclass(frozen=True)
class RecordFile:
    """The file of a set's rows, and the folder of the pictures that its rows name.

    `follow_links`: links in the folder may lead out of it.
    """

    format: Format
    path: Location
    root: Location
    follow_links: bool = False


@dataclass(frozen=True)
class RecordSet:
    """One named set of records; `rows` are those of a file, or the demo's.

    `slug` is the name as it appears in keys. `repeat` and `max_tiles` (None: the stage's own) hold for every
    row, `license` and `origin` for rows that state none. `mark_first`: one picture without a mark is shown
    before the first question.
    """

    name: str
    slug: str
    rows: RecordFile | RecordsConfig
    repeat: float = 1.0
    max_tiles: int | None = None
    heldout: bool = False
    license: str = ""
    origin: str = ""
    mark_first: bool = False


def record_sets(config: RecordsConfig, *, heldout: bool = False) -> list[RecordSet]:
    """Return the sets of a records config in file order; held-out ones are named `heldout-...`.

    Raises UserError when a file or folder that the config or its meta file names is missing or malformed, or
    when two sets would give the same keys.
    """
    sets = [record_set for source in all_sources(config) for record_set in _source_sets(source, heldout)]
    check_slugs(sets)
    return sets


def all_sources(config: RecordsConfig) -> tuple[RecordsConfig, ...]:
    """Return the sources of a list, or the config itself, which is one source."""
    return config.sources if config.format == "sources" else (config,)


def picture_roots(config: RecordsConfig) -> tuple[str, ...]:
    """Return the folders of the pictures that rows of JSON files name, sorted.

    Pictures there are in no fingerprint; parquet files and tars, which are, usually have their own.
    """
    files = (record_set.rows for record_set in record_sets(config))
    return tuple(sorted({str(f.root) for f in files if isinstance(f, RecordFile) and f.format in _JSON}))


def demo_sets(config: RecordsConfig, *, heldout: bool = False) -> dict[str, RecordsConfig]:
    """Return the sources that are the built-in demo by the names of their sets."""
    return {
        _name(source, "demo", heldout): source for source in all_sources(config) if source.format == "demo"
    }


def _source_sets(config: RecordsConfig, heldout: bool) -> list[RecordSet]:
    if config.format == "demo":
        name = _name(config, "demo", heldout)
        return [RecordSet(name, slug_of(name), config, config.weight, heldout=heldout)]
    return [
        RecordSet(
            name=_name(config, meta_set.name, heldout),
            slug=slug_of(_name(config, meta_set.name, heldout)),
            rows=RecordFile(config.format, meta_set.annotation, meta_set.root, config.follow_links),
            repeat=meta_set.repeat_time * config.weight,
            max_tiles=meta_set.max_dynamic_patch,
            heldout=heldout,
            license=meta_set.license,
            origin=meta_set.source,
            mark_first=config.mark_first or config.format == "internvl",
        )
        for meta_set in meta_sets(config)
    ]


def _name(config: RecordsConfig, set_name: str, heldout: bool) -> str:
    return "-".join(part for part in ("heldout" if heldout else "", config.name, set_name) if part)


def meta_sets(config: RecordsConfig) -> list[MetaSet]:
    """Return the sets of one source as those of a meta file; the other formats have one set per file."""
    assert config.path is not None, "the config requires a path for every format but demo"
    if config.format == "internvl":
        return read_meta(as_location(config.path))
    suffixes = SUFFIXES[config.format]
    files = [file for path in _shard_paths(config.path) for file in matching_files(path, suffixes)]
    for file in files:
        if not is_file(file):
            raise UserError(f"records path={file} is not a file; give a file, a folder or a pattern")
    root = None if config.root is None else as_location(config.root)
    if root is not None and not is_folder(root):
        raise UserError(f"records root={root} is not a folder; give the folder of the pictures")
    return [
        MetaSet(
            name=_set_name(file),
            root=parent(file) if root is None else root,
            annotation=file,
            repeat_time=1.0,
            max_dynamic_patch=None,
            license=config.license,
            source=config.source,
        )
        for file in files
    ]


def _shard_paths(path: str) -> list[Location]:
    """Return the paths that a pattern such as `shards/{000..012}.tar` stands for, as webdataset reads it."""
    location = as_location(path)
    if "{" not in path or is_file(location) or is_folder(location):
        return [location]
    from data_prep.records.containers.tar_samples import shard_paths  # webdataset imports torch

    return [as_location(shard) for shard in shard_paths(path)]


def _set_name(file: Location) -> str:
    """Return the file's name without its last extension, and without `.tar` before `.gz` and its like.

    Raises UserError for a name that is not UTF-8: it would be in every sample and in the index.
    """
    name = PurePosixPath(name_of(file)).stem.removesuffix(".tar")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise UserError(f"the name of {file} is not UTF-8; rename the file")
    return name


def check_slugs(sets: list[RecordSet]) -> None:
    """Raise UserError when two sets would give the same keys."""
    names: dict[str, str] = {}
    for record_set in sets:
        slug, name = record_set.slug, record_set.name
        if slug in names:
            raise UserError(
                f"the set names {names[slug]!r} and {name!r} give the same keys ({slug}-...); "
                "rename one of them, or give its source a name"
            )
        names[slug] = name


def slug_of(name: str) -> str:
    """Return the name with only letters, digits, `_` and `-`: a dot ends a key, a slash makes a folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:_SLUG_LENGTH]
