"""Rows of parquet files whose pictures are in the file (Hugging Face's `{bytes, path}`) or beside it.

The conversation is in the column `conversations`, `messages` or `texts`, as a list or as JSON text, or in a
column of questions and one of answers; pictures are in `image` or `images`.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.records.media.kinds import Media, media_of_bytes, media_of_name
from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import DIGEST_BYTES, RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import internvl_row
from data_prep.records.sets import RecordFile
from data_prep.remote_files import Location, open_file
from vico.errors import UserError, one_line

_TEXT_COLUMNS = ("conversations", "messages", "texts")
_PAIR_COLUMNS = (("question", "answer"), ("query", "response"))
_PICTURE_COLUMNS = ("image", "images")
_MEDIA_COLUMNS: dict[str, Media] = {"video": "video", "videos": "video", "audio": "audio", "audios": "audio"}
_ROWS_PER_BATCH = 16  # pictures of several megabytes are normal


class _ParquetRow(NamedTuple):
    """The values of a row by column; without `is_utf8` the columns whose text is not UTF-8 are left out."""

    values: dict[str, Any]
    is_utf8: bool = True


def parquet_digests(path: Location) -> Iterator[tuple[int, bytes]]:
    """Yield (row number, digest of all columns) of every row."""
    for number, row in enumerate(_rows(path, 0)):
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        if not row.is_utf8:
            digest.update(number.to_bytes(8, "little"))  # what differs may be in the text that is left out
        _add_to_digest(digest, row.values)
        yield number, digest.digest()


def parquet_rows(
    source: RecordFile, first: int, count: int, duplicates: Collection[int], repaired: Mapping[int, bytes]
) -> Iterator[RawRow]:
    """Yield at most `count` rows, starting with row `first`.

    A row in `repaired` has the line given there instead of its own; if that names none, its own pictures.
    """
    for number, row in enumerate(_rows(source.path, first), start=first):
        if number == first + count:
            return
        pictures: dict[str, bytes] = {}
        content, refused = b"", None
        try:
            if number in repaired:
                content = _repaired_line(row, json.loads(repaired[number]), pictures)
            elif not row.is_utf8:
                raise Rejected("not_utf8", "a text of the row is not UTF-8")
            else:
                content = _line(row.values, pictures)
        except Rejected as rejected:
            refused = (rejected.reason, rejected.message)
        picture_bytes = partial(_picture, pictures, source)
        yield RawRow(number, content, number in duplicates, picture_bytes, refused)


def _rows(path: Location, first: int) -> Iterator[_ParquetRow]:
    """Yield rows as Python values from row `first` on."""
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


def _row(batch: pa.RecordBatch) -> _ParquetRow:
    try:
        return _ParquetRow(batch.to_pylist()[0])
    except UnicodeDecodeError:
        values = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                values[name] = column[0].as_py()
            except UnicodeDecodeError:
                continue
        return _ParquetRow(values, is_utf8=False)


def _check_columns(path: Location, schema: pa.Schema) -> None:
    pairs = [f"{question} and {answer}" for question, answer in _PAIR_COLUMNS]
    has_pair = any({*pair} <= {*schema.names} for pair in _PAIR_COLUMNS)
    if not has_pair and not any(name in schema.names for name in _TEXT_COLUMNS):
        raise UserError(
            f"{path} has the columns {', '.join(schema.names[:12])} but none of "
            f"{', '.join((*_TEXT_COLUMNS, *pairs))}; rename the column with the turns"
        )


def _line(values: dict[str, Any], pictures: dict[str, bytes]) -> bytes:
    """Return the row as a line of InternVL; add its pictures to `pictures` by their names in the line."""
    _refuse_unread_media(values)
    fields = {name: _list_of_text(values[name]) for name in _TEXT_COLUMNS if values.get(name) is not None}
    read = {*fields}
    if not fields:
        for question, answer in _PAIR_COLUMNS:
            if values.get(question) is not None and values.get(answer) is not None:
                fields["texts"] = [{"user": values[question], "assistant": values[answer]}]
                read = {question, answer}
                break
    fields |= {name: value for name, value in values.items() if name not in read and _is_plain(value)}
    fields["image"] = _names(values, pictures)
    return json.dumps(internvl_row(fields), default=str).encode()


def _repaired_line(row: _ParquetRow, repaired: dict[str, Any], pictures: dict[str, bytes]) -> bytes:
    """Return the repaired row as a line. The pictures that it names are all that it has: by their number in
    the original row, by their `path` there, or files in the root. Without names it has those of the original.
    """
    original = _names(row.values, pictures)
    if repaired.get("image") is None:
        repaired = {name: value for name, value in repaired.items() if name != "image"}
    if "image" not in repaired and not repaired.get("images") and "image" not in internvl_row(repaired):
        _refuse_unread_media(row.values)
        repaired["image"] = original
    for image in _images(row.values):
        if (
            isinstance(image, dict)
            and isinstance(image.get("path"), str)
            and isinstance(image["bytes"], bytes)
        ):
            pictures.setdefault(image["path"], image["bytes"])
    return json.dumps(internvl_row(repaired)).encode()


def _list_of_text(value: Any) -> Any:
    """Return the list that a text spells as JSON; other values unchanged, for the checks to judge."""
    try:
        turns = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return turns if isinstance(turns, list) else value


def _images(values: dict[str, Any]) -> list[Any]:
    value = values.get("image") if _has_content(values.get("image")) else values.get("images")
    if value is None:
        value = values.get("image")
    return value if isinstance(value, list) else [] if value is None else [value]


def _names(values: dict[str, Any], pictures: dict[str, bytes]) -> list[str]:
    return [_picture_name(number, image, pictures) for number, image in enumerate(_images(values))]


def _refuse_unread_media(values: dict[str, Any]) -> None:
    """Raise Rejected when a column that is not read holds pictures, audio or video."""
    for name, value in values.items():
        media = _media(value)
        if name in _MEDIA_COLUMNS and _has_content(value):
            media = _MEDIA_COLUMNS[name]
        if media == "video" or media == "audio":
            raise Rejected(media, f"the column {name} holds {media}")
        is_read = name in _PICTURE_COLUMNS or isinstance(value, str)  # texts are in the line, for the checks
        if media == "picture" and not is_read:
            raise Rejected("unread_field", f"the column {name} holds a picture; rename it to image or images")
    if all(_has_content(values.get(name)) for name in _PICTURE_COLUMNS):
        raise Rejected("unread_field", "image and images both hold pictures; keep one of these columns")


def _media(value: Any) -> Media | None:
    """Return what bytes look like, or the `path` beside them, in a value or in what it contains."""
    if isinstance(value, bytes):
        return media_of_bytes(value)
    if isinstance(value, list):
        return next((media for media in map(_media, value) if media), None)
    if not isinstance(value, dict):
        return None
    if _has_content(value.get("array")) and "sampling_rate" in value:
        return "audio"
    if isinstance(value.get("path"), str) and "bytes" in value and media_of_name(value["path"]):
        return media_of_name(value["path"])
    return next((media for media in map(_media, value.values()) if media), None)


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
