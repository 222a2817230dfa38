"""The block `joint`: which stages it adds, what they read, and which settings they have."""

import json

import pytest

from cluster.site import Site
from pipeline.config.graph import Graph, block_of, pipeline_graph, with_joint
from pipeline.config.joint_checks import check_together
from pipeline.config.pipeline_file import load_config
from pipeline.config.split_needs import check_split_needs
from pipeline.identity.fingerprints import stage_fingerprint, stage_identity
from vico.errors import UserError

HEAD = "inputs: {records: {format: demo, num_samples: 8, seed: 0}, model: /model}\nseed: 5\n"
STAGES = ["shard", "consistency", "ratio", "label", "router"]
JOINT = ["joint_rates", "joint_consistency", "joint_ratio", "joint_label", "joint_router"]


@pytest.fixture
def load(tmp_path):
    def loaded(text="", *overrides):
        path = tmp_path / "pipeline.yaml"
        path.write_text(HEAD + text)
        return load_config(path, pipeline_graph(), overrides)

    return loaded


def fingerprints(config) -> dict[str, str]:
    values = {name: name for name in ("records", "tokenizer", "model")}
    for spec in config.stages_of(pipeline_graph()).stages:
        inputs = {name: values[name] for name in spec.inputs if name in values}
        identity = stage_identity(spec.code_version, config.stage(spec.name), inputs)
        values[spec.name] = stage_fingerprint(spec.name, identity)
    return values


def test_joint_is_off_unless_the_file_has_it(load):
    for config in (load(), load("joint: null\n"), load("joint: {}\n", "joint=null")):
        assert config.stages_of(pipeline_graph()).names == [*STAGES, "evaluate", "export"]
        assert not config.has_joint


def test_the_joint_stages_come_after_the_router_and_the_later_stages_read_them(load):
    graph = load("joint: {}\n").stages_of(pipeline_graph())
    assert graph.names == [*STAGES, *JOINT, "evaluate", "export"]
    givers = {spec.name: spec.givers for spec in graph.stages}
    assert givers["joint_rates"]["router"] == "router"
    assert givers["joint_rates"]["consistency"] == "consistency"
    assert givers["joint_consistency"]["consistency"] == "consistency", "it starts from the first policy"
    assert givers["joint_consistency"]["model"] == "model", "its reference is the start model"
    for stage in ("joint_ratio", "joint_router", "evaluate", "export"):
        assert givers[stage]["consistency"] == "joint_consistency"
    assert givers["joint_label"]["ratio"] == "joint_ratio"
    assert givers["joint_router"]["label"] == givers["evaluate"]["label"] == "joint_label"
    assert givers["evaluate"]["router"] == givers["export"]["router"] == "joint_router"
    assert graph.dependents(["router"]) == {"router", *JOINT, "evaluate", "export"}


def test_the_first_stages_are_reused_when_joint_is_switched_on(load):
    without, with_it = fingerprints(load()), fingerprints(load("joint: {}\n"))
    assert {name: with_it[name] for name in STAGES} == {name: without[name] for name in STAGES}
    assert with_it["evaluate"] != without["evaluate"] and with_it["export"] != without["export"]
    assert len({with_it[name] for name in [*STAGES, *JOINT]}) == 10


def test_other_settings_of_the_first_router_change_the_joint_stages_too(load):
    before, after = fingerprints(load("joint: {}\n")), fingerprints(load("joint: {}\n", "router.epochs=2"))
    assert [name for name in before if before[name] != after[name]] == [
        "router",
        *JOINT,
        "evaluate",
        "export",
    ]


def test_the_joint_blocks_take_over_what_they_do_not_set(load):
    config = load(
        """
consistency: {epochs: 3, optimizer: {learning_rate: 2e-4, weight_decay: 0.1}, connector_start: random}
ratio: {max_samples: 7, seed: 9}
label: {percentile: 67}
router: {epochs: 4, optimizer: {learning_rate: 1e-3}}
joint:
  consistency: {random_share: 0.1, optimizer: {weight_decay: 0.2}}
  label: {floor: 0.5}
  router: {epochs: 2}
"""
    )
    consistency = config.stage("joint_consistency")
    assert consistency.epochs == 3 and consistency.seed == 5 and consistency.random_share == 0.1
    assert consistency.optimizer.learning_rate == 1e-4, "half of the first one"
    assert consistency.optimizer.weight_decay == 0.2
    assert consistency.connector_start == "full", "it has no effect there"
    assert config.stage("joint_ratio") == config.stage("ratio")
    assert (config.stage("joint_label").percentile, config.stage("joint_label").floor) == (67, 0.5)
    router = config.stage("joint_router")
    assert (router.epochs, router.optimizer.learning_rate) == (2, 1e-3)
    assert block_of(config.resolved(), "joint_label")["floor"] == 0.5
    assert block_of(config.resolved(), "label")["floor"] == 0.01


