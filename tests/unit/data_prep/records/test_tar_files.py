"""Files of WebDataset tars: compressed ones, cut ones, and patterns that name several."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.identity import records_fingerprint
from data_prep.records.sets import record_sets
from data_prep.shards.checks import Sample
from tests.record_files import picture, row
from tests.record_samples import samples_by_line, write_tar
from vico.errors import UserError
from vico.prompt import PromptFormat

DATA = {name: picture(n, format="JPEG") for n, name in enumerate(("red", "blue"), start=40)}


def marked(num_marks: int, **fields: object) -> bytes:
    """Return a row as JSON with marks."""
    return json.dumps({"conversations": row(["x"] * num_marks)["conversations"], **fields}).encode()


def results(path: Path, prompt_format: PromptFormat) -> list[Sample | str]:
    return list(samples_by_line(RecordsConfig(format="webdataset", path=path), prompt_format).values())


@pytest.mark.parametrize(
    "suffix, compress",
    [
        ("tar.gz", gzip.compress),
        ("tgz", gzip.compress),
        ("tar.bz2", bz2.compress),
        ("tar.xz", lzma.compress),
        ("tar", gzip.compress),
    ],
)
def test_compressed_tars_give_the_rows_of_the_plain_one(tmp_path, prompt_format, suffix, compress):
    members = {}
    for n in range(7):
        members |= {
            f"{n}.json": marked(1, id=n),
            f"{n}.jpg": DATA["red"] if n % 2 else DATA["blue"],
        }
    write_tar(tmp_path / "plain.tar", members)
    plain = results(tmp_path / "plain.tar", prompt_format)
    (tmp_path / "c").mkdir()
    compressed = tmp_path / "c" / f"a.{suffix}"
    compressed.write_bytes(compress((tmp_path / "plain.tar").read_bytes()))
    assert results(tmp_path / "c", prompt_format) == plain and len(plain) == 7
    (record_set,) = record_sets(RecordsConfig(format="webdataset", path=tmp_path / "c"))
    assert (record_set.name, record_set.slug) == ("a", "a")
    compressed.write_bytes(compressed.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"a\.{suffix} is (not a complete tar|cut off)"):
        results(tmp_path / "c", prompt_format)


def test_a_compressed_tar_that_was_cut_before_compression_is_refused(tmp_path):
    write_tar(tmp_path / "w.tar", {f"{n}.json": marked(0) for n in range(3)})
    data = (tmp_path / "w.tar").read_bytes()[: 2 * 1024]
    (tmp_path / "w.tar.gz").write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match="cut off or damaged at byte 2048"):
        record_blocks(record_sets(RecordsConfig(format="webdataset", path=tmp_path / "w.tar.gz")), 9)


@pytest.mark.parametrize("magic, name", [(b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4")])
def test_other_compressions_are_named(tmp_path, magic, name):
    (tmp_path / "w.tar").write_bytes(magic + bytes(1000))
    with pytest.raises(UserError, match=f"w.tar is compressed with {name}, which is not read"):
        record_blocks(record_sets(RecordsConfig(format="webdataset", path=tmp_path / "w.tar")), 9)


def test_patterns_with_braces_name_the_shards_that_webdataset_reads(tmp_path):
    for n in range(12):
        write_tar(tmp_path / f"s-{n:03d}.tar", {"1.json": marked(0)})
    (tmp_path / "x{1}").mkdir()
    write_tar(tmp_path / "x{1}" / "a.tar", {"1.json": marked(0)})

    def names(path: str) -> list[str]:
        return [s.name for s in record_sets(RecordsConfig(format="webdataset", path=tmp_path / path))]

    assert names("s-{008..010}.tar") == ["s-008", "s-009", "s-010"]
    assert names("s-{000,011}.tar") == ["s-000", "s-011"]
    assert names("s-{00,01}1*") == ["s-001", "s-011"]
    assert names("x{1}") == names("x{1}/a.tar") == ["a"], "a path with braces that exists"
    with pytest.raises(UserError, match=r"s-012\.tar matches no file"):
        names("s-{008..012}.tar")
    with pytest.raises(UserError, match="correct the braces"):
        names("s-{008..010.tar")
    config = RecordsConfig(format="webdataset", path=tmp_path / "s-{000..001}.tar")
    listed = RecordsConfig(format="webdataset", path=tmp_path / "s-00[01].tar")
    assert records_fingerprint(config) == records_fingerprint(listed)
