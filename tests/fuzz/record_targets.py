"""Rows, files of rows, meta files, tars and parquet files."""

import gzip
import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from data_prep.records.blocks import block_rows, estimated_bytes, record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.sets import record_sets
from data_prep.shards.checks import RowRules, checked_sample
from tests.fuzz.hostile import bytes_of, json_of, values
from tests.fuzz.targets import Target
from tests.record_files import picture, row
from tests.tiny_model import make_tiny_model
from vico.errors import UserError
from vico.prompt import PromptFormat, load_prompt_format

RULES = RowRules(max_tiles=12, max_pixels=4_000_000, max_tokens=4096, decode=True)
_PICTURE = picture(1)
_TURNS = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "this"}]
ROWS: list[dict[str, Any]] = [
    row("good.png"),
    row(["good.png", "other.jpg"], group="a", id=1, license="x", source="y"),
    row(answer="text only", system="be short"),
    {"messages": _TURNS, "images": ["good.png"]},
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "good.png"}, {"type": "text", "text": "what?"}],
            },
            _TURNS[1],
        ]
    },
    {"query": "<image>what?", "response": "this", "history": [["a", "b"]], "images": [{"url": "good.png"}]},
    {"texts": [{"user": "hello", "assistant": "you"}], "image": None},
    {"instruction": "say", "input": "it", "output": "it", "weight": 1},
    {
        "messages": [{"role": "user", "content": "<image>find <ref-object> at <bbox>"}, _TURNS[1]],
        "images": ["good.png"],
        "objects": {"ref": ["a"], "bbox": [[1, 2, 30, 40]], "bbox_type": "real"},
    },
]


def targets(folder: Path) -> list[Target]:
    """Return the targets of records; their pictures are in `folder`/images, their model in `folder`/model."""
    images = folder / "images"
    (images / "good.png").write_bytes(picture(1))
    (images / "other.jpg").write_bytes(picture(2, format="JPEG"))
    prompt_format = load_prompt_format(make_tiny_model(folder / "model"))
    lines = b"".join(json.dumps(one).encode() + b"\n" for one in ROWS)
    files = [lines, json.dumps(ROWS).encode(), json.dumps(ROWS, indent=1).encode()]
    meta = {
        "a": {"root": "images", "annotation": "a.jsonl", "repeat_time": 2, "max_dynamic_patch": 6},
        "b": {"root": "images", "annotation": "a.jsonl", "license": "x", "data_augment": False},
    }
    tars, parquets = _tars(), _parquet_files()
    return [
        Target("row", json_of(ROWS), partial(_row, images, prompt_format), (Rejected,)),
        Target("lines", bytes_of(files), partial(_text, images, prompt_format)),
        Target("meta", json_of([meta]), partial(_meta, lines)),
        Target(
            "tar",
            st.one_of(bytes_of(tars), _hostile_tars()),
            partial(_container, "webdataset", "a.tar", prompt_format),
        ),
        Target(
            "parquet",
            st.one_of(bytes_of(parquets), _hostile_tables()),
            partial(_container, "parquet", "a.parquet", prompt_format),
        ),
    ]


def _row(images: Path, prompt_format: PromptFormat, folder: Path, data: bytes) -> None:
    for mark_first in (False, True):
        rules = RowRules(12, 4_000_000, 4096, True, mark_first=mark_first)
        raw = RawRow(0, data, False, partial(picture_in_root, images))
        checked_sample(raw, rules, prompt_format)


def _samples(config: RecordsConfig, prompt_format: PromptFormat) -> None:
    blocks = record_blocks(record_sets(config), 2)
    estimated_bytes(blocks)
    for block in blocks:
        for raw in block_rows(block):
            try:
                checked_sample(raw, RULES, prompt_format)
            except Rejected as rejected:
                rejected.message.encode()  # the ledger is UTF-8


def _text(images: Path, prompt_format: PromptFormat, folder: Path, data: bytes) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    _samples(RecordsConfig(format="llava", path=path, root=images), prompt_format)
    meta = folder / "meta.json"
    meta.write_text(json.dumps({"a": {"root": str(images), "annotation": str(path)}}))
    _samples(RecordsConfig(format="internvl", path=meta), prompt_format)


def _meta(lines: bytes, folder: Path, data: bytes) -> None:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "meta.json").write_bytes(data)
    record_blocks(record_sets(RecordsConfig(format="internvl", path=folder / "meta.json")), 2)


def _container(format: Any, name: str, prompt_format: PromptFormat, folder: Path, data: bytes) -> None:
    (folder / name).write_bytes(data)
    _samples(RecordsConfig(format=format, path=folder / name), prompt_format)