def test_an_own_learning_rate_is_kept_as_it_is(load):
    config = load("joint: {consistency: {optimizer: {learning_rate: 3e-5}}}\n")
    assert config.stage("joint_consistency").optimizer.learning_rate == 3e-5
    first = config.stage("consistency").optimizer.learning_rate
    default = load("joint: {}\n").stage("joint_consistency").optimizer.learning_rate
    assert default == first / 2


def test_the_resolved_config_gives_the_same_stages_again(load, tmp_path):
    config = load("consistency: {optimizer: {learning_rate: 2e-4}}\njoint: {router: {epochs: 2}}\n")
    path = tmp_path / "again.yaml"
    path.write_text(json.dumps(config.resolved()))
    assert load_config(path, pipeline_graph()).resolved() == config.resolved()


@pytest.mark.parametrize(
    "text, message",
    [
        ("joint: true\n", "joint=true is not a block of keys"),
        ("joint: {labels: {}}\n", "unknown key joint.labels; did you mean joint.label?"),
        ("joint: {router: 3}\n", "joint.router=3 is not a block of keys"),
        ("joint: {consistency: {random_share: 2}}\n", "joint.consistency.random_share=2 must be at most 1"),
        (
            "joint: {consistency: {connector_start: random}}\n",
            "joint.consistency: connector_start=random",
        ),
        ("joint: {ratio: {splits: [train, test]}}\n", None),
    ],
)
def test_faults_of_the_block_are_one_line_each(load, text, message):
    if message is None:
        config = load(text)
        with pytest.raises(UserError, match=r"^joint.ratio.splits=train,test .*add calib to joint.ratio.spl"):
            check_split_needs(config, config.stages_of(pipeline_graph()).names)
        return
    with pytest.raises(UserError) as raised:
        load(text)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(message)


def test_a_fault_of_a_first_stage_is_not_reported_again_for_the_joint_one(load):
    with pytest.raises(UserError) as raised:
        load("consistency: {epochs: many}\nratio: {sample: 3}\njoint: {label: {floor: -1}}\n")
    lines = str(raised.value).splitlines()
    assert [line.split()[0] for line in lines] == [
        "consistency.epochs='many'",
        "unknown",
        "joint.label.floor=-1",
    ]


def test_a_joint_stage_is_named_only_if_joint_is_on(load):
    graph = pipeline_graph()
    with pytest.raises(UserError, match=r"--until='joint_ratio' is a stage only if joint is on; set joint"):
        graph.until("joint_ratio")
    with pytest.raises(UserError, match=r"inputs.adopt='joint_router' is a stage only if joint is on"):
        load("", "inputs.adopt={joint_router: /tmp}")
    load("joint: {}\n", "inputs.adopt={joint_router: /tmp}")
    with_router = load("joint: {}\n").stages_of(graph).until("router")
    assert with_router.names == STAGES


def test_a_pipeline_without_a_router_cannot_be_joint():
    first = Graph(pipeline_graph().stages[:2])
    with pytest.raises(UserError, match=r"joint needs the stage router, .*; leave joint out") as raised:
        with_joint(first)
    assert "\n" not in str(raised.value)


def test_joint_stages_have_the_resources_of_the_first_ones_unless_they_have_their_own(load):
    resources = {"workers": 1, "stages": {"ratio": {"actors": 4}, "joint_router": {"workers": 2}}}
    site = Site.model_validate({"resources": resources, "ray": {"address": "auto"}})
    assert site.for_stage("joint_ratio").resources.actors == site.for_stage("ratio").resources.actors == 4
    assert site.resources.field_of("joint_ratio", "actors") == "resources.stages.ratio.actors"
    assert site.for_stage("joint_router").resources.workers == 2
    assert site.for_stage("router").resources.workers == 1
    check_together(load(), site)
    with pytest.raises(UserError, match=r"joint_router.workers=2 .* than joint.router.packs_per_step=1"):
        check_together(load("joint: {router: {packs_per_step: 1}}\n"), site)


def test_the_oracle_needs_the_joint_ratios_of_the_samples_that_evaluate_takes(load):
    check_together(load("joint: {}\n"), Site())
    with pytest.raises(UserError, match=r"joint.ratio.max_samples=5 .*\(joint.ratio.max_samples=0\)"):
        check_together(load("joint: {ratio: {max_samples: 5}}\n"), Site())
