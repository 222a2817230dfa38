"""Rows of parquet files whose pictures are in the file (Hugging Face's `{bytes, path}`) or beside it.

The conversation is in the column `conversations`, `messages` or `texts`, pictures are in `image` or `images`.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import DIGEST_BYTES, RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import internvl_row
from data_prep.records.sets import RecordFile
from data_prep.remote_files import Location, open_file
from vico.errors import UserError, one_line

_TEXT_COLUMNS = ("conversations", "messages", "texts")
_VIDEO_COLUMNS = ("video", "videos")
_ROWS_PER_BATCH = 16  # pictures of several megabytes are normal


def parquet_digests(path: Location) -> Iterator[tuple[int, bytes]]:
    """Yield (row number, digest of all columns) of every row."""
    for number, row in enumerate(_rows(path, 0)):
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        _add_to_digest(digest, row)
        yield number, digest.digest()


def parquet_rows(source: RecordFile, first: int, count: int, duplicates: Collection[int]) -> Iterator[RawRow]:
    """Yield at most `count` rows, starting with row `first`."""
    for number, row in enumerate(_rows(source.path, first), start=first):
        if number == first + count:
            return
        if isinstance(row, UnicodeDecodeError):
            refused = ("not_utf8", "a text of the row is not UTF-8")
            yield RawRow(number, b"", number in duplicates, partial(picture_in_root, source.root), refused)
            continue
        content, pictures = _as_internvl(row)
        yield RawRow(number, content, number in duplicates, partial(_picture, pictures, source))


def _rows(path: Location, first: int) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Yield rows as Python values from row `first` on; a row with invalid UTF-8 comes as its error."""
    with open_file(path) as file:
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
            raise _damaged(path, error) from None
        except OSError as error:
            if error.errno is not None:  # from the file system; errors of Arrow have none
                raise
            raise _damaged(path, error) from None


def _damaged(path: Location, error: Exception) -> UserError:
    return UserError(f"{path} is not a complete parquet file ({one_line(error)}); download or write it again")


def _row(batch: pa.RecordBatch) -> dict[str, Any] | UnicodeDecodeError:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


def _check_columns(path: Location, schema: pa.Schema) -> None:
    if not any(name in schema.names for name in _TEXT_COLUMNS):
        raise UserError(
            f"{path} has the columns {', '.join(schema.names[:12])} but none of {', '.join(_TEXT_COLUMNS)}; "
            "rename the column with the turns"
        )


def _as_internvl(row: dict[str, Any]) -> tuple[bytes, dict[str, bytes]]:
    """Return (the row as a line, its pictures by the names in the line)."""
    pictures: dict[str, bytes] = {}
    value = row.get("image") if row.get("image") is not None else row.get("images")
    images = value if isinstance(value, list) else [] if value is None else [value]
    names = [_picture_name(number, image, pictures) for number, image in enumerate(images)]
    fields = {name: row[name] for name in _TEXT_COLUMNS if row.get(name) is not None}
    fields |= {name: value for name, value in row.items() if name not in fields and _is_plain(value)}
    if any(_has_content(row.get(name)) for name in _VIDEO_COLUMNS):
        fields["video"] = True  # a struct or list is not copied, but the checks must see that it is there
    fields["image"] = names
    return json.dumps(internvl_row(fields), default=str).encode(), pictures


def _picture_name(number: int, image: Any, pictures: dict[str, bytes]) -> str:
    """Return the name of a picture in its line; add bytes from the row to `pictures` under that name."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes):
        pictures[str(number)] = data
        return str(number)
    path = image.get("path") if isinstance(image, dict) else image
    return path if isinstance(path, str) else f"picture {number}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _has_content(value: Any) -> bool:
    """Return whether a value is more than nulls: some writers write a struct of nulls for a missing value."""
    if isinstance(value, dict):
        return any(map(_has_content, value.values()))
    return any(map(_has_content, value)) if isinstance(value, list) else bool(value)


def _picture(pictures: dict[str, bytes], source: RecordFile, name: str) -> bytes:
    if name in pictures:
        return pictures[name]
    if name.startswith("picture "):
        raise Rejected("missing_image", f"{name} has neither bytes nor a path")
    return picture_in_root(source.root, name, follow_links=source.follow_links)


def _add_to_digest(digest: "hashlib.blake2b", value: Any) -> None:
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
