"""Fingerprints that existing storages depend on: those pinned here must never change."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest

from pipeline.config.graph import pipeline_graph, with_joint
from pipeline.identity.fingerprints import (
    UnstableValue,
    canonical_json,
    config_identity,
    stage_fingerprint,
    stage_identity,
)
from pipeline.results.runs import pipeline_digest
from stages.stage_config import StageConfig


class Optimizer(StageConfig):
    learning_rate: float = 8e-5
    betas: tuple[float, float] = (0.9, 0.95)


class Demo(StageConfig):
    kind: Literal["demo"] = "demo"


class File(StageConfig):
    kind: Literal["file"] = "file"


class Config(StageConfig):
    seed: int | None = None
    optimizer: Optimizer = Optimizer()
    warm: Optimizer = Optimizer(learning_rate=1.0)
    epochs: float = 1.0
    names: dict[str, int] = {}  # noqa: RUF012
    source: Demo | File = Demo()
    note: str = "ü"


class WiderConfig(Config):
    new: int = 3


def fingerprint(config, inputs=None, version=1):
    return stage_fingerprint("consistency", stage_identity(version, config, inputs or {}))


PINNED = {
    "defaults": (Config(), {}, "301981e0da3bf28abd340c325464f95e0deb60ff05fd6316bcd31e0798b596b2"),
    "seed": (Config(seed=7), {}, "d16a6ff67b5d650004c0b0547f2117de521fff538b8c24e47ea6af74acd0f24b"),
    "nested": (
        Config(optimizer=Optimizer(learning_rate=1e-5)),
        {},
        "ebf5e04ae3d7cefcc03c25d7802abb09ce090592f7ef93cc632918c85374e887",
    ),
    "inputs": (
        Config(seed=7, names={"b": 1, "a": 2}),
        {"shard": "ab" * 32, "model": "cd" * 32},
        "570ae6f364daf78db86892a8fb4bb337fd5b734a5e05082121675eca709c3fde",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_known_fingerprints_do_not_change(name):
    config, inputs, pinned = PINNED[name]
    assert fingerprint(config, inputs) == pinned


def test_a_known_pipeline_digest_does_not_change():
    fingerprints = {"shard": "ab" * 32, "consistency": "cd" * 32}
    assert pipeline_digest(fingerprints) == "5a932a5fd6810b946600687bf266ca21610baa1c8740e86486ba7be1ba61fedb"
    assert pipeline_digest(dict(reversed(fingerprints.items()))) != pipeline_digest(fingerprints)


def test_fields_at_their_default_do_not_enter():
    assert config_identity(Config()) == {}
    assert config_identity(Config(source=File())) == {"source": {"kind": "file"}}
    assert fingerprint(WiderConfig()) == fingerprint(Config())
    assert fingerprint(WiderConfig(new=4)) != fingerprint(Config())
    assert fingerprint(Config(epochs=1)) == fingerprint(Config())
    assert fingerprint(Config(optimizer={"learning_rate": 8e-5})) == fingerprint(Config())


def test_everything_that_decides_a_result_changes_its_fingerprint():
    base = fingerprint(Config(), {"shard": "a"})
    others = [
        fingerprint(Config(seed=0), {"shard": "a"}),
        fingerprint(Config(optimizer=Optimizer(betas=(0.9, 0.99))), {"shard": "a"}),
        fingerprint(Config(warm=Optimizer()), {"shard": "a"}),
        fingerprint(Config(source=File()), {"shard": "a"}),
        fingerprint(Config(), {"shard": "b"}),
        fingerprint(Config(), {"ratio": "a"}),
        fingerprint(Config(), {"shard": "a", "heldout": "a"}),
        fingerprint(Config(), {"shard": "a"}, version=2),
        stage_fingerprint("router", stage_identity(1, Config(), {"shard": "a"})),
    ]
    assert len({base, *others}) == len(others) + 1


def test_order_of_keys_does_not_matter():
    assert fingerprint(Config(names={"a": 1, "b": 2})) == fingerprint(Config(names={"b": 2, "a": 1}))


def test_canonical_json_keeps_floats_exact_and_text_plain():
    assert canonical_json({"b": [1e-5, 0.1, 1, True, None], "a": "ü"}) == (
        '{"a":"\\u00fc","b":[1e-05,0.1,1,true,null]}'
    )


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1, 2}, object(), b"bytes", {1: 2}, [{"x": float("nan")}], 1j, len]
)
def test_a_value_without_a_stable_form_is_refused(value):
    with pytest.raises(UnstableValue, match="no stable form"):
        canonical_json(value)


# Of each stage at what its fingerprint leaves out: its defaults, except for fields whose default has changed
# since. Seed 0, and the names of inputs in place of their digests. CODE_VERSION and INPUTS change them.
STAGES = {
    "shard": "cd05009652fc475f",
    "consistency": "701441a4692e7b04",
    "ratio": "76991b3607f55feb",
    "label": "4f96465a74fd5271",
    "router": "2adb61727f9b0548",
    "evaluate": "b4cc2352900b575f",
    "export": "fc49a73503b51662",
}


# With joint stages the first five are the same.
WITH_JOINT = {
    "joint_rates": "8c764168914bb991",
    "joint_consistency": "5f0daa3c406ed3f0",
    "joint_ratio": "cfa7219cb286932c",
    "joint_label": "e791269dbaa40317",
    "joint_router": "971b0d62fa0ed112",
    "evaluate": "3ad487d775d3c49b",
    "export": "b0021159e86a7941",
}


@pytest.mark.parametrize(
    "graph, expected",
    [(pipeline_graph(), STAGES), (with_joint(pipeline_graph()), {**STAGES, **WITH_JOINT})],
    ids=["alone", "with joint"],
)
def test_the_stages_fingerprints_do_not_change(graph, expected):
    fingerprints = {name: name for name in ("records", "tokenizer", "model")}
    for spec in graph.stages:
        seed = {"seed": 0} if "seed" in spec.config_class.model_fields else {}
        config = spec.config_class(**seed, **spec.config_class.LEFT_OUT)
        inputs = {name: fingerprints[name] for name in spec.inputs if name in fingerprints}
        identity = stage_identity(spec.code_version, config, inputs)
        fingerprints[spec.name] = stage_fingerprint(spec.name, identity)
    assert {name: fingerprints[name][:16] for name in graph.names} == expected


def test_a_new_default_is_part_of_the_fingerprint():
    """So that a result which an older version made without the field is not taken for one with it."""

    class Config(StageConfig):
        LEFT_OUT: ClassVar[Mapping[str, Any]] = {"max_samples": 0}
        max_samples: int = 100

    assert config_identity(Config()) == {"max_samples": 100}
    assert config_identity(Config(max_samples=0)) == {}
