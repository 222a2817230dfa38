"""InternVL's meta JSON: the annotation file and picture root of each set, and what holds for its rows.

`length` is ignored, as in InternVL's own reader; `license` and `source` are our additions. Relative paths are
tried in the meta file's folder, then in the working directory (where InternVL's scripts look).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.records.file_kinds import foreign_kind
from data_prep.remote_files import Location, content, is_file, is_folder, is_remote, joined, name_of, parent
from vico.bounded_text import bounded_json, unique_names
from vico.errors import UserError

_FIELDS = (
    "root",
    "annotation",
    "data_augment",
    "max_dynamic_patch",
    "repeat_time",
    "length",
    "license",
    "source",
)
_MAX_REPEAT = 10_000
_MAX_META_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MetaSet:
    """One set of the meta file; paths are absolute. A `repeat_time` below 1 is a share of the rows."""

    name: str
    root: Location
    annotation: Location
    repeat_time: float
    max_dynamic_patch: int | None
    license: str = ""
    source: str = ""


def read_meta(path: Location) -> list[MetaSet]:
    """Return the sets of a meta file in file order. Raises UserError that names file, set and field."""
    try:
        data = content(path)
        kind = foreign_kind(data[:4096])
        if kind is not None:
            raise UserError(f"records path={path} is {kind}")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"records path={path} does not exist; give the path of an InternVL meta JSON file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"records path={path} cannot be read ({error}); give an InternVL meta JSON file"
        ) from None
    try:
        meta = bounded_json(text, _MAX_META_BYTES, unique_names)
    except ValueError as error:
        raise UserError(f"{path} is not a valid meta file ({error}); fix the JSON") from None
    if not isinstance(meta, dict) or not meta:
        raise UserError(
            f'{path} is not a meta file: it must be an object {{"NAME": {{"root", "annotation", ..}}}} '
            "with at least one set; put the rows into the file that `annotation` names"
        )
    return [_meta_set(path, name, fields) for name, fields in meta.items()]


def _meta_set(path: Location, name: str, fields: Any) -> MetaSet:
    where = f"{path}: set {name!r}"
    _refuse_half_characters(where, "name", name)
    if not isinstance(fields, dict):
        raise UserError(f"{where} is not an object; give root and annotation")
    for field in fields:
        if field not in _FIELDS:
            raise UserError(f"{where} has the unknown field {field!r}; the fields are {', '.join(_FIELDS)}")
    if fields.get("data_augment") not in (None, False):
        raise UserError(
            f"{where} has data_augment={fields['data_augment']}, which is not supported; set it to false"
        )
    annotation = _existing(where, path, "annotation", fields.get("annotation"))
    if not is_file(annotation):
        raise UserError(f"{where} has annotation={annotation}, which is not a file; give a JSONL file")
    if not name_of(annotation).endswith(".jsonl"):
        raise UserError(f"{where} has annotation={annotation}; it must be a file of JSON lines named *.jsonl")
    root = _existing(where, path, "root", fields.get("root", ""))
    if not is_folder(root):
        raise UserError(f"{where} has root={root}, which is not a folder; give the folder of its pictures")
    return MetaSet(
        name,
        root,
        annotation,
        _repeat_time(where, fields),
        _max_dynamic_patch(where, fields),
        _text(where, fields, "license"),
        _text(where, fields, "source"),
    )


def _existing(where: str, meta_path: Location, field: str, value: Any) -> Location:
    """Return the location that a field names, found beside the meta file or in the working directory."""
    if not isinstance(value, str):
        raise UserError(f"{where} has {field}={value!r}; it must be a path")
    beside_meta, here = joined(parent(meta_path), value), joined(Path.cwd(), value)
    for candidate in dict.fromkeys((beside_meta, here)):
        if is_file(candidate) or is_folder(candidate):
            return candidate
        if is_remote(candidate):
            raise UserError(f"{where} has {field}={value}: {candidate} does not exist; correct the path")
    problem = f"neither {beside_meta} nor {here} exists" if beside_meta != here else f"{here} does not exist"
    raise UserError(f"{where} has {field}={value}: {problem}; correct the path")


def _text(where: str, fields: dict[str, Any], field: str) -> str:
    value = fields.get(field, "")
    if not isinstance(value, str):
        raise UserError(f"{where} has {field}={value!r}; it must be text")
    _refuse_half_characters(where, field, value)
    return value


def _refuse_half_characters(where: str, field: str, text: str) -> None:
    """Raise UserError for half of a surrogate pair, which JSON can spell and the index cannot hold."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where} has half of a surrogate pair in its {field}; correct the text")


def _repeat_time(where: str, fields: dict[str, Any]) -> float:
    value = fields.get("repeat_time", 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} has repeat_time={value!r}; it must be a number")
    if not 0 <= value <= _MAX_REPEAT:
        raise UserError(f"{where} has repeat_time={value}; it must be between 0 and {_MAX_REPEAT}")
    return float(value)


def _max_dynamic_patch(where: str, fields: dict[str, Any]) -> int | None:
    value = fields.get("max_dynamic_patch")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
        raise UserError(f"{where} has max_dynamic_patch={value!r}; it must be a whole number from 1 to 1024")
    return value
