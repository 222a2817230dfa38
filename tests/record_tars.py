"""The same good records in several formats, and the tars that they give, for tests of remote records."""

import json
from pathlib import Path

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.rejection import LedgerRow
from data_prep.records.sets import record_sets
from data_prep.shards.checks import RowRules
from data_prep.shards.folder import contents, write_index, write_sidecar
from data_prep.shards.names import shard_name, sidecar_name
from data_prep.shards.split import Shares
from data_prep.shards.write import ShardSettings, write_shard
from tests.record_files import write_good_records
from vico.prompt import PromptFormat

SETTINGS = ShardSettings(
    RowRules(max_tiles=12, max_pixels=200_000, max_tokens=400, decode=True), Shares(0.1, 0.1)
)
FORMATS = [("internvl", "meta.json"), ("llava", "good.json"), ("webdataset", "*.tar")]


def write_good_formats(folder: Path, num_rows: int, prompt_format: PromptFormat) -> Path:
    """Write good records as InternVL, as a JSON list and as a tar, under the names in FORMATS."""
    meta = write_good_records(folder, num_rows=num_rows)
    rows = [json.loads(line) for line in (folder / "good.jsonl").read_text().splitlines()]
    (folder / "good.json").write_text(json.dumps(rows))
    (block,) = record_blocks(record_sets(RecordsConfig(format="internvl", path=meta)), 1000)
    write_shard(folder / "good.tar", block, SETTINGS, prompt_format)
    return folder


def files_of(folder: Path, prefix: str) -> dict[str, bytes]:
    """Return all files of a folder by their names on a server."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {f"{prefix}/{path.relative_to(folder)}": path.read_bytes() for path in paths}


def config_of(format: str, location: Path | str, name: str) -> RecordsConfig:
    """Return the config of one of FORMATS in a local or remote folder.

    A list needs the root: its rows name pictures relative to `images`.
    """
    root = {"root": f"{location}/images"} if format == "llava" else {}
    return RecordsConfig(format=format, path=f"{location}/{name}", **root)


def tars(
    config: RecordsConfig, folder: Path, prompt_format: PromptFormat
) -> tuple[list[bytes], list[LedgerRow]]:
    """Return the bytes of the tars of a records config, and its quarantine."""
    tar_bytes: list[bytes] = []
    quarantine: list[LedgerRow] = []
    for block in record_blocks(record_sets(config), 10):
        path = folder / f"{len(tar_bytes)}.tar"
        content = write_shard(path, block, SETTINGS, prompt_format)
        tar_bytes.append(path.read_bytes())
        quarantine += content.quarantine
    return tar_bytes, quarantine


def write_shard_folder(
    folder: Path, num_rows: int, samples_per_shard: int, prompt_format: PromptFormat
) -> int:
    """Write records to `folder`/records, their shards, sidecars and index; return the number of shards."""
    settings = ShardSettings(RowRules(12, 10**6, 4096, True), Shares(0.2, 0.2))
    meta = write_good_records(folder / "records", num_rows)
    blocks = record_blocks(record_sets(RecordsConfig(format="internvl", path=meta)), samples_per_shard)
    (folder / "sidecars").mkdir()
    for block in blocks:
        content = write_shard(folder / shard_name(block.number), block, settings, prompt_format)
        assert content.quarantine == []
        write_sidecar(folder / sidecar_name(block.number), content)
    write_index(folder / "index.parquet", (content.table for content in contents(folder, len(blocks))))
    return len(blocks)
