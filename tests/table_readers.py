"""Reads a parquet file with pyarrow, pandas, polars and duckdb, which have to give the same rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]


def rows_by_reader(path: Path) -> dict[str, Rows]:
    """Return the rows of a parquet file by the name of the library that read them, as plain values."""
    read_by_duckdb = duckdb.connect().read_parquet(str(path))
    return {
        "pyarrow": _plain_rows(pq.read_table(path).to_pylist()),
        "pandas": _plain_rows(pandas.read_parquet(path).to_dict("records")),
        "polars": _plain_rows(polars.read_parquet(path).to_dicts()),
        "duckdb": _plain_rows(
            dict(zip(read_by_duckdb.columns, values, strict=True)) for values in read_by_duckdb.fetchall()
        ),
    }


def assert_opens_everywhere(path: Path) -> Rows:
    """Return the rows of a parquet file after asserting that every library gives the same ones."""
    rows = rows_by_reader(path)
    for name, read in rows.items():
        assert read == rows["pyarrow"], f"{name} reads other rows from {path}"
    return rows["pyarrow"]


def _plain_rows(rows: Iterable[dict[str, Any]]) -> Rows:
    return [{name: _plain(value) for name, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray | list):
        return [_plain(element) for element in value]
    return None if value != value else value  # pandas has NaN for null
