"""Rows of parquet files whose pictures are in the file (Hugging Face's `{bytes, path}`) or beside it.

A conversation stands in `conversations`, `messages` or `texts`; pictures in `image` or `images`.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import DIGEST_BYTES, RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import internvl_row
from data_prep.remote_files import Place, opened
from vico.errors import UserError

_TEXT_COLUMNS = ("conversations", "messages", "texts")
_VIDEO_COLUMNS = ("video", "videos")
_ROWS_PER_BATCH = 16  # pictures of several megabytes are normal


def parquet_digests(path: Place) -> Iterator[tuple[int, bytes]]:
    """(row number, digest of all that is in the row) of every row."""
    for number, row in enumerate(_rows(path, 0)):
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        _add_to_digest(digest, row)
        yield number, digest.digest()


def parquet_rows(path: Place, root: Place, first: int, count: int, duplicates: set[int]) -> Iterator[RawRow]:
    """`count` rows from row `first` on."""
    for number, row in enumerate(_rows(path, first), start=first):
        if number == first + count:
            return
        if isinstance(row, UnicodeDecodeError):
            refused = ("not_utf8", "a text of the row is not UTF-8")
            yield RawRow(number, b"", number in duplicates, partial(picture_in_root, root), refused)
            continue
        content, pictures = _as_internvl(row)
        yield RawRow(number, content, number in duplicates, partial(_picture, pictures, root))


def _rows(path: Place, first: int) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Rows as Python values from row `first` on; a row with bytes that are no text comes as its error."""
    with opened(path) as file:
        try:
            table = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
            _check_columns(path, table.schema_arrow)
            sizes = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
            group, before = 0, 0
            while group < len(sizes) and before + sizes[group] <= first:
                before += sizes[group]
                group += 1
            groups = list(range(group, len(sizes)))
            for batch in table.iter_batches(_ROWS_PER_BATCH, row_groups=groups) if groups else ():
                skipped = min(max(0, first - before), len(batch))
                before += len(batch)
                for n in range(skipped, len(batch)):
                    yield _row(batch.slice(n, 1))
        except pa.ArrowException as error:
            raise UserError(
                f"{path} is no whole parquet file ({_line(error)}); write or fetch it again"
            ) from None
        except OSError as error:
            if error.errno is not None:  # of the file system; Arrow's own have none
                raise
            raise UserError(
                f"{path} is no whole parquet file ({_line(error)}); write or fetch it again"
            ) from None


def _row(batch: pa.RecordBatch) -> dict[str, Any] | UnicodeDecodeError:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


def _check_columns(path: Place, schema: pa.Schema) -> None:
    if not any(name in schema.names for name in _TEXT_COLUMNS):
        raise UserError(
            f"{path} has the columns {', '.join(schema.names[:12])} but none of {', '.join(_TEXT_COLUMNS)}; "
            "rename the column with the turns"
        )


def _as_internvl(row: dict[str, Any]) -> tuple[bytes, dict[str, bytes]]:
    """(the row as a line, its pictures by the names in the line)."""
    pictures: dict[str, bytes] = {}
    found = row.get("image") if row.get("image") is not None else row.get("images")
    images = found if isinstance(found, list) else [] if found is None else [found]
    names = [_named(number, image, pictures) for number, image in enumerate(images)]
    fields = {name: row[name] for name in _TEXT_COLUMNS if row.get(name) is not None}
    fields |= {name: value for name, value in row.items() if name not in fields and _is_plain(value)}
    if any(_holds_something(row.get(name)) for name in _VIDEO_COLUMNS):
        fields["video"] = True  # a struct or list is not carried over, but the checks must see it
    fields["image"] = names
    return json.dumps(internvl_row(fields), default=str).encode(), pictures


def _named(number: int, image: Any, pictures: dict[str, bytes]) -> str:
    """The name of a picture in its line; bytes that lie in the row are kept under it."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes):
        pictures[str(number)] = data
        return str(number)
    path = image.get("path") if isinstance(image, dict) else image
    return path if isinstance(path, str) else f"picture {number}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _holds_something(value: Any) -> bool:
    """Whether anything stands in a value: a struct of nulls is how a writer says that there is none."""
    if isinstance(value, dict):
        return any(map(_holds_something, value.values()))
    return any(map(_holds_something, value)) if isinstance(value, list) else bool(value)


def _picture(pictures: dict[str, bytes], root: Place, name: str) -> bytes:
    if name in pictures:
        return pictures[name]
    if name.startswith("picture "):
        raise Rejected("missing_image", f"{name} has neither bytes nor a path")
    return picture_in_root(root, name)


def _add_to_digest(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            digest.update(name.encode())
            _add_to_digest(digest, inner)
    elif isinstance(value, list):
        for inner in value:
            _add_to_digest(digest, inner)
    else:
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
