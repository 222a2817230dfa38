"""The same good records in several formats, and the tars that a place's records give; for remote places."""

import json
from pathlib import Path

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig, record_sets
from data_prep.shards.checks import RowRules
from data_prep.shards.split import Shares
from data_prep.shards.write import ShardSettings, write_shard
from tests.record_files import write_good_records
from vico.prompt import PromptFormat

SETTINGS = ShardSettings(
    RowRules(max_tiles=12, max_pixels=200_000, max_tokens=400, decode=True), Shares(0.1, 0.1)
)
FORMATS = [("internvl", "meta.json"), ("llava", "good.json"), ("webdataset", "*.tar")]


def write_good_formats(folder: Path, num_rows: int, prompt_format: PromptFormat) -> Path:
    """Good records, the same as a JSON list, and a tar of them, as FORMATS names them."""
    meta = write_good_records(folder, num_rows=num_rows)
    rows = [json.loads(line) for line in (folder / "good.jsonl").read_text().splitlines()]
    (folder / "good.json").write_text(json.dumps(rows))
    (block,) = record_blocks(record_sets(RecordsConfig(format="internvl", path=meta)), 1000)
    write_shard(folder / "good.tar", block, SETTINGS, prompt_format)
    return folder


def files_of(folder: Path, prefix: str) -> dict[str, bytes]:
    """All files below a folder by their names on a server."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {f"{prefix}/{path.relative_to(folder)}": path.read_bytes() for path in paths}


def config_of(format: str, place: Path | str, name: str) -> RecordsConfig:
    """Rows of a list are named from its folder, so the root is said."""
    root = {"root": f"{place}/images"} if format == "llava" else {}
    return RecordsConfig(format=format, path=f"{place}/{name}", **root)


def tars(config: RecordsConfig, folder: Path, prompt_format: PromptFormat) -> tuple[list[bytes], list]:
    """The bytes of the tars of a records config, and its quarantine."""
    found, quarantine = [], []
    for block in record_blocks(record_sets(config), 10):
        path = folder / f"{len(found)}.tar"
        content = write_shard(path, block, SETTINGS, prompt_format)
        found.append(path.read_bytes())
        quarantine += content.quarantine
    return found, quarantine
