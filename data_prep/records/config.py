"""The config of `inputs.records` and `inputs.heldout`. Planning imports it, so it imports nothing heavy."""

import os
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Format = Literal["demo", "internvl", "llava", "sharegpt", "parquet", "webdataset"]
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
    """The records: `{format: demo, num_samples: N, seed: S}`, or a format and a path."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Format
    """Format of the records: `internvl` is a meta JSON file that names JSONL files, `llava` and `sharegpt`
    are JSON lists or JSONL, `parquet` and `webdataset` hold the pictures too, `demo` is built in.
    """
    path: str | None = None
    """Where the records are, local or at `s3://`, `gs://` or `hf://`: the meta file of `internvl`, else a
    file, a folder or a pattern such as `shards/*.tar`, with one set per file. Null for `demo` only.
    """
    root: str | None = None
    """Folder of the pictures that rows name; null means the folder of each file. Only for `llava`, `sharegpt`
    and `parquet`.
    """
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
            kind = "a meta JSON file" if self.format == "internvl" else "its files"
            raise ValueError(f"path is missing; format={self.format} needs the path of {kind}")
        for name in ("root", "license", "source", "num_samples", "seed"):
            changed = getattr(self, name) != type(self).model_fields[name].default
            if changed and name not in _FIELDS[self.format]:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with format={self.format}; leave it out"
                )
        return self
