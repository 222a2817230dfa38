"""What fuzzing found once: each is one line for the user, or a row in quarantine that can be written."""

import json
import tarfile
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.sets import record_sets
from data_prep.shards.folder import write_quarantine
from data_prep.shards.index import load_index
from data_prep.shards.open_shards import ShardMismatch
from data_prep.shards.reader import SampleReader
from data_prep.shards.write import write_shard
from tests.record_files import row
from tests.record_tars import SETTINGS, write_shard_folder
from tests.tiny_model import make_tiny_model
from vico.checkpoints.expected_tensors import checked_tensors
from vico.errors import UserError


def test_a_member_of_a_tar_whose_name_is_not_utf8(tmp_path, prompt_format):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, errors="surrogateescape") as tar:
        data = json.dumps(row("1.png")).encode()
        member = tarfile.TarInfo("\udcff.json")
        member.size = len(data)
        tar.addfile(member, BytesIO(data))
    (block,) = record_blocks(record_sets(RecordsConfig(format="webdataset", path=path)), 10)
    content = write_shard(tmp_path / "00000.tar", block, SETTINGS, prompt_format)
    write_quarantine(tmp_path / "quarantine.jsonl", content.quarantine)
    (line,) = (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert "the sample \\udcff" in json.loads(line)["message"]


def test_an_extension_in_a_tar_that_is_not_utf8(tmp_path, prompt_format):
    """The member is none that is read; its bytes count for the digest by which duplicates are found."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, errors="surrogateescape") as tar:
        for name in ("1.json", "1.j\udcff\udcfe", "2.json", "2.j\udcff\udcfd"):
            data = json.dumps(row()).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    (block,) = record_blocks(record_sets(RecordsConfig(format="webdataset", path=path)), 10)
    content = write_shard(tmp_path / "00000.tar", block, SETTINGS, prompt_format)
    assert content.table.num_rows == 2 and not content.quarantine


def test_a_file_of_rows_whose_name_is_not_utf8(tmp_path):
    path = tmp_path / "\udcff.jsonl"
    path.write_text(json.dumps(row()))
    with pytest.raises(UserError, match="is not UTF-8; rename the file"):
        record_sets(RecordsConfig(format="llava", path=tmp_path))


@pytest.mark.parametrize("field", ["root", "annotation"])
def test_a_name_in_a_meta_file_that_no_file_can_have(tmp_path, field):
    (tmp_path / "a.jsonl").write_text("")
    meta = {"a": {"root": ".", "annotation": "a.jsonl", field: "a" * 5000}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f"has {field}=a"):
        record_sets(RecordsConfig(format="internvl", path=tmp_path / "meta.json"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, prompt_format):
    folder = tmp_path_factory.mktemp("shards")
    write_shard_folder(folder, 12, 8, prompt_format)
    return folder


@pytest.fixture
def index(shards, tmp_path):
    """A shard folder whose index the test changes: `write(rows)`."""
    for name in ("index.parquet", "00000.tar", "00001.tar"):
        (tmp_path / name).write_bytes((shards / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-9], lambda data: data[:200] + b"\xff" * 900 + data[1100:]],
    ids=["empty", "cut", "overwritten"],
)
def test_an_index_with_damaged_bytes(index, damage):
    path = index / "index.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"index.parquet is damaged \(.*--force shard"):
        load_index(index).table()


def test_an_index_with_a_text_that_is_not_utf8(index, prompt_format):
    path = index / "index.parquet"
    table = pq.read_table(path)
    for name in ("key", "source"):
        texts = pa.array([value.encode() + b"\xca" for value in table[name].to_pylist()])
        column = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())
        changed = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(changed, path)
        for read in (lambda: load_index(index).table(), lambda: SampleReader(index, prompt_format).sample(0)):
            with pytest.raises(UserError, match=r"index.parquet is damaged \(.*UTF8"):
                read()


@pytest.mark.parametrize(
    "before, after",
    [
        (b'"conversations"', b'"conversationz"'),
        (b'"from"', b'"form"'),
        (b'"conversations": [', b'"conversations":[['),
        (b'"value": "', b'"value":["'),
    ],
)
def test_a_shard_whose_records_have_no_turns(index, prompt_format, before, after):
    path = index / "00000.tar"
    data = path.read_bytes()
    assert before in data
    path.write_bytes(data.replace(before, after))
    for method in ("sample", "record"):
        with pytest.raises(
            ShardMismatch, match=r"good-00000000: its (conversations are not|offset does not)"
        ):
            getattr(SampleReader(index, prompt_format), method)(0)


def test_an_index_without_a_column_or_with_another_type(index):
    path = index / "index.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("image_sha256"), path)
    with pytest.raises(UserError, match="its column image_sha256 is missing"):
        load_index(index)
    line = table["line"].cast(pa.int32())
    pq.write_table(table.set_column(table.column_names.index("line"), "line", line), path)
    with pytest.raises(UserError, match="its column line is missing or not int64"):
        load_index(index)


@pytest.mark.parametrize(
    "change",
    [
        {"json_offset": -1},
        {"json_offset": 2**40},
        {"image_bytes": [2**31 - 1]},
        {"image_bytes": []},
        {"image_offsets": []},
        {"image_sha256": []},
        {"max_tiles": -1},
    ],
    ids=str,
)
def test_an_index_that_contradicts_its_shards_or_itself(index, prompt_format, change):
    table = pq.read_table(index / "index.parquet")
    rows = table.to_pylist()
    number = next(n for n, one in enumerate(rows) if len(one["tiles"]) == 1)
    rows[number] |= change
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), index / "index.parquet")
    with pytest.raises(ShardMismatch, match="does not match its index"):
        SampleReader(index, prompt_format).sample(number)


@pytest.mark.parametrize(
    "change",
    [
        {"image_token_id": None},
        {"text_config": []},
        {"text_config": {"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["full_attention"]}},
        {"vision_config": {"patch_size": []}},
        {"vico": []},
        {"dtype": "images"},
        {"llm_config": 5},
    ],
    ids=str,
)
def test_a_model_config_that_describes_no_model(tmp_path, change):
    model = make_tiny_model(tmp_path / "model")
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=r"config.json.*copy the model folder again"):
        checked_tensors(model)
