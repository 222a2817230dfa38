"""`vico init`: the format it recognises, the rows it calls good, and the pipeline file it writes."""

import base64
import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config.graph import pipeline_graph
from pipeline.config.pipeline_file import load_config
from stages.shard.check import CheckTask, check_part
from stages.shard.tasks import shard_settings
from tests.record_files import picture, row, write_hostile_records, write_lines
from tests.tiny_model import make_tiny_model
from vico.errors import UserError
from vico.settings import load_settings

ROOT = Path(__file__).parents[4]
SHAREGPT = {
    "messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "It."}],
    "images": ["a.png"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(picture(1))
    return tmp_path / "data"


def init(data, model, out="pipeline.yaml"):
    arguments = ["init", str(data.parent / out), "--data", str(data), "--model", str(model)]
    return CliRunner().invoke(app, arguments)


def checked(config_path):
    """Return (number of rows, number of good ones) as the shard stage would find them with the file."""
    from data_prep.records.blocks import record_blocks
    from data_prep.records.sets import record_sets

    config = load_config(config_path, pipeline_graph())
    blocks = record_blocks(record_sets(config.inputs.records), 1000)
    contents = [
        check_part(
            CheckTask(
                block,
                shard_settings(config.stage("shard"), block.record_set, heldout=False),
                config.inputs.model,
            )
        )
        for block in blocks
    ]
    return sum(block.num_lines for block in blocks), sum(len(content.table) for content in contents)


def test_sharegpt_rows_are_recognised_and_read(data, model):
    write_lines(data / "rows.jsonl", [SHAREGPT, {**SHAREGPT, "images": ["b.png"]}])
    result = init(data, model)
    assert result.exit_code == 0, result.exception
    assert "rows.jsonl: format sharegpt" in result.stdout and "1 good, 1 missing_image" in result.stdout
    assert "line 2, missing_image: b.png is not in its root" in result.stdout
    assert not (data / "meta.json").exists()
    assert checked(data.parent / "pipeline.yaml") == (2, 1)


def test_pictures_that_the_rows_hold_themselves_are_read(data, model):
    encoded = base64.b64encode(picture(1)).decode()
    rows = [row(name, answer=name[:4]) for name in (f"data:image/png;base64,{encoded}", encoded)]
    write_lines(data / "rows.jsonl", rows)
    result = init(data, model)
    assert result.exit_code == 0 and "2 good" in result.stdout, result.exception
    assert checked(data.parent / "pipeline.yaml") == (2, 2)


@pytest.mark.parametrize(
    "option, name, shown",
    [
        ("FILE", "a\nb.yaml", "a\\nb.yaml"),
        ("FILE", "a\x1b[2J.yaml", "a\\x1b[2J.yaml"),
        ("FILE", "a\udcff.yaml", "a\\udcff.yaml"),
        ("--data", "d\nb", "d\\nb"),
        ("--data", "d\udcff", "d\\udcff"),
        ("--model", "m\nb", "m\\nb"),
    ],
)
def test_a_name_that_a_pipeline_file_cannot_hold_is_refused_in_one_line(tmp_path, option, name, shown):
    path = str(tmp_path / name)
    arguments = [path] if option == "FILE" else [str(tmp_path / "p.yaml"), option, path]
    refused = CliRunner().invoke(app, ["init", *arguments]).exception
    assert isinstance(refused, UserError) and str(refused).startswith(f"{option} {tmp_path}/{shown} has")
    assert "\n" not in str(refused) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", ["lines", "list"])
def test_llava_rows_are_recognised_and_read(data, model, write):
    rows = [row("a.png"), row()]
    if write == "lines":
        write_lines(data / "rows.jsonl", rows)
    else:
        (data / "rows.json").write_text(json.dumps(rows, indent=1))
        (data / "info.json").write_text("{}")
    result = init(data, model)
    assert f"format {'internvl' if write == 'lines' else 'llava'}" in result.stdout, result.exception
    assert "2 good" in result.stdout
    assert checked(data.parent / "pipeline.yaml") == (2, 2)


def test_every_text_file_of_rows_is_read_and_no_other(data, model):
    """JSON lists beside lines (also lines in `.json`), and a `.json` file that has no rows."""
    write_lines(data / "a.jsonl", [row("a.png")])
    write_lines(data / "b.ndjson", [row("a.png", answer="another")])
    write_lines(data / "c.json", [row(answer="1"), row(answer="2")])
    (data / "d.json").write_text(json.dumps([row(answer="3")], indent=1))
    (data / "info.json").write_text(json.dumps({"name": "a data set"}))
    result = init(data, model)
    assert result.exit_code == 0, result.exception
    about_model, *lines = result.stdout.splitlines()
    assert about_model.endswith("can be trained")
    assert [line.split(":")[0] for line in lines[:4]] == [
        "a.jsonl",
        "b.ndjson",
        "c.json",
        "d.json",
    ]
    assert checked(data.parent / "pipeline.yaml") == (5, 5)


def test_a_list_that_holds_no_rows_is_left_to_the_user(data, model):
    """Also for the choice of the format: the rows need `internvl`, which reads no `.json` file."""
    write_lines(data / "rows.JSONL", [row("a.png")])
    (data / "rows.JSONL").rename(data / "rows.jsonl")
    (data / "classes.json").write_text(json.dumps(["cat", "dog"]))
    (data / "._rows.jsonl").write_bytes(b"\0" * 100)  # of macOS
    result = init(data, model)
    assert result.exit_code == 0, result.exception
    assert "format internvl" in result.stdout and "classes.json" in result.stdout
    assert checked(data.parent / "pipeline.yaml") == (1, 1)


def test_upper_case_endings_are_found_and_links_to_nothing_are_named(data, model):
    (data / "ROWS.JSONL").write_text(json.dumps(row("a.png")) + "\n")
    assert init(data, model).exit_code == 0
    assert checked(data.parent / "pipeline.yaml") == (1, 1)
    (data / "more.jsonl").symlink_to("not-fetched")
    assert "more.jsonl" in str(init(data, model, "b.yaml").exception)


def test_files_whose_names_give_the_same_keys_are_refused(data, model):
    for name in ("图表", "文档"):
        write_lines(data / f"{name}.jsonl", [row("a.png", answer=name)])
    assert "give the same keys" in str(init(data, model).exception)


def test_a_second_run_uses_the_meta_file_of_the_first(data, model):
    write_lines(data / "a.jsonl", [row("a.png")])
    assert init(data, model).exit_code == 0
    written = (data / "meta.json").read_text()
    result = init(data, model, "second.yaml")
    assert result.exit_code == 0, result.exception
    assert "meta.json is already there" in result.stdout
    assert (data / "meta.json").read_text() == written
    assert checked(data.parent / "second.yaml") == (1, 1)
    write_lines(data / "b.jsonl", [row("a.png", answer="a third")])
    result = init(data, model, "third.yaml")
    assert "exists and has other content; move it away" in str(result.exception)


def test_the_same_command_again_changes_nothing(data, model):
    write_lines(data / "a.jsonl", [row("a.png")])
    for out in ("pipeline.yaml", "data/pipeline.yaml"):  # also with its own output among the rows
        assert init(data, model, out).exit_code == 0
        before = {path: path.read_bytes() for path in data.parent.rglob("*") if path.is_file()}
        again = init(data, model, out)
        assert again.exit_code == 0 and again.stdout.count("is already there, with the same content") == 2
        assert {path: path.read_bytes() for path in data.parent.rglob("*") if path.is_file()} == before
    (data.parent / "pipeline.yaml").write_text("seed: 1\n")
    write_lines(data / "a.jsonl", [SHAREGPT])
    assert "pipeline.yaml exists and has other content" in str(init(data, model).exception)
    assert (data.parent / "pipeline.yaml").read_text() == "seed: 1\n"


def in_folder(folder, monkeypatch, *arguments):
    monkeypatch.chdir(folder)
    return CliRunner().invoke(app, ["init", *arguments])


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_empty_folder_gets_the_demo_model(tmp_path, monkeypatch):
    assert in_folder(tmp_path, monkeypatch).exit_code == 0
    folder = load_config(tmp_path / "pipeline.yaml", pipeline_graph()).inputs.model_folder
    assert folder == tmp_path / "models" / "small-internvl"
    assert files_below(folder) == files_below(ROOT / "models" / "small-internvl")
    again = in_folder(tmp_path, monkeypatch, "second.yaml")
    assert again.stdout == "wrote second.yaml\nnext: vico data check second.yaml\n"


def test_rows_in_an_empty_folder_are_checked_for_the_demo_model(data, monkeypatch):
    write_lines(data / "a.jsonl", [row("a.png")])
    result = in_folder(data.parent, monkeypatch, "--data", "data")
    assert result.exit_code == 0 and "1 good" in result.stdout, result.exception
    assert checked(data.parent / "pipeline.yaml") == (1, 1)


def test_the_files_of_the_quickstart_are_those_of_the_checkout(tmp_path, monkeypatch):
    assert "next: vico run configs/quickstart.yaml" in in_folder(tmp_path, monkeypatch, "--quickstart").stdout
    written = files_below(tmp_path)
    assert {"configs/quickstart.yaml", "sites/slurm.yaml", "constraints.txt"} <= written
    for name in written:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    load_config(tmp_path / "configs" / "quickstart.yaml", pipeline_graph())
    assert in_folder(tmp_path, monkeypatch, "--quickstart").exit_code == 0
    (tmp_path / "sites" / "local.yaml").write_text("name: mine\n")
    (tmp_path / "constraints.txt").unlink()
    error = in_folder(tmp_path, monkeypatch, "--quickstart").exception
    assert "sites/local.yaml exists and has other content" in str(error)
    assert not (tmp_path / "constraints.txt").exists(), "all or nothing"
    assert "leave out FILE" in str(in_folder(tmp_path, monkeypatch, "a.yaml", "--quickstart").exception)


def test_a_picture_without_a_mark_is_read_as_internvl_reads_it(data, model):
    write_lines(data / "rows.jsonl", [{**row(), "image": "a.png"}])
    result = init(data, model)
    assert "format internvl" in result.stdout and "1 good" in result.stdout, result.exception
    assert checked(data.parent / "pipeline.yaml") == (1, 1)


def test_parquet_files_and_tars_are_recognised_and_read(data, model):
    image, conversations = {"bytes": picture(1), "path": None}, row("x")["conversations"]
    pq.write_table(pa.table({"image": [image], "conversations": [conversations]}), data / "rows.parquet")
    result = init(data, model)
    assert "rows.parquet: format parquet" in result.stdout and "1 good" in result.stdout, result.exception
    assert checked(data.parent / "pipeline.yaml") == (1, 1)
    for name in ("a.tar", "b.tar"):
        with tarfile.open(data / name, "w") as tar:
            for member, content in (("k.json", json.dumps(row("k.png")).encode()), ("k.png", picture(2))):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert "a.tar: not used" in init(data, model, "second.yaml").stdout
    (data / "rows.parquet").unlink()
    assert "b.tar: format webdataset" in init(data, model, "third.yaml").stdout
    assert checked(data.parent / "third.yaml") == (2, 2)


def test_the_root_is_the_folder_that_has_the_pictures(data, model):
    for folder in ("empty", "images", "other images"):
        (data / folder).mkdir()
    (data / "a.png").rename(data / "other images" / "a.png")
    write_lines(data / "rows.jsonl", [SHAREGPT])
    assert init(data, model).exit_code == 0
    assert checked(data.parent / "pipeline.yaml") == (1, 1)
    write_lines(data / "rows.jsonl", [row("a.png"), row()])
    assert init(data, model, "second.yaml").exit_code == 0
    assert json.loads((data / "meta.json").read_text())["rows"]["root"] == "other images"
    assert checked(data.parent / "second.yaml") == (2, 2)


def test_the_first_rows_are_checked_as_by_the_shard_stage(tmp_path, model):
    meta, reasons = write_hostile_records(tmp_path / "bad")
    meta.unlink()
    result = init(tmp_path / "bad", model)
    assert result.exit_code == 0, result.exception
    assert "bad.jsonl: format internvl" in result.stdout
    limits = {"picture_format", "too_many_pixels", "over_budget"}  # limits that the tests of the stage lower
    for reason in set(reasons.values()) - limits:
        assert f"{reason}: " in result.stdout
    num_rows, num_good = checked(tmp_path / "pipeline.yaml")
    assert f" {num_good} good" in result.stdout and num_rows == len(reasons) + 2


@pytest.mark.parametrize(
    "name",
    [
        "data:image/png;base64," + base64.b64encode(b"no picture" * 4000).decode(),
        "/9j/" + "4AAQSkZJRg" * 1000,
        "x" * 300,
        "a\0b",
        "absent.png",
    ],
)
def test_a_folder_without_a_good_row_is_refused_in_one_line(data, model, name):
    write_lines(data / "rows.jsonl", [row(name)])
    error = init(data, model).exception
    assert isinstance(error, UserError) and "has no good row" in str(error)
    assert len(str(error)) < 700 and "\n" not in str(error)
    assert not (data.parent / "pipeline.yaml").exists() and not (data / "meta.json").exists()


def test_names_with_special_characters_are_quoted(tmp_path, model):
    data = tmp_path / "my: data, [#1] {x}"
    data.mkdir()
    (data / "a.png").write_bytes(picture(1))
    write_lines(data / "rows[1].jsonl", [SHAREGPT])
    assert init(data, model, "123.yaml").exit_code == 0
    assert load_config(tmp_path / "123.yaml", pipeline_graph()).experiment == "123"
    assert checked(tmp_path / "123.yaml") == (1, 1)
    write_lines(data / "rows[1].jsonl", [row("a.png")])
    assert init(data, model, "on.yaml").exit_code == 0
    assert checked(tmp_path / "on.yaml") == (1, 1)


def test_the_file_asks_for_no_more_tiles_than_the_model_cuts(data, model, tmp_path):
    small = shutil.copytree(model, tmp_path / "small")
    processor = json.loads((small / "preprocessor_config.json").read_text())
    (small / "preprocessor_config.json").write_text(json.dumps({**processor, "max_patches": 4}))
    write_lines(data / "rows.jsonl", [row("a.png")])
    for arguments in ([], ["--data", str(data)]):
        out = tmp_path / f"{len(arguments)}.yaml"
        CliRunner().invoke(app, ["init", str(out), "--model", str(small), *arguments])
        config = load_config(out, pipeline_graph())
        assert config.stage("shard").max_tiles == load_settings(small).max_tiles == 4


def test_what_cannot_be_read_or_written_is_refused_in_one_line(data, model, tmp_path):
    def refusal(*arguments):
        error = CliRunner().invoke(app, ["init", *map(str, arguments)]).exception
        assert isinstance(error, UserError) and "\n" not in str(error), error
        return str(error)

    where = ("--data", data, "--model", model)
    assert "has no *.jsonl file" in refusal(tmp_path / "a.yaml", *where)
    (data / "rows.jsonl").touch()
    assert "has no row" in refusal(tmp_path / "a.yaml", *where)
    write_lines(data / "rows.jsonl", [row("a.png")])
    assert "is not a folder" in refusal(tmp_path / "a.yaml", "--data", data, "--model", tmp_path / "nowhere")
    assert "is not a folder" in refusal(tmp_path / "a.yaml", "--data", tmp_path / "nowhere", "--model", model)
    assert "exists" in refusal(tmp_path, *where)
    assert "is not writable" in refusal(data / "a.png" / "a.yaml")
    (data / "meta.json").write_text("{}")
    assert "meta.json exists" in refusal(tmp_path / "a.yaml", *where)
    assert not (tmp_path / "a.yaml").exists()


@pytest.mark.parametrize("name", ["08.yaml", "1e5.yaml", "12.yaml", "yes.yaml", "2026-01-01.yaml"])
def test_a_file_whose_name_looks_like_a_number_is_read_again(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    written = CliRunner().invoke(app, ["init", name])
    assert written.exit_code == 0, written.output
    assert load_config(Path(name), pipeline_graph()).experiment == Path(name).stem
