"""Rows of text files: JSON lines (InternVL, LLaVA, ShareGPT) or a JSON list (LLaVA, ShareGPT)."""

import hashlib
from collections.abc import Collection, Iterator
from functools import partial
from typing import BinaryIO

from data_prep.records.file_kinds import check_rows_file
from data_prep.records.json_lists import first_byte, list_elements
from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import DIGEST_BYTES, RawRow
from data_prep.records.sets import RecordFile
from data_prep.remote_files import open_file


def text_digests(source: RecordFile) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, digest of the content) of every row."""
    with open_file(source.path) as file:
        check_rows_file(file, str(source.path), may_be_list=source.format != "internvl")
        if _is_list(source, file):
            for offset, content in list_elements(file, str(source.path)):
                yield offset, hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
            return
        offset = 0
        for line in file:
            yield offset, hashlib.blake2b(line.strip(), digest_size=DIGEST_BYTES).digest()
            offset += len(line)


def text_rows(
    source: RecordFile, offset: int, first: int, count: int, duplicates: Collection[int]
) -> Iterator[RawRow]:
    """Yield at most `count` rows, starting at byte `offset` with row `first`."""
    picture_bytes = partial(picture_in_root, source.root, follow_links=source.follow_links)
    with open_file(source.path) as file:
        if _is_list(source, file):
            contents = (element for _, element in list_elements(file, str(source.path), offset))
        else:
            file.seek(offset)
            contents = (line.strip() for line in file)
        for line, content in zip(range(first, first + count), contents, strict=False):
            yield RawRow(line, content, line in duplicates, picture_bytes)


def _is_list(source: RecordFile, file: BinaryIO) -> bool:
    """Return whether the file is a JSON list; annotations of InternVL are always lines."""
    return source.format in ("llava", "sharegpt") and first_byte(file) == b"["
