"""`vico init`, `vico data check`, `build` and `retry` as a user runs them, on good and bad records."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_prep.shards.names import sample_key
from tests.integration.demo_pipeline import answer, finished, vico
from tests.record_files import picture, row, write_good_records, write_hostile_records, write_lines
from tests.record_samples import write_tar
from tests.s3_server import environment, s3_server, upload
from tests.tiny_model import make_tiny_model
from vico.shown_text import printable


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a model, a site and a pipeline file on the hostile set."""
    folder = tmp_path_factory.mktemp("project")
    make_tiny_model(folder / "model")
    meta, reasons = write_hostile_records(folder / "bad")
    site = {"name": "test", "storage": str(folder / "runs"), "tracking": {"enabled": False}}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    content = {
        "inputs": {"records": {"format": "internvl", "path": str(meta)}, "model": str(folder / "model")},
        "shard": {"samples_per_shard": 9, "max_pixels": 200_000, "max_tokens": 400},
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(content))
    return folder, reasons


@pytest.mark.slow
def test_check_and_build_account_for_every_row_of_a_hostile_set(project):
    folder, reasons = project
    where = (folder / "pipeline.yaml", "--site", folder / "site.yaml")
    report = answer("data", "check", *where)
    assert not (folder / "runs").exists(), "a check writes nothing"
    assert report["read"] == report["written"] + report["quarantined"]
    assert report["reasons"] == dict(sorted(Counter(reasons.values()).items()))
    examples = [row for rows in report["examples"].values() for row in rows]
    assert {row["line"] for row in examples} <= set(reasons)
    code, out, err = finished(vico("data", "check", *where))
    lines = [f"bad line {row['line'] + 1}: {printable(row['message'])}\n" for row in examples]
    assert code == 0 and [line for line in lines if line not in out] == [], err[-2000:]

    code, out, err = finished(vico("data", "build", *where))
    assert code == 0, err[-2000:]
    assert "shard: done" in out and f"read {report['read']}" in out, "a summary"
    (output,) = (folder / "runs" / "shard").glob("*/output")
    rows = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert {row["line"]: row["reason"] for row in rows} == reasons
    assert all(row in rows for row in examples), "the same messages"
    manifest = json.loads((output / "manifest.json").read_text())
    for name in ("read", "written", "quarantined", "reasons", "splits"):
        built = {k: v for k, v in manifest[name].items() if v} if name == "splits" else manifest[name]
        assert built == report[name], "the check reports what the build does"
    last = rows[-1]
    for key in (sample_key("bad", last["line"]), f"bad-{last['line']}"):
        code, out, err = finished(vico("audit", "latest", "--sample", key, *where[1:]))
        assert code == 2 and f"quarantined: {last['reason']} (" in err, out + err


@pytest.mark.slow  # eight commands; test_repaired_rows.py reads repaired rows
def test_repaired_rows_are_built_beside_the_old_shards_and_a_pipeline_uses_them(project, tmp_path):
    folder, reasons = project
    where = (folder / "pipeline.yaml", "--site", folder / "site.yaml")
    line = next(line for line, reason in reasons.items() if reason == "empty_answer")
    rows = [{"source": "bad", "line": line, "row": row("good.png", answer="an answer at last")}]
    path = write_lines(tmp_path / "repaired.jsonl", rows)
    repaired = ("--set", f"inputs.repaired=[{path}]")
    code, out, err = finished(
        vico("data", "retry", folder / "pipeline.yaml", path, "--site", folder / "site.yaml")
    )
    assert code == 0 and f'inputs.repaired: ["{path}"]' in out, err[-2000:]
    assert answer("plan", *where)[0]["action"] == "reuse"
    planned = answer("plan", *where, *repaired)[0]
    assert planned["action"] == "reuse"
    output = folder / "runs" / "shard" / planned["fingerprint"] / "output"
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["repaired"]["written"] == 1 and manifest["written"] == 3
    assert manifest["read"] == manifest["written"] + manifest["quarantined"]
    code, _, err = finished(
        vico("run", "--until", "shard", *where, *repaired, "--storage", tmp_path / "other")
    )
    assert code == 2 and "inputs.repaired" in err and "vico data retry" in err
    code, _, err = finished(vico("data", "retry", *where))
    assert code == 2 and "no repaired rows" in err


