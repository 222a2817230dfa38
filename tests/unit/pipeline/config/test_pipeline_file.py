"""The pipeline file, with config classes of this test instead of those of the stages."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
from pydantic import Field, model_validator

from cluster.site import Site
from pipeline.config.graph import Graph, StageSpec, pipeline_graph
from pipeline.config.joint_checks import check_together
from pipeline.config.pipeline_file import load_config
from pipeline.planning.request import RunRequest, open_pipeline
from stages.stage_config import StageConfig
from vico.errors import UserError

HEAD = "inputs: {records: {format: demo, num_samples: 4}, model: m}\n"


class Optimizer(StageConfig):
    learning_rate: float = Field(8e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Config(StageConfig):
    seed: int
    optimizer: Optimizer = Optimizer()
    packs_per_step: int = Field(8, ge=1)
    shuffle: bool = True
    unit: Literal["tile", "image"] = "tile"
    low: float = 0.1
    high: float = 0.9
    notes: str = ""
    folder: Path | None = None

    @model_validator(mode="after")
    def ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}; lower it")
        return self


class Plain(StageConfig):
    size: int = 1


@pytest.fixture
def graph(monkeypatch):
    modules = {"drawing": (Config, ("records", "repaired")), "plain": (Plain, ("drawing",))}
    for name, (config, inputs) in modules.items():
        module = ModuleType(f"config_test_{name}")
        module.CODE_VERSION, module.INPUTS, module.Config = 1, inputs, config
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Graph([StageSpec(name, f"config_test_{name}") for name in modules])


@pytest.fixture
def load(graph, tmp_path):
    def loaded_config(text="", *overrides, head=HEAD):
        path = tmp_path / "pipeline.yaml"
        path.write_text(head + text)
        return load_config(path, graph, overrides)

    return loaded_config


def refused(load, *arguments, **options):
    """Return the lines of the UserError."""
    with pytest.raises(UserError) as error:
        load(*arguments, **options)
    return str(error.value).splitlines()


def test_keys_that_are_left_out_have_their_defaults(load):
    config = load()
    assert config.seed == 0 and config.experiment == "vico"
    assert config.drawing.packs_per_step == 8 and config.plain.size == 1
    assert config.inputs.heldout is None


def test_stages_that_draw_take_the_pipelines_seed_unless_they_have_their_own(load):
    assert load("seed: 5").stage("drawing").seed == 5
    assert load("seed: 5\ndrawing: {seed: 6}").stage("drawing").seed == 6
    assert load("seed: 5").resolved()["drawing"]["seed"] == 5


def test_overrides_are_read_as_yaml(load):
    config = load(
        "drawing: {unit: image}",
        "drawing.optimizer.learning_rate=1e-5",
        "drawing.shuffle=false",
        "plain.size=3",
        "drawing.optimizer.betas=[0.5, 1e-1]",
        "seed=4",
        "inputs.heldout={format: demo, num_samples: 3}",
    )
    assert config.drawing.optimizer == Optimizer(learning_rate=1e-5, betas=(0.5, 0.1))
    assert (config.drawing.shuffle, config.drawing.unit) == (False, "image")
    assert (config.plain.size, config.seed, config.inputs.heldout.num_samples) == (3, 4, 3)


@pytest.mark.parametrize("form", ["{}", "{{format: sources, sources: {}}}"])
def test_records_may_be_a_list_of_sources(load, form):
    records = form.format("[{format: demo, num_samples: 3, weight: 2}, {format: llava, path: a.json}]")
    first, second = load("", f"inputs.heldout={records}").inputs.heldout.sources
    assert (first.num_samples, first.weight, second.format) == (3, 2.0, "llava")


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "drawing: {pack_per_step: 4}",
            "unknown key drawing.pack_per_step; did you mean drawing.packs_per_step?",
        ),
        (
            "drawing: {optimizer: {lr: 1}}",
            "unknown key drawing.optimizer.lr; known there: learning_rate, betas",
        ),
        ("learning_rate: 1", "unknown key learning_rate; did you mean drawing.optimizer.learning_rate?"),
        ("drawings: {}", "unknown key drawings; did you mean drawing?"),
        ("plain: {shuffle: true}", "unknown key plain.shuffle; did you mean drawing.shuffle?"),
        (
            "storage: /data",
            "unknown key storage; it is a key of the site file: set it there, and name the file with --site",
        ),
        (
            "tiles: 4",
            "unknown key tiles; known there: seed, experiment, quality_gate, inputs, drawing, plain",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(load, text, line):
    assert refused(load, text) == [line]


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "drawing: {optimizer: {learning_rate: fast}}",
            "drawing.optimizer.learning_rate='fast' is not a number; give one such as 8e-05 (the default)",
        ),
        ("plain: {size: 1.5}", "plain.size=1.5 is not a whole number; give one such as 1 (the default)"),
        ("plain: {size: true}", "plain.size=true is not a whole number; give one such as 1 (the default)"),
        ("plain: {size: '3'}", "plain.size='3' is not a whole number; give one such as 1 (the default)"),
        (
            "drawing: {shuffle: 1}",
            "drawing.shuffle=1 is not true or false; give one such as true (the default)",
        ),
        (
            "drawing: {optimizer: 3}",
            "drawing.optimizer=3 is not a block of keys; fix the value or leave it out",
        ),
        ("drawing: {packs_per_step: 0}", "drawing.packs_per_step=0 must be at least 1"),
        (
            "drawing: {optimizer: {learning_rate: -1}}",
            "drawing.optimizer.learning_rate=-1 must be greater than 0",
        ),
        (
            "drawing: {unit: tiles}",
            "drawing.unit='tiles' is not one of 'tile' or 'image'; did you mean 'tile'?",
        ),
        ("drawing: {low: 2}", "drawing: low=2.0 is not below high=0.9; lower it"),
        (
            "drawing: {low: .nan}",
            "drawing.low=NaN is not a finite number; give one such as 0.1 (the default)",
        ),
        ("drawing: {notes: 5}", "drawing.notes=5 is not text; give one such as '' (the default)"),
        (
            "drawing: {optimizer: {betas: 1}}",
            "drawing.optimizer.betas=1 is not a list; give one such as [0.9, 0.95] (the default)",
        ),
        ("seed: -1", "seed=-1 must be at least 0"),
        ("seed: x", "seed='x' is not a whole number; give one such as 0 (the default)"),
        ("seed: 1.5", "seed=1.5 is not a whole number; give one such as 0 (the default)"),
        ("seed: true", "seed=true is not a whole number; give one such as 0 (the default)"),
        ("seed: null", "seed=null is not a whole number; give one such as 0 (the default)"),
    ],
)
def test_a_wrong_value_is_one_line_with_field_value_and_remedy(load, text, line):
    assert refused(load, text) == [line]


def test_all_faults_are_reported_together(load):
    lines = refused(load, "drawing: {low: a, high: b}\nplain: {sizes: 1}")
    assert [line.partition("=")[0] for line in lines] == [
        "drawing.low",
        "drawing.high",
        "unknown key plain.sizes; did you mean plain.size?",
    ]


def test_a_missing_key_is_named(load):
    assert refused(load, head="") == ["inputs is missing; give it a value"]
    assert refused(load, head="inputs: {records: {format: demo}}\n") == [
        "inputs.model is missing; give it a value"
    ]


@pytest.mark.parametrize(
    "override, message",
    [
        ("drawing.low", "has no key and value"),
        ("=3", "has no key and value"),
        ("drawing..low=3", "has no key and value"),
        ("seed.low=3", "seed=4 is not a block of keys"),
        ("drawing.low=[", "line 1"),
        ("drawing.lows=1", "did you mean drawing.low?"),
        ("train.memory.zero_stage=3", "unknown key train; it is a key of the site file"),
    ],
)
def test_a_wrong_override_is_refused(load, override, message):
    (line,) = refused(load, "seed: 4", override)
    assert message in line


def test_paths_are_relative_to_the_working_directory(load, monkeypatch, tmp_path):
    (tmp_path / "work" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    head = "inputs: {records: {format: internvl, path: ../meta.json}, model: models/tiny}\n"
    inputs = load(head=head).inputs
    assert inputs.records.path == str(tmp_path / "meta.json")
    assert inputs.model == tmp_path / "work" / "models" / "tiny"


def test_more_ranks_than_packs_per_step_are_refused(load):
    site = Site.model_validate({"resources": {"workers": 2}})
    check_together(load(), site)
    with pytest.raises(UserError, match=r"workers=2 .* is more than drawing.packs_per_step=1: every"):
        check_together(load("drawing: {packs_per_step: 1}"), site)


def test_too_many_ranks_are_one_message_with_both_numbers_that_work(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(HEAD)
    site = Site.model_validate({"resources": {"workers": 16}, "ray": {"address": "auto"}})
    config = load_config(path, pipeline_graph(), ["consistency.packs_per_step=8", "router.packs_per_step=4"])
    with pytest.raises(UserError) as raised:
        check_together(config, site)
    (line,) = str(raised.value).splitlines()
    assert (
        "resources.workers=16 (site local) is more than consistency.packs_per_step=8 and router.pac" in line
    )
    assert "set resources.workers to 4 or less" in line
    assert "consistency.packs_per_step and router.packs_per_step to 16 or more" in line


def test_faults_of_all_kinds_in_a_file_are_reported_together(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        f"""
inputs:
  records: {{format: internvl, path: {tmp_path}/gone.json}}
  model: {tmp_path}/no-model
