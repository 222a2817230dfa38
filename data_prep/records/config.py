"""Where records come from: the config of `inputs.records` and `inputs.heldout`, its sets, its identity.

Planning imports this, so nothing heavy is imported here.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data_prep.records.internvl import MetaSet, read_meta
from data_prep.remote_files import (
    Place,
    as_place,
    is_file,
    is_folder,
    matching_files,
    name_of,
    opened,
    parent,
)
from vico.errors import UserError

_SLUG_LENGTH = 64  # a tar member's name has 100 bytes: slug, line, number of the picture, extension
Format = Literal["demo", "internvl", "llava", "sharegpt", "parquet", "webdataset"]
_SUFFIXES = {"llava": ".json", "sharegpt": ".json", "parquet": ".parquet", "webdataset": ".tar"}
# format -> fields besides `path` that it reads
_FIELDS: dict[str, tuple[str, ...]] = {
    "demo": ("num_samples", "seed"),
    "internvl": (),
    "llava": ("root", "license", "source"),
    "sharegpt": ("root", "license", "source"),
    "parquet": ("root", "license", "source"),
    "webdataset": ("license", "source"),
}


class RecordsConfig(BaseModel):
    """`{format: demo, num_samples: N, seed: S}`, or a format and a path, also remote.

    `path` is InternVL's meta file, else a file, a folder or a pattern such as `shards/*.tar`: one set for
    each file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format
    path: str | None = None
    root: str | None = None
    """Folder of the pictures that rows name; default: the folder of the file."""
    license: str = ""
    source: str = ""
    """Licence and origin of rows that do not state their own; they go to the index and the model card."""
    num_samples: int = Field(default=240, ge=1, le=10_000_000)
    seed: int = Field(default=0, ge=0)

    @field_validator("path", "root", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _fields_fit_the_format(self) -> Self:
        if self.format == "demo" and self.path is not None:
            raise ValueError(
                f"path={self.path} has no effect with format=demo; leave it out or use format=internvl"
            )
        if self.format != "demo" and self.path is None:
            what = "a meta JSON file" if self.format == "internvl" else "its files"
            raise ValueError(f"path is missing; format={self.format} needs the path of {what}")
        for name in ("root", "license", "source", "num_samples", "seed"):
            changed = getattr(self, name) != type(self).model_fields[name].default
            if changed and name not in _FIELDS[self.format]:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with format={self.format}; leave it out"
                )
        return self


@dataclass(frozen=True)
class RecordSet:
    """One named set of records: the rows of one file under one picture root, or the demo's rows.

    `slug` is the name as it stands in keys; `repeat` and `max_tiles` (None: the stage's own) hold for every
    row, `license` and `origin` for those that state none.
    """

    name: str
    slug: str
    repeat: float = 1.0
    max_tiles: int | None = None
    annotation: Place | None = None
    root: Place | None = None
    demo: RecordsConfig | None = None
    heldout: bool = False
    format: Format = "internvl"
    license: str = ""
    origin: str = ""


def record_sets(config: RecordsConfig, *, heldout: bool = False) -> list[RecordSet]:
    """The sets of a records config in the order of its file; held-out ones are named `heldout-...`.

    Raises UserError when the meta file or an annotation or root it names is missing or malformed.
    """
    prefix = "heldout-" if heldout else ""
    if config.format == "demo":
        return [RecordSet(f"{prefix}demo", f"{prefix}demo", demo=config, heldout=heldout)]
    sets = [
        RecordSet(
            name=prefix + one.name,
            slug=_slug(prefix + one.name),
            repeat=one.repeat_time,
            max_tiles=one.max_dynamic_patch,
            annotation=one.annotation,
            root=one.root,
            heldout=heldout,
            format=config.format,
            license=one.license,
            origin=one.source,
        )
        for one in _named_sets(config)
    ]
    check_slugs(sets)
    return sets


def _named_sets(config: RecordsConfig) -> list[MetaSet]:
    """The sets as a meta file would state them; for other formats one for each file, named after it."""
    place = as_place(config.path)
    if config.format == "internvl":
        return read_meta(place)
    files = matching_files(place, _SUFFIXES[config.format])
    for file in files:
        if not is_file(file):
            raise UserError(f"records path={file} is not a file; name the file, a folder or a pattern")
    root = None if config.root is None else as_place(config.root)
    if root is not None and not is_folder(root):
        raise UserError(f"records root={root} is not a folder; name the folder of the pictures")
    return [
        MetaSet(
            name=PurePosixPath(name_of(file)).stem,
            root=parent(file) if root is None else root,
            annotation=file,
            repeat_time=1.0,
            max_dynamic_patch=None,
            license=config.license,
            source=config.source,
        )
        for file in files
    ]


def check_slugs(sets: list[RecordSet]) -> None:
    """Raise UserError when two sets would give the same keys."""
    seen: dict[str, str] = {}
    for one in sets:
        if one.slug in seen:
            raise UserError(
                f"the set names {seen[one.slug]!r} and {one.name!r} give the same keys ({one.slug}-...); "
                "rename one of them"
            )
        seen[one.slug] = one.name


def file_sha256(place: Place) -> str:
    with opened(place) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def records_fingerprint(
    config: RecordsConfig, annotation_sha256: Callable[[Place], str] = file_sha256
) -> str:
    """sha256 over the bytes of annotations, set names and semantic fields; roots and paths never enter.

    Pictures beside an annotation are not read here: the index names their digests once they are sharded.
    Parquet files and tars are read whole. `annotation_sha256` may remember what it has read.
    """
    if config.format == "demo":
        from data_prep.demo.records import DEMO_VERSION

        identity: dict = {"demo": DEMO_VERSION, "num_samples": config.num_samples, "seed": config.seed}
    else:
        identity = {"sets": [_set_identity(one, annotation_sha256) for one in _named_sets(config)]}
    text = json.dumps({"format": config.format, **identity}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _set_identity(one: MetaSet, annotation_sha256: Callable[[Place], str]) -> dict:
    stated = {"license": one.license, "source": one.source}
    return {
        "name": one.name,
        "annotation": annotation_sha256(one.annotation),
        "repeat_time": one.repeat_time,
        "max_dynamic_patch": one.max_dynamic_patch,
        **{name: value for name, value in stated.items() if value},
    }


def _slug(name: str) -> str:
    """The name with only letters, digits, `_` and `-`: a dot would end the key, a slash open a folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:_SLUG_LENGTH]
