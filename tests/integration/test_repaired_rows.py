"""Quarantined rows that were mended: new shards beside the old ones, every row still accounted for once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset

from cluster.ray_session import ray_session
from data_prep.records.config import RecordsConfig
from data_prep.records.repairs import Repairs
from data_prep.shards.index import load_index
from data_prep.shards.reader import SampleReader
from stages.shard.config import ShardConfig
from stages.shard.stage import run
from tests.integration.demo_pipeline import kill_with_children
from tests.integration.shard_run import context_of, site_with
from tests.record_files import picture, row, write_hostile_records, write_lines, write_meta
from tests.tiny_model import make_tiny_model
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


def internvl(path: Path) -> RecordsConfig:
    return RecordsConfig(format="internvl", path=path)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "output").rglob("*"))
        if path.is_file()
    }


def ledger(folder: Path) -> dict[int, str]:
    lines = (folder / "output" / "quarantine.jsonl").read_text().splitlines()
    return {entry["line"]: entry["reason"] for entry in map(json.loads, lines)}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "output" / "manifest.json").read_text())


def mended(folder: Path, base: Path, model: Path, meta: Path, rows: list[dict], config=CONFIG) -> dict:
    repairs = Repairs(
        write_lines(folder.parent / f"{folder.name}.jsonl", rows), base / "output", "base print"
    )
    return run(config, context_of(folder, model, internvl(meta), repaired=repairs))


def test_mended_rows_get_shards_of_their_own_and_the_rest_stays(tmp_path, model):
    meta, reasons = write_hostile_records(tmp_path / "records")
    base, again = tmp_path / "base", tmp_path / "again"
    run(CONFIG, context_of(base, model, internvl(meta)))
    before = files(base)
    lines = {reason: [n for n, found in reasons.items() if found == reason] for reason in reasons.values()}
    absent, duplicate, long = lines["missing_image"][0], lines["duplicate"][0], lines["over_budget"][0]
    (tmp_path / "records" / "images" / "absent.png").write_bytes(picture(7))
    rows = [
        {"source": "bad", "line": long, "row": row("other.jpg", answer="short now", id="mended")},
        {"source": "bad", "line": absent, "reason": "missing_image"},  # its picture is there now
        {"source": "bad", "line": duplicate},
        {"source": "bad", "line": lines["video"][0], "row": row("cut.jpg")},
        {"source": "bad", "line": lines["not_json"][0], "row": row(answer="text")},
        {"source": "bad", "line": lines["not_json"][1], "row": row(answer="text")},
    ]
    config = CONFIG.model_copy(update={"samples_per_shard": 4})  # of the new shards here
    counts = mended(again, base, model, meta, rows, config)
    good = {absent, long, lines["not_json"][0]}
    assert files(base) == before, "the old shards are as they were"
    expected = {line: reason for line, reason in reasons.items() if line not in good}
    expected |= {lines["video"][0]: "undecodable_image", lines["not_json"][1]: "duplicate"}
    assert ledger(again) == expected
    assert counts["read"] == len(reasons) + 2 == counts["written"] + counts["quarantined"]
    assert counts["quarantined"] == len(expected) and counts["written"] == 5
    found = manifest(again)
    assert found["repaired"] == {"base": "base print", "tried": 6, "written": 3}
    assert found["sources"]["bad"]["quarantined"] == counts["quarantined"]
    assert sum(found["splits"].values()) == 5
    old, new = found["shards"][:5], found["shards"][5:]
    assert [{**one, "base": "base print"} for one in manifest(base)["shards"]] == old
    assert [one["samples"] for one in new] == [2, 1] and not any("base" in one for one in new)
    for shard in old:
        assert os.path.samefile(base / "output" / shard["name"], again / "output" / shard["name"])
    index = load_index(again / "output")
    keys = [index.row(n)["key"] for n in range(len(index))]
    assert keys[:2] == ["bad-00000000", "bad-00000041"]
    assert keys[2:] == [f"bad-{line:08d}" for line in sorted(good)]
    reader = SampleReader(again / "output", load_prompt_format(model))
    assert [reader.sample(n).key for n in range(len(index))] == keys
    urls = [str(again / "output" / one["name"]) for one in found["shards"]]
    assert [one["__key__"] for one in webdataset.WebDataset(urls, shardshuffle=False)] == keys
    third = tmp_path / "third"
    counts = mended(third, again, model, meta, [{"source": "bad", "line": duplicate, "row": row(answer="n")}])
    assert counts["written"] == 6 and duplicate not in ledger(third)
    assert [one.get("base") for one in manifest(third)["shards"]] == ["base print"] * 7 + [None]


def test_a_mended_row_with_a_picture_of_another_side_stays_out(tmp_path, model):
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


def test_killed_in_the_middle_and_run_again_gives_the_bytes_of_an_undisturbed_run(tmp_path, model):
    meta = write_meta(tmp_path / "records", bad={})
    for n in range(120):
        (tmp_path / "records" / "images" / f"{n}.png").write_bytes(picture(n))
    write_lines(tmp_path / "records" / "bad.jsonl", [row(f"{n}.png", answer=" ", id=n) for n in range(121)])
    base, config = tmp_path / "base", {"samples_per_shard": 10}
    run(ShardConfig(**config), context_of(base, model, internvl(meta)))
    rows = [{"source": "bad", "line": n, "row": row(f"{n}.png", answer=str(n))} for n in range(121)]
    mended(tmp_path / "whole", base, model, meta, rows, ShardConfig(**config))
    folder = tmp_path / "killed"
    repaired = {"file": str(write_lines(tmp_path / "rows.jsonl", rows)), "base": str(base / "output")}
    job = {"meta": str(meta), "model": str(model), "folder": str(folder), "config": config}
    (tmp_path / "job.json").write_text(json.dumps({**job, "repaired": repaired}))
    command = [sys.executable, "-m", "tests.integration.shard_run", str(tmp_path / "job.json")]
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, cwd=root, env=environment | {"PYTHONPATH": str(root)})
    try:
        deadline = time.monotonic() + 300
        while len(list(folder.glob("output/*.tar"))) < 13 + 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        kill_with_children(process)  # no lease here keeps a worker that outlives it from writing on
    assert not (folder / "output" / "manifest.json").exists()
    repairs = Repairs(Path(repaired["file"]), base / "output", "base print")
    context = context_of(folder, model, internvl(meta), attempt=2, repaired=repairs)
    counts = run(ShardConfig(**config), context)
    assert (counts["read"], counts["written"], counts["quarantined"]) == (121, 120, 1)
    after = {name: data for name, data in files(folder).items() if ".partial-1" not in name}
    assert after == files(tmp_path / "whole")


def test_a_swapped_old_shard_and_rows_that_mend_nothing_are_refused(tmp_path, model):
    meta, reasons = write_hostile_records(tmp_path / "records")
    base = tmp_path / "base"
    run(CONFIG, context_of(base, model, internvl(meta)))
    line = min(reasons)
    cases = [
        ([{"source": "bad", "line": 0, "row": row()}], "line 0 of bad is not in quarantine"),
        ([{"source": "bad", "line": line}] * 2, "line 2: line 1 of bad stands there twice"),
        ([{"source": "bad"}], "does not say which row it mends"),
        ([{"source": "bad", "line": line, "row": "text"}], "row='text' is not an object"),
        ([b"{"], "line 1 is not JSON"),
        ([], "has no rows"),
    ]
    for rows, message in cases:
        with pytest.raises(UserError, match=message):
            mended(tmp_path / "again", base, model, meta, rows)
    tar = base / "output" / "00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"an answer", b"AN ANSWER"))
    with pytest.raises(UserError, match=r"00000\.tar has sha256 \w+, its manifest says"):
        mended(tmp_path / "other", base, model, meta, [{"source": "bad", "line": line, "row": row()}])
