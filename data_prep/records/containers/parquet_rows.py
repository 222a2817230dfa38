"""Rows of parquet files: columns are the fields of a row, and bytes in them its pictures.

`data_prep/records/row_forms.py` decides what the fields mean, as for rows of text files.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.records.file_kinds import damaged_file
from data_prep.records.forms.embedded import Attachment, Embedded, attachments, spelling, with_attachments
from data_prep.records.forms.named_pictures import listed_pictures, paths_beside_bytes
from data_prep.records.forms.turns import PAIR_FIELDS, TURN_FIELDS
from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import DIGEST_BYTES, RawRow
from data_prep.records.rejection import Rejected, shown
from data_prep.records.sets import RecordFile
from data_prep.remote_files import Location, open_file
from vico.errors import UserError, one_line

_ROWS_PER_BATCH = 16  # pictures of several megabytes are normal
_NUM_SHOWN_COLUMNS = 12
_NO_PYTHON_VALUE = (ValueError, OverflowError, pa.ArrowException)
"""For example of text that is not UTF-8 (UnicodeDecodeError), or of a date after the year 9999."""


class _ParquetRow(NamedTuple):
    """The values of a row by column. Columns whose value Python cannot hold are left out; `refused` is the
    reason with the message then."""

    values: dict[str, Any]
    refused: tuple[str, str] | None = None


def parquet_digests(path: Location) -> Iterator[tuple[int, bytes]]:
    """Yield (row number, digest of all columns) of every row."""
    for number, row in enumerate(_rows(path, 0)):
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        if row.refused:
            digest.update(number.to_bytes(8, "little"))  # what differs may be in what is left out
        _add_to_digest(digest, row.values)
        yield number, digest.digest()


def rows_of_largest_group(path: Location) -> int:
    """Return the number of rows of the file's largest row group. A task decodes its group from the start."""
    with open_file(path) as file:
        metadata = pq.ParquetFile(file, pre_buffer=False).metadata
        return max((metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)), default=0)


def parquet_rows(
    source: RecordFile, first: int, count: int, duplicates: Collection[int], repaired: Mapping[int, bytes]
) -> Iterator[RawRow]:
    """Yield at most `count` rows, starting with row `first`.

    A row in `repaired` has the line given there instead of its own; if that names none, its own pictures.
    """
    picture_bytes = partial(picture_in_root, source.root, follow_links=source.follow_links)
    for number, row in enumerate(_rows(source.path, first), start=first):
        if number == first + count:
            return
        fields = with_attachments(row.values)
        is_duplicate = number in duplicates
        if number in repaired:
            yield RawRow(number, repaired[number], is_duplicate, picture_bytes, embedded=_original(fields))
        else:
            yield RawRow(number, fields, is_duplicate, picture_bytes, refused=row.refused)


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
            raise damaged_file(path, "a parquet file", error) from None
        except OSError as error:
            if error.errno is not None:  # from the file system; errors of Arrow have none
                raise
            raise damaged_file(path, "a parquet file", error) from None


def _row(batch: pa.RecordBatch) -> _ParquetRow:
    try:
        return _ParquetRow(batch.to_pylist()[0])
    except _NO_PYTHON_VALUE:
        values, refused = {}, None
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                values[name] = column[0].as_py()
            except UnicodeDecodeError:
                refused = "not_utf8", "a text of the row is not UTF-8"
            except _NO_PYTHON_VALUE as error:
                refused = refused or ("broken_row", f"{shown(name)} cannot be read ({one_line(error)})")
        return _ParquetRow(values, refused)


def _check_columns(path: Location, schema: pa.Schema) -> None:
    """Raise UserError when two columns have one name, or no column or pair of columns can hold turns."""
    repeated = _repeated_name(schema)
    if repeated is not None:
        raise UserError(f"{path} has two columns or fields {repeated!r}; rename one of them")
    names = set(schema.names)
    if names.isdisjoint(TURN_FIELDS) and not any(names.issuperset(pair) for pair in PAIR_FIELDS):
        pairs = [f"{question} and {answer}" for question, answer in PAIR_FIELDS]
        raise UserError(
            f"{path} has the columns {', '.join(schema.names[:_NUM_SHOWN_COLUMNS])} but none of "
            f"{', '.join((*TURN_FIELDS, *pairs))}; rename the column with the turns"
        )


def _repeated_name(fields: Iterable[pa.Field]) -> str | None:
    """Return a name that two columns have, or two fields of a struct at any depth."""
    names = set[str]()
    for field in fields:
        if field.name in names:
            return str(field.name)
        names.add(field.name)
        inner = field.type
        repeated = _repeated_name(inner.field(n) for n in range(inner.num_fields))
        if repeated is not None:
            return repeated
    return None


def _original(fields: dict[str, Any]) -> Embedded:
    """Return the media of a row for the repaired row that replaces it: bytes in any column, and files in
    `image` and `images`.

    A repaired row names them by their number, those of `image` or `images` first, or by their `path`.
    """
    try:
        listed = listed_pictures(fields)
    except Rejected:
        listed = []
    others = [attached for attached in attachments(fields) if attached.media is not None]
    media: list[str | Attachment] = list(dict.fromkeys((*listed, *others)))
    spellings = {str(n): medium for n, medium in enumerate(listed or media)}
    for path, attached in paths_beside_bytes(fields):
        spellings.setdefault(spelling(path), attached)
    return Embedded(tuple(media), spellings, "the original row", is_repaired=True)


def _add_to_digest(digest: "hashlib.blake2b", value: Any) -> None:
    if isinstance(value, dict):
        digest.update(b"{" + len(value).to_bytes(8, "little"))
        for name, inner in value.items():
            _add_to_digest(digest, name)
            _add_to_digest(digest, inner)
    elif isinstance(value, list):
        digest.update(b"[" + len(value).to_bytes(8, "little"))
        for inner in value:
            _add_to_digest(digest, inner)
    else:
        is_bytes = isinstance(value, bytes)
        data = value if is_bytes else repr(value).encode("utf-8", "surrogatepass")
        digest.update((b"b" if is_bytes else b"v") + len(data).to_bytes(8, "little") + data)