shard: {{max_tile: 6, test_share: 0}}
consistency: {{packs_per_step: 1, epochs: many}}
ratio: {{splits: [train, test]}}
"""
    )
    site = Site.model_validate({"storage": str(tmp_path / "runs"), "resources": {"workers": 2}})
    with pytest.raises(UserError) as raised:
        open_pipeline(RunRequest(path, site), pipeline_graph())
    lines = str(raised.value).splitlines()
    for words in (
        "unknown key shard.max_tile; did you mean shard.max_tiles?",
        "consistency.epochs='many' is not a number",
        "resources.workers=2 (site local) is more than consistency.packs_per_step=1",
        "shard.test_share=0",
        "ratio.splits=train,test",
        "gone.json",
        "no-model is not a folder",
    ):
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert len(lines) == 7


@pytest.mark.parametrize("stage", ["consistency", "router"])
def test_both_trainings_have_a_number_of_packs_per_step_to_compare_with(stage, tmp_path):
    graph = pipeline_graph()
    path = tmp_path / "pipeline.yaml"
    path.write_text(HEAD)
    site = Site.model_validate({"resources": {"workers": 2}})
    check_together(load_config(path, graph), site)
    with pytest.raises(UserError, match=rf"workers=2 .* is more than {stage}.packs_per_step=1: every"):
        check_together(load_config(path, graph, [f"{stage}.packs_per_step=1"]), site)


@pytest.mark.parametrize(
    "overrides, is_covered",
    [
        ((), True),
        (("ratio.max_samples=50",), False),
        (("ratio.max_samples=50", "evaluate.max_samples=50"), True),
        (("ratio.max_samples=50", "evaluate.max_samples=51"), False),
        (("ratio.max_samples=50", "evaluate.max_samples=50", "evaluate.seed=9"), False),
        (("evaluate.max_samples=50", "evaluate.seed=9"), False),
        (("ratio.max_samples=0", "evaluate.max_samples=50", "evaluate.seed=9"), True),
        (("ratio.splits=[train, calib]",), False),
        (("ratio.max_test_samples=50", "evaluate.max_samples=50"), True),
        (("ratio.max_test_samples=50", "evaluate.max_samples=51"), False),
        (("ratio.max_test_samples=50", "evaluate.max_samples=50", "evaluate.seed=9"), False),
        (("ratio.max_samples=50", "ratio.max_test_samples=0"), True),
    ],
)
def test_the_oracle_needs_the_ratios_of_the_samples_that_evaluate_takes(overrides, is_covered, tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(HEAD)
    config = load_config(path, pipeline_graph(), overrides)
    if is_covered:
        check_together(config, Site())
        return
    with pytest.raises(UserError, match=r"oracle.*ratio.max_(test_)?samples=\d+ \(drawn by ratio.seed=0"):
        check_together(config, Site())


def test_the_resolved_config_gives_the_same_config_again(load, graph, tmp_path):
    config = load("seed: 3\ndrawing: {low: 1e-3}")
    path = tmp_path / "again.yaml"
    path.write_text(json.dumps(config.resolved()))
    again = load_config(path, graph)
    assert again.stage("drawing") == config.stage("drawing")
    assert again.resolved() == config.resolved()


def test_repaired_rows_of_an_adopted_stage_are_refused(load):
    head = HEAD.replace("model: m", "model: m, repaired: [/r.jsonl], adopt: {%s: /made}")
    assert refused(load, head=head % "drawing") == [
        "inputs.repaired=/r.jsonl has no effect while inputs.adopt.drawing=/made takes its result from "
        "elsewhere; leave out inputs.repaired or inputs.adopt.drawing"
    ]
    assert load(head=head % "plain").inputs.repaired == (Path("/r.jsonl"),)


def test_a_text_of_the_file_makes_no_line_of_its_own_in_the_message(load):
    with pytest.raises(UserError) as refused:
        load('"a\\nerror: forged\\e[2J": 1')
    assert "unknown key a\\nerror: forged\\x1b[2J" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "head, field",
    [
        ('{records: {format: demo}, model: "a\\nb"}', "model=a\\nb"),
        ('{records: {format: llava, path: "a\\nb"}, model: m}', "records.path=a\\nb"),
        ('{records: [{format: llava, path: a, root: "\\0"}], model: m}', "records.root=\\x00"),
        ('{records: {format: demo}, model: m, adopt: {plain: "\\e"}}', "adopt.plain=\\x1b"),
        ('{records: {format: demo}, model: m, repaired: ["\\r"]}', "repaired=\\r"),
    ],
)
def test_a_path_with_a_line_break_is_refused_in_one_line(load, head, field):
    [line] = refused(load, head=f"inputs: {head}\n")
    assert line.startswith(f"inputs.{field} has a line break or a control character; give a path")


def test_an_experiment_is_a_name_without_control_characters(load):
    with pytest.raises(UserError, match=r"experiment='a\\\\x1b\[2J' has control characters; leave them out"):
        load('experiment: "a\\e[2J"')
    assert load('experiment: "[/x]"').experiment == "[/x]"
