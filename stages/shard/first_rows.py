"""Find the format of a folder's rows: check the first rows of its files as the shard stage checks them.

`vico init --data` calls it. A format has no rule of its own here: it is the one in which most rows are good.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.records.blocks import first_block
from data_prep.records.config import Format, RecordsConfig
from data_prep.records.json_lists import first_byte
from data_prep.records.rejection import shown_line
from data_prep.records.sets import SUFFIXES, RecordFile, RecordSet, check_slugs, record_sets
from stages.shard.check import CheckTask, check_part
from stages.shard.config import ShardConfig
from stages.shard.tasks import shard_settings
from vico.errors import UserError, one_line

if TYPE_CHECKING:
    from data_prep.records.rejection import LedgerRow

_NUM_ROWS = 50
_MAX_CONTAINERS = 4
"""Parquet files and tars of a folder that are looked at: they are long to read, and alike."""
_KINDS: tuple[tuple[Format, ...], ...] = (("internvl", "llava", "sharegpt"), ("parquet",), ("webdataset",))
"""The formats that read the same files; the files of the first kind in a folder are used."""
_SHAREGPT_FIELD = re.compile(rb'"(messages|texts)"\s*:')
_PEEKED_BYTES = 1 << 16
_MISPLACED = ("missing_image", "path_outside_root")


@dataclass(frozen=True)
class CheckedFile:
    """A file's first rows in one format: `num_good` of `num_rows`, and the ledger rows of the others.

    `root` is the folder of its pictures.
    """

    path: Path
    format: Format
    root: Path
    num_rows: int
    faults: tuple[LedgerRow, ...]

    @property
    def num_good(self) -> int:
        return self.num_rows - len(self.faults)

    @property
    def num_misplaced(self) -> int:
        """The rows whose pictures are not in the root."""
        return sum(row["reason"] in _MISPLACED for row in self.faults)


@dataclass(frozen=True)
class CheckedFolder:
    """The files of a folder in the recognised format (of many tars the first), and other files with rows."""

    format: Format
    files: tuple[CheckedFile, ...]
    paths: tuple[Path, ...]
    unused: tuple[Path, ...]

    @property
    def records(self) -> dict[str, str] | list[dict[str, str]]:
        """The `inputs.records` that reads the files; not for `internvl`, which needs a meta file."""
        first = self.files[0]
        has_root = self.format != "webdataset" and first.root != first.path.parent
        root = {"root": str(first.root)} if has_root else {}
        sources = [{"format": self.format, "path": path, **root} for path in _patterns(self.paths)]
        return sources[0] if len(sources) == 1 else sources


def checked_folder(folder: Path, config: ShardConfig, tokenizer: Path) -> CheckedFolder:
    """Check the first rows of the folder's files and return them in the format that fits them best.

    Raises UserError when the folder has no file with rows, or when no row is good in any format.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder; give one with the rows and their pictures")
    kinds = {formats: paths for formats in _KINDS if (paths := _files_with_rows(folder, formats))}
    if not kinds:
        raise UserError(
            f"--data {folder} has no *.jsonl file, and no JSON list, parquet file or tar either; put the "
            "rows there, for example one JSON object per line"
        )
    (formats, paths), *others = kinds.items()
    paths, other_lists = _without_other_lists(folder, formats, paths, config, tokenizer)
    best: list[CheckedFile] = []
    for record_format in _in_order(formats, paths):
        checked = list(_checked_files(folder, paths, record_format, config, tokenizer))
        if not best or _num_good(checked) > _num_good(best):
            best = checked
        if all(not file.faults for file in best):
            break
    if not _num_good(best):
        raise _no_good_row(folder, best)
    check_slugs([_file_set(path, best[0].format, folder) for path in paths])
    unused = (*other_lists, *(path for _, other in others for path in other))
    return CheckedFolder(best[0].format, tuple(best), tuple(paths), unused)


def _files_with_rows(folder: Path, formats: Sequence[Format]) -> list[Path]:
    """Return the files that the formats read, sorted; of `.json` files only lists and lines of objects."""
    suffixes = SUFFIXES[formats[-1]]
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    paths = sorted(path for path in visible if path.name.lower().endswith(suffixes) and not path.is_dir())
    return [path for path in paths if not _is_json(path) or _is_list(path) or _has_lines(path)]


def _without_other_lists(
    folder: Path, formats: Sequence[Format], paths: list[Path], config: ShardConfig, tokenizer: Path
) -> tuple[list[Path], list[Path]]:
    """Return the files with rows, and the `.json` files that hold another list, such as names of classes.

    A list is another one if no row of it is good in any format, and another file is left.
    """
    others = [
        path
        for path in paths
        if _is_json(path)
        and not any(
            _num_good(list(_checked_files(folder, [path], name, config, tokenizer)))
            for name in formats
            if name != "internvl"
        )
    ]
    return (paths, []) if len(others) == len(paths) else ([p for p in paths if p not in others], others)


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _is_list(path: Path) -> bool:
    with open(path, "rb") as file:
        return first_byte(file) == b"["


