"""Quarantined rows that were repaired: new shards beside the old ones, every row still counted once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset

from cluster.ray_session import ray_session
from data_prep.records.repairs import Repairs
from data_prep.shards.index import load_index
from data_prep.shards.reader import SampleReader
from stages.shard.config import ShardConfig
from stages.shard.stage import run
from tests.integration.demo_pipeline import kill_with_children
from tests.integration.shard_run import context_of, files, internvl, manifest, site_with
from tests.record_files import picture, row, write_hostile_records, write_lines, write_meta
from tests.tiny_model import make_tiny_model
from tests.waiting import wait_until
from vico.errors import UserError
from vico.prompt import load_prompt_format

CONFIG = ShardConfig(samples_per_shard=9, max_pixels=200_000, max_tokens=400)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module", autouse=True)
def ray_up():
    with ray_session(site_with(2)):
        yield


def ledger(folder: Path) -> dict[int, str]:
    lines = (folder / "output" / "quarantine.jsonl").read_text().splitlines()
    return {row["line"]: row["reason"] for row in map(json.loads, lines)}


def repair(
    folder: Path, base: Path, model: Path, meta: Path, rows: list[dict | bytes], config: ShardConfig = CONFIG
) -> dict[str, float | int | str]:
    """Run the stage with repaired rows of `base` and return its counts."""
    path = write_lines(folder.parent / f"{folder.name}.jsonl", rows)
    repairs = Repairs(path, base / "output", "base print")
    return run(config, context_of(folder, model, internvl(meta), repaired=repairs))


def test_repaired_rows_get_shards_of_their_own_and_the_old_ones_stay(tmp_path, model):
    meta, reasons = write_hostile_records(tmp_path / "records")
    base, again = tmp_path / "base", tmp_path / "again"
    run(CONFIG, context_of(base, model, internvl(meta)))
    before = files(base)
    lines = {reason: [n for n, r in reasons.items() if r == reason] for reason in reasons.values()}
    absent, duplicate, long = lines["missing_image"][0], lines["duplicate"][0], lines["over_budget"][0]
    (tmp_path / "records" / "images" / "absent.png").write_bytes(picture(7))
    rows = [
        {"source": "bad", "line": long, "row": row("other.jpg", answer="short now", id="repaired")},
        {"source": "bad", "line": absent, "reason": "missing_image"},  # its picture is there now
        {"source": "bad", "line": duplicate},
        {"source": "bad", "line": lines["video"][0], "row": row("cut.jpg")},
        {"source": "bad", "line": lines["not_json"][0], "row": row(answer="text")},
        {"source": "bad", "line": lines["not_json"][1], "row": row(answer="text")},
    ]
    config = CONFIG.model_copy(update={"samples_per_shard": 4})  # here of the new shards
    counts = repair(again, base, model, meta, rows, config)
    good = {absent, long, lines["not_json"][0]}
    assert files(base) == before, "the old shards are as they were"
    expected = {line: reason for line, reason in reasons.items() if line not in good}
    expected |= {lines["video"][0]: "undecodable_image", lines["not_json"][1]: "duplicate"}
    assert ledger(again) == expected
    assert counts["read"] == len(reasons) + 2 == counts["written"] + counts["quarantined"]
    assert counts["quarantined"] == len(expected) and counts["written"] == 5
    repaired = manifest(again)
    assert repaired["repaired"] == {"base": "base print", "tried": 6, "written": 3}
    assert repaired["sources"]["bad"]["quarantined"] == counts["quarantined"]
    assert sum(repaired["splits"].values()) == 5
    old, new = repaired["shards"][:5], repaired["shards"][5:]
    assert [{**shard, "base": "base print"} for shard in manifest(base)["shards"]] == old
    assert [shard["samples"] for shard in new] == [2, 1] and not any("base" in shard for shard in new)
    for shard in old:
        assert os.path.samefile(base / "output" / shard["name"], again / "output" / shard["name"])
    index = load_index(again / "output")
    keys = [index.row(n)["key"] for n in range(len(index))]
    assert keys[:2] == ["bad-00000000", "bad-00000042"]
    assert keys[2:] == [f"bad-{line:08d}" for line in sorted(good)]
    reader = SampleReader(again / "output", load_prompt_format(model))
    assert [reader.sample(n).key for n in range(len(index))] == keys
    urls = [str(again / "output" / shard["name"]) for shard in repaired["shards"]]
    assert [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)] == keys
    third = tmp_path / "third"
    counts = repair(third, again, model, meta, [{"source": "bad", "line": duplicate, "row": row(answer="n")}])
    assert counts["written"] == 6 and duplicate not in ledger(third)
    assert [shard.get("base") for shard in manifest(third)["shards"]] == ["base print"] * 7 + [None]


def test_a_repaired_row_with_a_picture_of_another_split_stays_in_quarantine(tmp_path, model):
    meta = write_meta(tmp_path / "train", mine={})
    for n in range(3):
        (tmp_path / "train" / "images" / f"{n}.png").write_bytes(picture(n))
    write_lines(
        tmp_path / "train" / "mine.jsonl", [row("0.png"), row("none.png"), row("none.png", answer="b")]
    )
    held = write_meta(tmp_path / "held", out={"root": str(tmp_path / "train" / "images")})
    write_lines(tmp_path / "held" / "out.jsonl", [row("1.png")])
    config, base = ShardConfig(calib_share=0), tmp_path / "base"
    run(config, context_of(base, model, internvl(meta), internvl(held)))
    rows = [{"source": "mine", "line": n, "row": row(f"{n}.png", answer=str(n))} for n in (1, 2)]
    repairs = Repairs(write_lines(tmp_path / "rows.jsonl", rows), base / "output", "base")
    folder = tmp_path / "again"
    run(config, context_of(folder, model, internvl(meta), internvl(held), repaired=repairs))
    assert ledger(folder) == {1: "straddles_split"}
    assert manifest(folder)["splits"] == {"train": 2, "calib": 0, "test": 1}


def test_a_repaired_row_takes_the_side_of_the_old_rows_that_share_its_pictures(tmp_path, model):
    """Also when its own draw, or that of another repaired row, is another side."""
    meta = write_meta(tmp_path / "records", mine={})
    for n in range(120):
        (tmp_path / "records" / "images" / f"{n}.png").write_bytes(picture(n))
    old = [row([f"{3 * n}.png", f"{3 * n + 1}.png"], answer=str(n)) for n in range(40)]
    bad = [row([f"{3 * n + 1}.png", f"{3 * n + 2}.png"], answer=" ", id=n) for n in range(40)]
    alone = [row(f"{3 * n + 2}.png", answer=" ", id=40 + n) for n in range(40)]
    write_lines(tmp_path / "records" / "mine.jsonl", [*old, *bad, *alone])
    base, folder = tmp_path / "base", tmp_path / "again"
    config = ShardConfig(calib_share=0.3, test_share=0.3, samples_per_shard=15)
    assert run(config, context_of(base, model, internvl(meta)))["written"] == 40
    rows = [
        {"source": "mine", "line": 40 + n, "row": {**bad_row, "conversations": old[0]["conversations"]}}
        for n, bad_row in enumerate(bad)
    ]
    rows += [
        {"source": "mine", "line": 80 + n, "row": row(f"{3 * n + 2}.png", answer=str(n))} for n in range(40)
    ]
    counts = repair(folder, base, model, meta, rows, config)
    assert (counts["written"], counts["quarantined"]) == (120, 0)
    splits = load_index(folder / "output").table(["split"])["split"].to_pylist()
    assert splits[:40] == load_index(base / "output").table(["split"])["split"].to_pylist()
    assert splits[40:80] == splits[:40] == splits[80:] and set(splits) == {"train", "calib", "test"}


def test_a_repaired_row_that_connects_old_pictures_of_two_sides_stays_in_quarantine(tmp_path, model):
    meta = write_meta(tmp_path / "records", mine={})
    for n in range(32):
        (tmp_path / "records" / "images" / f"{n}.png").write_bytes(picture(n))
    old = [row(f"{n}.png", answer=str(n)) for n in range(30)]
    write_lines(tmp_path / "records" / "mine.jsonl", [*old, *(row("a", answer=" ", id=n) for n in range(3))])
    base, folder = tmp_path / "base", tmp_path / "again"
    config = ShardConfig(calib_share=0.3, test_share=0.3)
    run(config, context_of(base, model, internvl(meta)))
    table = load_index(base / "output").table(["line", "split"]).to_pylist()
    of_side = {side: [r["line"] for r in table if r["split"] == side] for side in ("train", "test")}
    (train, other_train, *_), test = of_side["train"], of_side["test"][0]
    connecting = [(train, test), (train, 30), (other_train, 31)]  # 30 and 31 are new
    rows = [
        {"source": "mine", "line": 30 + n, "row": row([f"{a}.png", f"{b}.png"], answer=str(n))}
        for n, (a, b) in enumerate(connecting)
    ]
    repair(folder, base, model, meta, rows, config)
    lines = (folder / "output" / "quarantine.jsonl").read_text().splitlines()
    (left,) = map(json.loads, lines)
    assert (left["line"], left["reason"]) == (30, "straddles_split")
    assert "for a repaired row, the old shards" in left["message"]
    after = load_index(folder / "output").table(["line", "split"]).to_pylist()
    assert after[:30] == table
    assert [(r["line"], r["split"]) for r in after[30:]] == [(31, "train"), (32, "train")]


@pytest.mark.slow
def test_a_killed_run_that_resumes_gives_the_bytes_of_an_undisturbed_run(tmp_path, model):
    meta = write_meta(tmp_path / "records", bad={})
    for n in range(120):
        (tmp_path / "records" / "images" / f"{n}.png").write_bytes(picture(n))
    write_lines(tmp_path / "records" / "bad.jsonl", [row(f"{n}.png", answer=" ", id=n) for n in range(121)])
    base, config = tmp_path / "base", {"samples_per_shard": 10}
    run(ShardConfig(**config), context_of(base, model, internvl(meta)))
    rows = [{"source": "bad", "line": n, "row": row(f"{n}.png", answer=str(n))} for n in range(121)]
    repair(tmp_path / "whole", base, model, meta, rows, ShardConfig(**config))
    folder = tmp_path / "killed"
    repaired = {"file": str(write_lines(tmp_path / "rows.jsonl", rows)), "base": str(base / "output")}
    job = {"meta": str(meta), "model": str(model), "folder": str(folder), "config": config}
    (tmp_path / "job.json").write_text(json.dumps({**job, "repaired": repaired}))
    command = [sys.executable, "-m", "tests.integration.shard_run", str(tmp_path / "job.json")]
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, cwd=root, env=environment | {"PYTHONPATH": str(root)})
    try:
        wait_until(lambda: len(list(folder.glob("output/*.tar"))) >= 13 + 4, process, pause_s=0.005)
    finally:
        kill_with_children(process)  # without a lease nothing would stop a worker that outlives it
    assert not (folder / "output" / "manifest.json").exists()
    repairs = Repairs(Path(repaired["file"]), base / "output", "base print")
    context = context_of(folder, model, internvl(meta), attempt=2, repaired=repairs)
    counts = run(ShardConfig(**config), context)
    assert (counts["read"], counts["written"], counts["quarantined"]) == (121, 120, 1)
    after = {name: data for name, data in files(folder).items() if ".partial-1" not in name}
    assert after == files(tmp_path / "whole")


def test_a_changed_old_shard_and_rows_that_repair_nothing_are_refused(tmp_path, model):
    meta, reasons = write_hostile_records(tmp_path / "records")
    base = tmp_path / "base"
    run(CONFIG, context_of(base, model, internvl(meta)))
    line = min(reasons)
    cases = [
        (
            [{"source": "bad", "line": 0, "row": row()}],
            r'line 1: {"source": "bad", "line": 0} is not in quarantine',
        ),
        ([{"source": "bad", "line": line}] * 2, r'line 2: {"source": "bad", "line": 1} is repeated'),
        ([{"source": "bad"}], "does not say which row it repairs"),
        ([{"source": "bad", "line": line, "row": "text"}], "row='text' is not an object"),
        ([b"{"], "line 1 is not JSON"),
        ([], "has no rows"),
    ]
    for rows, message in cases:
        with pytest.raises(UserError, match=message):
            repair(tmp_path / "again", base, model, meta, rows)
    tar = base / "output" / "00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"an answer", b"AN ANSWER"))
    with pytest.raises(UserError, match=r"00000\.tar has sha256 \w+, its manifest says"):
        repair(tmp_path / "other", base, model, meta, [{"source": "bad", "line": line, "row": row()}])
