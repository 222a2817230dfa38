"""What the shards must hold for the stages of a run, and that the remedies in the messages help."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records.blocks import record_blocks
from data_prep.records.sets import record_sets
from data_prep.shards.folder import manifest, write_index
from data_prep.shards.names import INDEX_FILE, MANIFEST_FILE
from data_prep.shards.picture_sides import picture_sides
from data_prep.shards.write import write_shard
from pipeline.config.graph import pipeline_graph
from pipeline.config.pipeline_file import PipelineConfig, load_config
from pipeline.planning.shard_contents import check_shards, split_counts
from stages.shard.tasks import heldout_names, shard_settings
from tests.record_files import picture, row, write_lines, write_meta
from tests.tiny_model import make_tiny_model
from vico.errors import UserError
from vico.prompt import PromptFormat, load_prompt_format

STAGES = pipeline_graph().names


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def prompt_format(model) -> PromptFormat:
    return load_prompt_format(model)


@pytest.fixture
def sharded(tmp_path, model, prompt_format):
    """Return a function: (rows, overrides) -> config, and the folder with the index of these rows."""
    for n in range(12):
        (tmp_path / "records" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "records" / "images" / f"{n}.png").write_bytes(picture(n))

    def shards_of(rows, *overrides, heldout=None) -> tuple[PipelineConfig, Path]:
        metas = {"records": write_meta(tmp_path / "records", mine={})}
        write_lines(tmp_path / "records" / "mine.jsonl", rows)
        if heldout is not None:
            root = {"root": str(tmp_path / "records" / "images")}
            metas["heldout"] = write_meta(tmp_path / "held", out=root)
            write_lines(tmp_path / "held" / "out.jsonl", heldout)
        inputs = ", ".join(f"{name}: {{format: internvl, path: {path}}}" for name, path in metas.items())
        (tmp_path / "pipeline.yaml").write_text(f"inputs: {{{inputs}, model: {model}}}\n")
        config = load_config(tmp_path / "pipeline.yaml", pipeline_graph(), overrides)
        write_shards_of(config, tmp_path / "shards", prompt_format)
        return config, tmp_path / "shards"

    return shards_of


def write_shards_of(config: PipelineConfig, folder: Path, prompt_format: PromptFormat) -> None:
    """Write index and manifest as the shard stage does, without tars."""
    folder.mkdir(exist_ok=True)
    sets = record_sets(config.inputs.records)
    if config.inputs.heldout is not None:
        sets += record_sets(config.inputs.heldout, heldout=True)
    names = heldout_names(sets)
    contents = [
        write_shard(None, block, shard_settings(config.shard, block.record_set, bool(names)), prompt_format)
        for block in record_blocks(sets, 1000)
    ]
    sides = picture_sides(lambda: [content.table for content in contents], names)
    contents = [replace(content, table=sides.settled(content.table)) for content in contents]
    write_index(folder / INDEX_FILE, [content.table for content in contents])
    (folder / MANIFEST_FILE).write_text(
        json.dumps(manifest(contents, {record_set.name: {} for record_set in sets}))
    )


def pictures(count: int, **fields) -> list[dict]:
    return [row(f"{n}.png", answer=f"answer {n}", **fields) for n in range(count)]


def refusal(config: PipelineConfig, folder: Path, stages=STAGES) -> str:
    with pytest.raises(UserError) as error:
        check_shards(config, stages, folder)
    (line,) = str(error.value).splitlines()
    return line


def test_rows_without_pictures_are_refused_before_any_training(sharded):
    config, folder = sharded([row(answer=str(n)) for n in range(50)])
    line = refusal(config, folder)
    assert line.startswith("not started, because consistency needs train samples with a picture")
    assert "no row has a picture: give inputs.records with pictures" in line
    check_shards(config, ["shard"], folder)


def test_rows_that_are_all_in_quarantine_are_named(sharded):
    config, folder = sharded([row("absent.png", answer=str(n)) for n in range(5)])
    assert (
        f"repair the rows, or give other inputs.records (5 rows are in {folder}/quarantine.jsonl"
        in refusal(config, folder)
    )


@pytest.mark.parametrize("count", [3, 5, 8])
def test_the_seed_that_is_named_puts_samples_into_each_split(sharded, count):
    seed = next(
        seed
        for seed in range(20)
        if min(
            c.usable for c in split_counts(sharded(pictures(count), f"shard.split_seed={seed}")[1]).values()
        )
        == 0
    )
    line = refusal(*sharded(pictures(count), f"shard.split_seed={seed}"))
    (named,) = re.findall(r"set shard\.split_seed: (\d+)", line)
    config, folder = sharded(pictures(count), f"shard.split_seed={named}")
    check_shards(config, STAGES, folder)


def test_a_split_that_only_text_rows_reach_is_refused(sharded):
    """The router would find no tile to calibrate on, after the training of the policy."""
    rows = pictures(12) + [row(answer=f"text {n}") for n in range(200)]
    overrides = ("shard.calib_share=0.03", "shard.test_share=0.4")
    config, folder = sharded(rows, *overrides)
    counts = split_counts(folder)
    assert counts["calib"].samples and not counts["calib"].usable and counts["test"].usable
    line = refusal(config, folder)
    assert "because router needs calib samples with a picture and an answer to calibrate" in line
    assert "raise shard.calib_share" in line
    check_shards(config, ["shard", "consistency", "ratio", "label"], folder)


@pytest.mark.parametrize(
    "rows",
    [
        pictures(12, group="one"),
        [row(["0.png", f"{n}.png"], answer=str(n)) for n in range(1, 12)],
        pictures(2),
    ],
)
def test_rows_that_cannot_be_on_three_sides_get_no_seed(sharded, rows):
    line = refusal(*sharded(rows))
    assert "too few, or share too many pictures and groups, for 3 splits: give more records" in line


def test_held_out_rows_without_pictures_are_refused(sharded):
    config, folder = sharded(
        pictures(12), "shard.calib_share=0.4", heldout=[row(answer=f"held {n}") for n in range(3)]
    )
    line = refusal(config, folder)
    assert "because evaluate needs test samples" in line
    assert "give inputs.heldout rows with pictures and answers" in line
    check_shards(config, STAGES[:-2], folder)


def test_a_choice_of_test_samples_without_pictures_is_refused(sharded):
    held = [*pictures(1), *(row(answer=f"held {n}") for n in range(30))]
    overrides = ("shard.calib_share=0.4", "evaluate.max_samples=2")
    rows = [row(f"{n}.png", answer=f"answer {n}") for n in range(1, 12)]
    config, folder = sharded(rows, *overrides, heldout=held)
    assert "evaluate.max_samples=2 draws only test samples without pictures" in refusal(config, folder)
    config, folder = sharded(rows, *overrides[:1], heldout=held)
    check_shards(config, STAGES, folder)


def test_select_best_needs_calibration_samples(sharded):
    rows = pictures(12) + [row(answer=f"text {n}") for n in range(200)]
    overrides = ("shard.calib_share=0.03", "shard.test_share=0.4", "consistency.select=best")
    config, folder = sharded(rows, *overrides)
    assert "because consistency needs calib samples" in refusal(config, folder, ["shard", "consistency"])


def test_stages_that_adopt_a_result_need_nothing(sharded, tmp_path):
    config, folder = sharded([row(answer=str(n)) for n in range(20)])
    adopt = dict.fromkeys(("consistency", "ratio", "router", "evaluate"), tmp_path)
    adopting = config.model_copy(update={"inputs": config.inputs.model_copy(update={"adopt": adopt})})
    check_shards(adopting, STAGES, folder)


@pytest.mark.parametrize(("stage", "file"), [("label", "labels.parquet"), ("ratio", "ratios.parquet")])
def test_adopted_labels_must_have_tiles_of_the_shards(sharded, tmp_path, stage, file):
    config, folder = sharded(pictures(12), "shard.calib_share=0.3", "shard.test_share=0.2")
    index = pq.read_table(folder / INDEX_FILE, columns=["key", "split"]).to_pylist()
    keys = {split: [row["key"] for row in index if row["split"] == split] for split in ("train", "calib")}
    adopt = {stage: tmp_path / "elsewhere"}
    config = config.model_copy(update={"inputs": config.inputs.model_copy(update={"adopt": adopt})})
    (tmp_path / "elsewhere").mkdir()

    def labelled(keys: list[str]) -> None:
        pq.write_table(pa.table({"key": pa.array(keys, pa.string())}), tmp_path / "elsewhere" / file)

    labelled(keys["train"] + keys["calib"])
    check_shards(config, STAGES, folder)
    for few, split in ((keys["train"], "calib"), (["other-000000"], "train")):
        labelled(few)
        line = refusal(config, folder)
        assert f"router needs labels of {split} tiles" in line
        assert f"inputs.adopt.{stage}={tmp_path / 'elsewhere'} has no tile of the {split} samples" in line
        check_shards(config, STAGES[:-3], folder)