def _has_lines(path: Path) -> bool:
    """Return whether the first two lines are an object each: one object in one line may be a meta file."""
    with open(path, "rb") as file:
        lines = [line.strip() for line in islice(file, 2)]
    return len(lines) == 2 and all(line.startswith(b"{") and line.endswith(b"}") for line in lines)


def _patterns(paths: Sequence[Path]) -> list[str]:
    """Return the paths or the one pattern that stand for the files in `inputs.records`, and for no others."""
    endings = {"".join(path.suffixes[-1:]) for path in paths}
    pattern = f"*{min(endings)}"
    if len(paths) > 1 and len(endings) == 1 and _visible(paths[0].parent, pattern) == sorted(paths):
        return [str(paths[0].parent / pattern)]
    return [_pattern(path) for path in paths]


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _in_order(formats: Sequence[Format], paths: Sequence[Path]) -> Sequence[Format]:
    """Return the formats to try. Several may read the same rows; the one that names their form is first.

    A meta file of `internvl` names *.jsonl files only.
    """
    if "internvl" not in formats:
        return formats
    formats = formats[1:] if any(path.suffix != ".jsonl" for path in paths) else formats
    with open(paths[0], "rb") as file:
        is_sharegpt = _SHAREGPT_FIELD.search(file.read(_PEEKED_BYTES)) is not None
    return sorted(formats, key=lambda name: name != "sharegpt") if is_sharegpt else formats


def _checked_files(
    folder: Path, paths: Sequence[Path], record_format: Format, config: ShardConfig, tokenizer: Path
) -> Iterator[CheckedFile]:
    """Check the first rows of each file. A meta file names a root per set, all other formats one for all."""
    if record_format in ("parquet", "webdataset"):
        paths = paths[:_MAX_CONTAINERS]
    roots = [folder]
    if record_format != "webdataset":
        roots += sorted(path for path in folder.iterdir() if path.is_dir())
    for path in paths:
        file = _best_root([_file_set(path, record_format, root) for root in roots], config, tokenizer)
        if record_format != "internvl" and file.num_good:
            roots = [file.root]
        yield file


def _file_set(path: Path, record_format: Format, root: Path) -> RecordSet:
    """Return the file as a set; for `internvl` as the meta file that is to be written would name it."""
    if record_format == "internvl":
        record_set = _file_set(path, "llava", root)
        assert isinstance(record_set.rows, RecordFile)
        rows = replace(record_set.rows, format="internvl")
        return replace(record_set, rows=rows, mark_first=True)
    given_root = None if record_format == "webdataset" else str(root)
    (record_set,) = record_sets(RecordsConfig(format=record_format, path=_pattern(path), root=given_root))
    return record_set


def _pattern(path: Path) -> str:
    """Return the path as `inputs.records.path` states it, where a name may be a pattern."""
    return str(path.parent / glob.escape(path.name))


def _best_root(sets: Sequence[RecordSet], config: ShardConfig, tokenizer: Path) -> CheckedFile:
    """Check a file's first rows with each root until one has all pictures; return the best one."""
    files: list[CheckedFile] = []
    for record_set in sets:
        files.append(_checked_file(record_set, config, tokenizer))
        if not files[-1].num_misplaced:
            break
    return min(files, key=lambda file: file.num_misplaced)


def _checked_file(record_set: RecordSet, config: ShardConfig, tokenizer: Path) -> CheckedFile:
    source = record_set.rows
    assert isinstance(source, RecordFile) and isinstance(source.path, Path) and isinstance(source.root, Path)
    block = first_block(record_set, _NUM_ROWS)
    if block is None:
        return CheckedFile(source.path, source.format, source.root, 0, ())
    content = check_part(CheckTask(block, shard_settings(config, record_set, heldout=False), tokenizer))
    return CheckedFile(source.path, source.format, source.root, block.num_lines, tuple(content.quarantine))


def _num_good(files: Sequence[CheckedFile]) -> int:
    return sum(file.num_good for file in files)


def _no_good_row(folder: Path, files: Sequence[CheckedFile]) -> UserError:
    """Return the error for a folder without a good row: it names the first fault of the best format."""
    file = next((file for file in files if file.faults), None)
    if file is None:
        return UserError(f"--data {folder} has no row in {files[0].path.name}; put the rows there")
    row = file.faults[0]
    return UserError(
        f"--data {folder} has no good row among the first of each file; as {file.format} row "
        f"{shown_line(row)} of {file.path.name} is {row['reason']} ({one_line(row['message'])}); correct the "
        "rows or put the pictures there (settings of inputs.records go into the file that `vico init` writes "
        "without --data); docs/data.md lists formats and reasons"
    )