def _tars() -> list[bytes]:
    members = {
        "a/1.json": json.dumps(row("1.png")).encode(),
        "a/1.png": picture(1),
        "a/2.txt": b"a caption",
        "a/2.jpg": picture(2, format="JPEG"),
        "3.json": json.dumps(row()).encode(),
    }
    tars = []
    for format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=format) as tar:
            for name, content in members.items():
                member = tarfile.TarInfo("long" * 40 + name if format != tarfile.USTAR_FORMAT else name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        tars.append(data.getvalue())
    return [*tars, gzip.compress(tars[0])]


_NAMES = st.sampled_from(
    [
        "1.json",
        "1.png",
        "2.txt",
        "2.jpg",
        "../1.json",
        "/etc/1.json",
        "a/../../1.png",
        "1.json\x1b[2J",
        "1",
        ".1.json",
        "1..json",
        "x" * 90 + ".json",
        "1.0.png",
        "1.1.png",
        "1.PNG",
        "__meta__/1.json",
        "\udcff.json",
    ]
)
_TYPES = st.sampled_from(
    [tarfile.REGTYPE] * 6
    + [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        b"S",
        b"L",
        b"K",
        b"x",
        b"g",
        b"V",
        b"M",
    ]
)


@st.composite
def _hostile_tars(draw: st.DrawFn) -> bytes:
    """Draw a tar of members with hostile names, types, links, sizes and pax headers."""
    data = io.BytesIO()
    contents = [
        json.dumps(row("1.png")).encode(),
        _PICTURE,
        b"",
        b"caption",
        b"30 size=99999999\n",
        b"99 path=../x\n",
    ]
    format = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    with tarfile.open(fileobj=data, mode="w", format=format, errors="surrogateescape") as tar:
        for _ in range(draw(st.integers(0, 6))):
            member, content = tarfile.TarInfo(draw(_NAMES)), draw(st.sampled_from(contents))
            member.type = draw(_TYPES)
            member.linkname = draw(st.sampled_from(["", "../outside/secret.png", "/etc/passwd", "1.json"]))
            member.size = len(content)
            member.mtime = draw(st.sampled_from([0, 2**33]))
            try:
                tar.addfile(member, io.BytesIO(content))
            except (ValueError, UnicodeError):
                continue
    return data.getvalue()


def _written(table: pa.Table, **options: Any) -> bytes:
    data = io.BytesIO()
    pq.write_table(table, data, **options)
    return data.getvalue()


def _parquet_files() -> list[bytes]:
    good = picture(1)
    turns = [row("x")["conversations"], row()["conversations"], row("x")["conversations"]]
    table = pa.table({"conversations": turns, "image": [good, None, good], "id": [1, 2, 3]})
    nested = pa.table({"messages": [_TURNS] * 3, "images": [[{"bytes": good, "path": "a.png"}]] * 3})
    return [
        _written(table),
        _written(nested, compression="zstd", row_group_size=2),
        _written(table, compression="gzip"),
    ]


_WRITTEN_DEPTH = 300
"""pyarrow takes 2.6 GB to write structs that are nested 900 deep."""


@st.composite
def _hostile_tables(draw: st.DrawFn) -> bytes:
    """Draw a parquet file of columns with the names that are read and any values and types."""
    names = st.sampled_from(
        [
            "conversations",
            "messages",
            "texts",
            "image",
            "images",
            "question",
            "answer",
            "id",
            "system",
            "objects",
            "source",
            "\x1b[2J",
            "",
        ]
    )
    num_rows = draw(st.integers(0, 3))
    kinds = st.one_of(
        st.lists(st.text(max_size=10), min_size=num_rows, max_size=num_rows),
        st.lists(st.binary(max_size=40) | st.just(_PICTURE), min_size=num_rows, max_size=num_rows),
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=num_rows, max_size=num_rows),
        st.lists(st.floats(), min_size=num_rows, max_size=num_rows),
        st.lists(st.dates() | st.none(), min_size=num_rows, max_size=num_rows),
        st.lists(values, min_size=num_rows, max_size=num_rows),
        st.just([row("x")["conversations"]] * num_rows),
        st.just([_TURNS] * num_rows),
    )
    columns, used = [], []
    for name in draw(st.lists(names, min_size=1, max_size=4, unique=draw(st.booleans()))):
        try:
            column = pa.array(draw(kinds))
            if str(column.type).count("<") <= _WRITTEN_DEPTH:
                columns.append(column)
                used.append(name)
        except (pa.ArrowException, OverflowError, RecursionError, UnicodeError, ValueError, TypeError):
            continue
    try:
        return _written(pa.Table.from_arrays(columns, used)) if columns else b"PAR1"
    except (pa.ArrowException, UserError, RecursionError, OSError):
        return b"PAR1"
