"""The shard stage on real Ray: every row is counted, and any number of tasks gives the same bytes."""

import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from cluster.ray_session import ray_session
from data_prep.records.rejection import REASONS, LedgerRow
from data_prep.shards.index import load_index
from stages.shard.check import check_records
from stages.shard.config import ShardConfig
from stages.shard.stage import all_sets, run
from tests.integration.shard_run import context_of, files, internvl, manifest, site_with
from tests.record_files import (
    picture,
    row,
    write_good_records,
    write_hostile_records,
    write_lines,
    write_meta,
    write_sharing_records,
)
from tests.tiny_model import make_tiny_model
from vico.errors import UserError
from vico.settings import load_settings

LIMITS = {"max_pixels": 200_000, "max_tokens": 400}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def ray_up():
    with ray_session(site_with(2)):
        yield


def ledger(folder: Path) -> list[LedgerRow]:
    return [json.loads(line) for line in (folder / "output" / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("token", ["<|endoftext|>", "</img>"])
def test_a_system_message_that_spells_a_control_token_is_refused_before_rows_are_read(tmp_path, model, token):
    meta = write_meta(tmp_path / "records", mine={})
    (tmp_path / "records" / "mine.jsonl").write_text("no row was read")
    config = ShardConfig.model_construct(**ShardConfig().model_dump() | {"system_message": f"Be {token}"})
    context = context_of(tmp_path / "shard", model, internvl(meta))
    with pytest.raises(
        UserError, match=rf"shard.system_message='Be {re.escape(token)}' spells .*leave it out"
    ):
        run(config, context)
    with pytest.raises(UserError, match=r"shard.system_message="):
        check_records(config, all_sets(context), model, site_with(1))
    assert not (tmp_path / "shard" / "output").exists()


def test_every_bad_row_is_quarantined_with_its_reason_and_every_good_row_written(tmp_path, model, ray_up):
    meta, reasons = write_hostile_records(tmp_path / "records")
    context = context_of(tmp_path / "shard", model, internvl(meta))
    counts = run(ShardConfig(samples_per_shard=9, **LIMITS), context)
    written = manifest(tmp_path / "shard")
    num_rows = len((tmp_path / "records" / "bad.jsonl").read_bytes().splitlines())
    assert counts["read"] == written["read"] == num_rows
    assert counts["written"] == 2 and counts["quarantined"] == num_rows - 2
    assert {row["line"]: row["reason"] for row in ledger(tmp_path / "shard")} == reasons
    assert written["reasons"] == dict(Counter(reasons.values())) and set(written["reasons"]) <= set(REASONS)
    assert written["sources"]["bad"]["read"] == num_rows
    assert [shard["samples"] for shard in written["shards"]] == [1, 0, 0, 0, 1]
    assert [shard["name"] for shard in written["shards"]] == [f"{n:05d}.tar" for n in range(5)]
    index = load_index(tmp_path / "shard" / "output")
    assert [index.row(n)["key"] for n in range(len(index))] == ["bad-00000000", "bad-00000042"]
    assert context.reported[-1] == (num_rows, num_rows, "rows") and context.num_checks > 0


def test_webdataset_and_tar_find_the_original_bytes_in_the_shards(tmp_path, model, ray_up):
    meta = write_good_records(tmp_path / "records")
    run(ShardConfig(samples_per_shard=10), context_of(tmp_path / "shard", model, internvl(meta)))
    output = tmp_path / "shard" / "output"
    urls = [str(output / shard["name"]) for shard in manifest(tmp_path / "shard")["shards"]]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"good-{n:08d}" for n in range(24)]
    for n, sample in enumerate(samples):
        record = json.loads(sample["json"])
        assert (record["source"], record["line"], record["id"]) == ("good", n, str(n))
        for k, name in enumerate(record["images"]):
            extension = name.removeprefix(f"good-{n:08d}.")
            original = tmp_path / "records" / "images" / f"{n}-{k}.{extension.split('.')[-1]}"
            assert sample[extension] == original.read_bytes()
    with tarfile.open(urls[0]) as tar:
        names = tar.getnames()
    assert names[:4] == [
        "good-00000000.json",
        "good-00000001.json",
        "good-00000001.jpg",
        "good-00000002.json",
    ]
    assert names[4:6] == ["good-00000002.0.webp", "good-00000002.1.webp"]
    listed = subprocess.run(["tar", "xOf", urls[0], "good-00000001.jpg"], capture_output=True, check=True)
    assert listed.stdout == (tmp_path / "records" / "images" / "1-0.jpg").read_bytes()


def test_one_and_two_tasks_give_the_same_bytes(tmp_path, model, ray_up):
    meta, _ = write_hostile_records(tmp_path / "bad")
    write_good_records(tmp_path / "good")
    sets = json.loads(meta.read_text()) | {
        "good": {
            "root": str(tmp_path / "good" / "images"),
            "annotation": str(tmp_path / "good" / "good.jsonl"),
        }
    }
    meta.write_text(json.dumps(sets))
    contents = []
    for tasks in (1, 2):
        folder = tmp_path / f"shard-{tasks}"
        context = replace(context_of(folder, model, internvl(meta)), site=site_with(tasks))
        run(ShardConfig(samples_per_shard=5, **LIMITS), context)
        contents.append(files(folder))
    assert contents[0] == contents[1]
    tars = [name for name in contents[0] if name.endswith(".tar")]
    assert len(tars) == 9 + 5 and len(contents[0]) == len(tars) + 3, "no sidecar or partial file is left"


def test_a_stage_that_is_done_changes_nothing_and_reads_nothing(tmp_path, model, ray_up):
    meta = write_good_records(tmp_path / "records")
    folder, config = tmp_path / "shard", ShardConfig(samples_per_shard=5)
    counts = run(config, context_of(folder, model, internvl(meta)))
    whole = files(folder)
    assert run(config, context_of(folder, model, internvl(meta), attempt=2)) == counts
    assert files(folder) == whole
    shutil.rmtree(tmp_path / "records" / "images")
    assert run(config, context_of(folder, model, internvl(meta), attempt=3)) == counts


def test_a_sidecar_without_its_tar_is_written_again(tmp_path, model, ray_up):
    """A killed task may leave only a sidecar; the pictures may have changed since."""
    meta = write_good_records(tmp_path / "records")
    config = ShardConfig(samples_per_shard=5)
    run(config, context_of(tmp_path / "whole", model, internvl(meta)))
    folder = tmp_path / "shard"
    (folder / "output" / "sidecars").mkdir(parents=True)
    (folder / "output" / "sidecars" / "00002.parquet").write_bytes(b"outdated")
    run(config, context_of(folder, model, internvl(meta)))
    assert files(folder) == files(tmp_path / "whole")


def test_held_out_records_are_the_test_split(tmp_path, model, ray_up):
    records, heldout = write_good_records(tmp_path / "a"), write_good_records(tmp_path / "b", num_rows=7)
    context = context_of(tmp_path / "shard", model, internvl(records), internvl(heldout))
    counts = run(ShardConfig(samples_per_shard=10, calib_share=0.3), context)
    table = load_index(tmp_path / "shard" / "output").table(["source", "split"]).to_pylist()
    assert {row["split"] for row in table if row["source"] == "good"} == {"train", "calib"}
    assert {row["split"] for row in table if row["source"] == "heldout-good"} == {"test"}
    assert counts["num_test"] == 7 and counts["read"] == 31


def test_training_rows_with_a_held_out_picture_are_quarantined(tmp_path, model, ray_up):
    """Also when a row has a group, which decides its split without looking at its pictures."""
    meta = write_meta(tmp_path / "train", mine={})
    for n in range(12):
        (tmp_path / "train" / "images" / f"{n}.png").write_bytes(picture(n))
    rows = [row(f"{n}.png", group="g" if n % 2 else None, answer=str(n)) for n in range(12)]
    write_lines(tmp_path / "train" / "mine.jsonl", [*rows, row(["0.png", "7.png"], group="h")])
    heldout = write_meta(tmp_path / "held", out={"root": str(tmp_path / "train" / "images")})
    write_lines(tmp_path / "held" / "out.jsonl", [row("6.png"), row("7.png")])
    config, folder = ShardConfig(samples_per_shard=4, calib_share=0), tmp_path / "shard"
    counts = run(config, context_of(folder, model, internvl(meta), internvl(heldout)))
    quarantined = {(row["source"], row["line"]): row["reason"] for row in ledger(folder)}
    assert quarantined == {("mine", line): "straddles_split" for line in (6, 7, 12)}
    assert (counts["read"], counts["written"], counts["quarantined"]) == (15, 12, 3)
    assert manifest(folder)["splits"] == {"train": 10, "calib": 0, "test": 2}
    shards = manifest(folder)["shards"]
    urls = [str(folder / "output" / shard["name"]) for shard in shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    keys = load_index(folder / "output").table(["key"])["key"].to_pylist()
    assert [sample["__key__"] for sample in samples] == keys and "mine-00000007" not in keys
    assert not (folder / "output" / "sidecars").exists()


def test_licenses_and_origins_come_from_row_or_set_and_are_counted(tmp_path, model, ray_up):
    meta = write_meta(tmp_path, mine={"license": "CC-BY-4.0", "source": "a museum"})
    rows = [row(), row(answer="2", license="CC0"), row(answer="3", source="a book")]
    write_lines(tmp_path / "mine.jsonl", rows)
    run(ShardConfig(), context_of(tmp_path / "shard", model, internvl(meta)))
    table = load_index(tmp_path / "shard" / "output").table(["license", "origin"])
    assert table["license"].to_pylist() == ["CC-BY-4.0", "CC0", "CC-BY-4.0"]
    assert table["origin"].to_pylist() == ["a museum", "a museum", "a book"]
    assert manifest(tmp_path / "shard")["licenses"] == {"CC-BY-4.0": 2, "CC0": 1}
    assert manifest(tmp_path / "shard")["origins"] == {"a museum": 2, "a book": 1}


def test_sets_have_their_own_repeat_and_tiles(tmp_path, model, ray_up):
    meta = write_meta(tmp_path, few={"max_dynamic_patch": 2, "repeat_time": 0.5}, many={})
    (tmp_path / "images" / "a.png").write_bytes(picture(1, (400, 100)))
    for name in ("few", "many"):
        write_lines(tmp_path / f"{name}.jsonl", [row("a.png")])
    run(ShardConfig(max_tiles=6), context_of(tmp_path / "shard", model, internvl(meta)))
    few, many = load_index(tmp_path / "shard" / "output").table().to_pylist()
    assert (few["max_tiles"], few["tiles"], few["repeat"]) == (2, [3], 0.5)
    assert (many["max_tiles"], many["tiles"], many["repeat"]) == (6, [5], 1.0)
    assert few["split"] == many["split"], "the same picture is in one split in every set"


def test_a_set_that_asks_for_more_tiles_than_the_model_makes_is_named_to_who_follows_the_run(
    tmp_path, model, ray_up
):
    meta = write_meta(tmp_path, more={"max_dynamic_patch": 40}, few={"max_dynamic_patch": 2}, own={})
    for name in ("more", "few", "own"):
        write_lines(tmp_path / f"{name}.jsonl", [row(answer=name)])
    limit = load_settings(model).max_tiles
    context = context_of(tmp_path / "shard", model, internvl(meta))
    run(ShardConfig(max_tiles=limit), context)
    (note,) = [line for line in context.reported if "tiles at most" in line]
    assert note.startswith("max_dynamic_patch=40 of set more") and str(limit) in note
    rows = load_index(tmp_path / "shard" / "output").table().to_pylist()
    assert [row["max_tiles"] for row in rows if row["source"] == "more"] == [limit]


def test_rows_of_several_pictures_need_no_group(tmp_path, model, ray_up):
    """No row is lost, rows that share a picture are together, and the number of tasks does not matter."""
    meta, num_rows = write_sharing_records(tmp_path, num_rows=120)
    contents, splits = [], []
    for tasks, rows_per_shard in ((1, 7), (2, 7), (2, 1000)):
        folder = tmp_path / f"shard-{tasks}-{rows_per_shard}"
        context = replace(context_of(folder, model, internvl(meta)), site=site_with(tasks))
        counts = run(ShardConfig(samples_per_shard=rows_per_shard), context)
        assert (counts["read"], counts["written"]) == (num_rows, num_rows)
        table = load_index(folder / "output").table(["image_sha256", "split"]).to_pylist()
        of_picture = {digest: written["split"] for written in table for digest in written["image_sha256"]}
        assert all(
            {of_picture[d] for d in written["image_sha256"]} == {written["split"]} for written in table
        )
        assert Counter(written["split"] for written in table) == manifest(folder)["splits"]
        assert min(manifest(folder)["splits"].values()) > 0
        assert not (folder / "output" / "sidecars").exists()
        contents.append(files(folder))
        splits.append(of_picture)
    assert contents[0] == contents[1] and splits[1] == splits[2]


def test_a_row_is_quarantined_where_a_group_contradicts_a_shared_picture(tmp_path, model, ray_up):
    meta = write_meta(tmp_path, pairs={})
    for n in range(20):
        (tmp_path / "images" / f"{n}.png").write_bytes(picture(n))
    pairs = [row([f"{n}.png", f"{n + 1}.png"], answer=str(n)) for n in range(19)]
    groups = [row(f"{n}.png", group=f"g{n}", answer=f"grouped {n}") for n in range(20)]
    write_lines(tmp_path / "pairs.jsonl", [*pairs, *groups])
    config = ShardConfig(calib_share=0.3, test_share=0.3, samples_per_shard=10)
    counts = run(config, context_of(tmp_path / "shard", model, internvl(meta)))
    assert 0 < counts["quarantined_straddles_split"] == counts["quarantined"] < 39
    rows = load_index(tmp_path / "shard" / "output").table(["image_sha256", "split", "group"]).to_pylist()
    splits: dict[bytes, set[str]] = {}
    for written in rows:
        for digest in written["image_sha256"]:
            splits.setdefault(digest, set()).add(written["split"])
    assert all(len(of_picture) == 1 for of_picture in splits.values())
    assert len({written["split"] for written in rows if not written["group"]}) <= 1
    messages = [quarantined["message"] for quarantined in ledger(tmp_path / "shard")]
    assert all("through a group, a held-out row" in message for message in messages)


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path, model, ray_up, monkeypatch):
    meta = write_good_records(tmp_path / "records")
    monkeypatch.setattr(
        "stages.shard.stage.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(UserError, match=r"storage=.*GB free but the shards need about"):
        run(ShardConfig(), context_of(tmp_path / "shard", model, internvl(meta)))
    assert files(tmp_path / "shard") == {}


def test_a_full_disk_in_a_task_is_one_line(tmp_path, model, monkeypatch):
    from data_prep.records.blocks import record_blocks
    from data_prep.records.sets import record_sets
    from stages.shard.tasks import ShardTask, shard_settings, write_part

    meta = write_good_records(tmp_path / "records")
    (block,) = record_blocks(record_sets(internvl(meta)), 1000)
    context = context_of(tmp_path / "shard", model, internvl(meta))

    def write_on_a_full_disk(path, *_, **__):  # a link to /dev/full would be removed, not followed
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"tar")

    monkeypatch.setattr("stages.shard.tasks.write_shard", write_on_a_full_disk)
    with pytest.raises(UserError, match=r"storage=.* is full \(No space left on device\)"):
        settings = shard_settings(ShardConfig(), block.record_set, heldout=False)
        write_part(ShardTask(block, settings, model, context.parts))


def test_records_without_rows_are_refused(tmp_path, model):
    write_lines(tmp_path / "empty.jsonl", [])
    meta = write_meta(tmp_path, empty={})
    with pytest.raises(UserError, match="no rows"):
        run(ShardConfig(), context_of(tmp_path / "shard", model, internvl(meta)))
