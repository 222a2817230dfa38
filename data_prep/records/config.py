"""The config of `inputs.records` and `inputs.heldout`. Planning imports it, so it imports nothing heavy."""

import os
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Format = Literal["demo", "internvl", "llava", "sharegpt", "parquet", "webdataset", "sources"]
# format -> fields besides `path` that it reads
_FIELDS: dict[str, tuple[str, ...]] = {
    "demo": ("name", "weight", "num_samples", "seed"),
    "internvl": ("name", "weight", "follow_links"),
    "llava": ("name", "weight", "root", "follow_links", "mark_first", "license", "source"),
    "sharegpt": ("name", "weight", "root", "follow_links", "mark_first", "license", "source"),
    "parquet": ("name", "weight", "root", "follow_links", "mark_first", "license", "source"),
    "webdataset": ("name", "weight", "mark_first", "license", "source"),
    "sources": ("sources",),
}
_WITHOUT_PATH = ("demo", "sources")


class RecordsConfig(BaseModel):
    """The records: `{format: demo, num_samples: N, seed: S}`, a format and a path, or a list of these."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format
    """Format of the records: `internvl` is a meta JSON file that names JSONL files, `llava` and `sharegpt`
    are JSON lists or JSONL, `parquet` and `webdataset` hold the pictures too, `demo` is built in. A list of
    sources has the format `sources`.
    """
    path: str | None = None
    """Where the records are, local or at `s3://`, `gs://` or `hf://`: the meta file of `internvl`, else a
    file, a folder or a pattern such as `shards/*.tar` or `shards/{000..012}.tar`, with one set per file. Null
    for `demo` and `sources`.
    """
    root: str | None = None
    """Folder of the pictures that rows name; null means the folder of each file. Only for `llava`, `sharegpt`
    and `parquet`.
    """
    follow_links: bool = False
    """Whether links in the root may lead out of it. A link that does is refused otherwise, since records from
    elsewhere could name any file. Not for `demo` and `webdataset`.
    """
    mark_first: bool = False
    """Whether a row with one picture and no `<image>` mark shows it before its first question; otherwise it
    is rejected. `internvl` always does, as InternVL's own reader. Only for `llava`, `sharegpt`, `parquet` and
    `webdataset`.
    """
    sources: tuple["RecordsConfig", ...] = ()
    """Several sources, which may have different formats; `records: [{format: ..}, ..]` is short for this."""
    name: str = Field(default="", max_length=64)
    """Put before the names of the source's sets, for sources whose files have equal names."""
    weight: float = Field(default=1.0, gt=0, le=10_000)
    """How often an epoch has the source's rows, on top of `repeat_time`: 2 is twice, 0.5 half of them."""
    license: str = ""
    """License of rows that state none, for the index and the model card; empty means unknown. An `internvl`
    meta file states it per set.
    """
    source: str = ""
    """Origin of rows that state none, for the index and the model card; empty means unknown. An `internvl`
    meta file states it per set.
    """
    num_samples: int = Field(default=240, ge=1, le=10_000_000)
    """Number of records of the demo. Only for `demo`."""
    seed: int = Field(default=0, ge=0)
    """Seed of the demo's pictures and texts; another seed gives other records. Only for `demo`."""

    @model_validator(mode="before")
    @classmethod
    def _list_of_sources(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            value = {"format": "sources", "sources": value}
        if isinstance(value, dict) and isinstance(value.get("sources"), list):
            value = {
                **value,
                "sources": tuple(value["sources"]),
            }  # strict validation takes no list for a tuple
        return value

    @field_validator("path", "root", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("sources", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        # The validator above makes this block Python instead of JSON, where a strict check takes no list.
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fields_fit_the_format(self) -> Self:
        if self.path is not None and self.format in _WITHOUT_PATH:
            raise ValueError(
                f"path={self.path} has no effect with format={self.format}; leave it out, "
                "or use format=internvl"
            )
        if self.path is None and self.format not in _WITHOUT_PATH:
            kind = "a meta JSON file" if self.format == "internvl" else "its files"
            raise ValueError(f"path is missing; format={self.format} needs the path of {kind}")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in ("format", "path", *_FIELDS[self.format]) and value != field.default:
                raise ValueError(f"{name}={value} has no effect with format={self.format}; leave it out")
        if self.format == "sources":
            self._check_sources()
        return self

    def _check_sources(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; give at least one source")
        if any(source.format == "sources" for source in self.sources):
            raise ValueError("a source is a list itself; put its sources into one list")
