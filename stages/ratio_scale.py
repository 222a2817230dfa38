"""The scale of the loss ratios of a table: how a tile's effect was isolated, and the floor of the losses.

Both are marks in the metadata of the parquet file, so that a later stage that measures ratios by itself
measures them alike, or does not mix them with these.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vico.objectives.labels import FLOOR

_ISOLATION, _FLOOR = b"vico.isolation", b"vico.floor"


@dataclass(frozen=True)
class RatioScale:
    """`isolation` is that of the ratio stage, `floor` in nats per answer token that of the label stage."""

    isolation: str
    floor: float


def with_isolation(ratios: pa.Table, isolation: str) -> pa.Table:
    """Return the table of ratios with the mark of its isolation."""
    return _marked(ratios, {_ISOLATION: isolation.encode()})


def with_floor(labels: pa.Table, ratios: pa.Table, floor: float) -> pa.Table:
    """Return the labels with the isolation of the ratios that they were made from, and their floor."""
    marks = {_FLOOR: repr(floor).encode()}
    isolation = (ratios.schema.metadata or {}).get(_ISOLATION)
    return _marked(labels, marks if isolation is None else {**marks, _ISOLATION: isolation})


def ratio_scale(labels_path: Path) -> RatioScale:
    """Return the scale of a table of labels; without marks, as in earlier versions, it is the default."""
    marks = pq.read_schema(labels_path).metadata or {}
    return RatioScale(marks.get(_ISOLATION, b"tile").decode(), float(marks.get(_FLOOR, repr(FLOOR))))


def _marked(table: pa.Table, marks: dict[bytes, bytes]) -> pa.Table:
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **marks})
