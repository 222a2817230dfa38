"""Samples of a records config by line, and tars of given members, for the tests of record formats."""

import io
import tarfile
from pathlib import Path

from data_prep.records.blocks import block_rows, record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.rejection import Rejected
from data_prep.records.sets import record_sets
from data_prep.shards.checks import RowRules, Sample, checked_sample
from tests.record_files import picture
from vico.prompt import PromptFormat

RULES = RowRules(max_tiles=12, max_pixels=200_000, max_tokens=400, decode=True)
PICTURES = {"a.png": picture(1), "b.jpg": picture(2, format="JPEG"), "c.webp": picture(3, format="WEBP")}
QUESTION, ANSWER = "<image>\nwhat?", "this"
TURNS = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]


def samples_by_line(
    config: RecordsConfig, prompt_format: PromptFormat, samples_per_shard: int = 2
) -> dict[int, Sample | str]:
    """Return each line's sample, or the reason why it is rejected; the last block is read first."""
    results: dict[int, Sample | str] = {}
    for block in reversed(record_blocks(record_sets(config), samples_per_shard)):
        for raw in block_rows(block):
            try:
                results[raw.line] = checked_sample(raw, RULES, prompt_format)
            except Rejected as rejected:
                results[raw.line] = rejected.reason
    return dict(sorted(results.items()))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """Write a tar of members by name."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
