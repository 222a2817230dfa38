"""Where records come from: the config of `inputs.records` and `inputs.heldout`, its sets, its identity.

Planning imports this, so nothing heavy is imported here.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.internvl import MetaSet, read_meta
from vico.errors import UserError

_SLUG_LENGTH = 64  # a tar member's name has 100 bytes: slug, line, number of the picture, extension


class RecordsConfig(BaseModel):
    """`{format: internvl, path: META.json}` or `{format: demo, num_samples: N, seed: S}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["demo", "internvl"]
    path: Path | None = None
    num_samples: int = Field(default=240, ge=1, le=10_000_000)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fields_fit_the_format(self) -> Self:
        if self.format == "demo" and self.path is not None:
            raise ValueError(
                f"path={self.path} has no effect with format=demo; leave it out or use format=internvl"
            )
        if self.format == "internvl":
            if self.path is None:
                raise ValueError("path is missing; format=internvl needs the path of a meta JSON file")
            for name in ("num_samples", "seed"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect with format=internvl; leave it out"
                    )
        return self


@dataclass(frozen=True)
class RecordSet:
    """One named set of records: the rows of one annotation file under one picture root, or the demo's rows.

    `slug` is the name as it stands in keys; `repeat` and `max_tiles` (None: the stage's own) hold for every
    row.
    """

    name: str
    slug: str
    repeat: float = 1.0
    max_tiles: int | None = None
    annotation: Path | None = None
    root: Path | None = None
    demo: RecordsConfig | None = None
    heldout: bool = False


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
        )
        for one in read_meta(config.path)
    ]
    check_slugs(sets)
    return sets


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


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def records_fingerprint(config: RecordsConfig, annotation_sha256: Callable[[Path], str] = file_sha256) -> str:
    """sha256 over annotation bytes, set names and semantic fields; roots and paths never enter.

    Pictures are not read here: the index names their digests once they are sharded. `annotation_sha256` may
    remember what it has read.
    """
    if config.format == "demo":
        from data_prep.demo import DEMO_VERSION

        identity: dict = {"demo": DEMO_VERSION, "num_samples": config.num_samples, "seed": config.seed}
    else:
        identity = {"sets": [_set_identity(one, annotation_sha256) for one in read_meta(config.path)]}
    text = json.dumps({"format": config.format, **identity}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _set_identity(one: MetaSet, annotation_sha256: Callable[[Path], str]) -> dict:
    return {
        "name": one.name,
        "annotation": annotation_sha256(one.annotation),
        "repeat_time": one.repeat_time,
        "max_dynamic_patch": one.max_dynamic_patch,
    }


def _slug(name: str) -> str:
    """The name with only letters, digits, `_` and `-`: a dot would end the key, a slash open a folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:_SLUG_LENGTH]