@pytest.mark.slow
@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_rows_of_a_tar_or_a_parquet_file_are_repaired(project, tmp_path, format):
    folder, _ = project
    good, bad = row("s1.jpg")["conversations"], [{"from": "human", "value": "<image>q"}] * 2
    data = picture(1, format="JPEG")
    if format == "webdataset":
        members = {}
        for n, turns in enumerate((bad, good, good)):
            members |= {
                f"s{n}.jpg": data,
                f"s{n}.json": json.dumps({"id": n, "conversations": turns}).encode(),
            }
        write_tar(tmp_path / "a.tar", members)
    else:
        pq.write_table(
            pa.table({"image": [data] * 3, "id": [1, 2, 3], "conversations": [bad, good, good]}),
            tmp_path / "a.parquet",
        )
    records = f"inputs.records={{format: {format}, path: {tmp_path}}}"
    where = ("--site", folder / "site.yaml", "--storage", tmp_path / "runs", "--set", records)

    def retried(name: str, **fields: object) -> tuple[int, str, str, Path]:
        path = write_lines(tmp_path / f"{name}.jsonl", [{"source": "a", "line": 0, "row": fields}])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as editors of Windows write it
        return *finished(vico("data", "retry", folder / "pipeline.yaml", path, *where)), path

    code, out, err, path = retried("bad", conversations=bad[:1])
    assert code == 1 and "use these shards" not in out, out
    assert f"{path}: 0 of 1 rows repaired" in out
    assert f"{path}: no row is repaired (a line 1: no_answer, " in err and "Traceback" not in err
    code, out, err, path = retried("good", conversations=good)
    assert code == 0, err[-2000:]
    assert f"{path}: 1 of 1 rows repaired" in out and f'inputs.repaired: ["{path}"]' in out
    repaired = ("--set", f"inputs.repaired=[{path}]")
    planned = answer("plan", folder / "pipeline.yaml", *where, *repaired)[0]
    assert planned["action"] == "reuse"
    output = tmp_path / "runs" / "shard" / planned["fingerprint"] / "output"
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["read"], manifest["written"], manifest["pictures"]) == (3, 3, 3)


def test_a_server_that_fails_ends_the_command_with_one_line_and_exit_code_1(project):
    folder, _ = project
    with s3_server() as proxy:
        upload(proxy, "records", {"a.json": b"[]"})
        proxy.fault = lambda number: "503"
        env = environment(proxy, patience_s=1)
        records = ("--set", "inputs.records={format: llava, path: s3://records/a.json}")
        for command in (("data", "check"), ("run", "--until", "shard")):
            arguments = (folder / "pipeline.yaml", "--site", folder / "site.yaml", *records)
            code, _, err = finished(vico(*command, *arguments, extra_environment=env))
            assert code == 1 and "s3://records/a.json could not be read in" in err
            assert "Traceback" not in err and len(err.splitlines()) == 1


def test_init_writes_a_meta_file_and_a_pipeline_that_can_be_planned(tmp_path, project):
    write_good_records(tmp_path / "data").unlink()
    model = project[0] / "model"
    arguments = ("init", tmp_path / "mine.yaml", "--data", tmp_path / "data", "--model", model)
    code, out, err = finished(vico(*arguments))
    assert code == 0 and "format internvl" in out and "24 good" in out, err
    (meta_set,) = json.loads((tmp_path / "data" / "meta.json").read_text()).values()
    assert (meta_set["root"], meta_set["annotation"], meta_set["length"]) == ("images", "good.jsonl", 24)
    planned = answer("plan", tmp_path / "mine.yaml", "--storage", tmp_path / "runs")
    assert planned[0]["stage"] == "shard" and planned[0]["action"] == "run"
    assert finished(vico(*arguments))[0] == 0, "what is there is what would be written"
    with open(tmp_path / "mine.yaml", "a") as file:
        file.write("# my own words\n")
    code, _, err = finished(vico(*arguments))
    assert code == 2 and "mine.yaml exists and has other content" in err
    code, _, err = finished(vico("init", tmp_path / "new.yaml", "--data", tmp_path / "data" / "images"))
    assert code == 2 and "has no *.jsonl file" in err
