"""Plans of the real graph over real input files; tests/integration adds plans over a store."""

import json
import os
import time

import pytest

from pipeline.config.graph import pipeline_graph
from pipeline.config.pipeline_file import load_config
from pipeline.identity import file_digests as digests
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.fingerprints import canonical_json
from pipeline.planning.plan import plan
from pipeline.planning.tasks import resolve
from tests.tiny_model import make_tiny_model
from vico.errors import UserError

STAGES = ["shard", "consistency", "ratio", "label", "router", "evaluate", "export"]


@pytest.fixture(scope="module")
def graph():
    return pipeline_graph()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def fingerprints(graph, model, tmp_path):
    """Return a function: (config text, overrides) -> fingerprint by stage."""

    def stage_fingerprints(text="", *overrides, records="{format: demo, num_samples: 20}"):
        path = tmp_path / "pipeline.yaml"
        path.write_text(f"inputs: {{records: {records}, model: {model}}}\n{text}")
        config = load_config(path, graph, overrides)
        return resolve(graph, config, DigestCache(tmp_path)).fingerprints

    return stage_fingerprints


def changed(before, after):
    """Return the stages whose fingerprints differ."""
    return [name for name in before if before[name] != after[name]]


def test_every_stage_has_a_fingerprint_and_a_stable_identity(graph, fingerprints):
    assert list(fingerprints()) == STAGES
    assert len(set(fingerprints().values())) == len(STAGES)
    assert fingerprints() == fingerprints()
    for spec in graph.stages:
        canonical_json(
            spec.config_class(**({"seed": 0} if "seed" in spec.config_class.model_fields else {}))
        )  # no default without a stable form


def test_a_change_moves_the_stages_that_depend_on_it_and_no_others(fingerprints):
    before = fingerprints()
    assert changed(before, fingerprints("seed: 1"))[0] == "consistency"
    assert changed(before, fingerprints("consistency: {epochs: 2}")) == [
        "consistency", "ratio", "label", "router", "evaluate", "export"
    ]  # fmt: skip
    assert changed(before, fingerprints("shard: {samples_per_shard: 10}")) == STAGES
    assert changed(before, fingerprints(records="{format: demo, num_samples: 21}")) == STAGES
    assert "ratio" not in changed(before, fingerprints("label: {percentile: 41}"))


def test_comments_order_defaults_and_the_experiments_name_move_nothing(fingerprints):
    before = fingerprints("seed: 3\nconsistency: {epochs: 2, max_steps: 5}")
    same = (
        "# a comment\nconsistency:\n  max_steps: 5\n  epochs: 2.0\n  rate_unit: tile\n"
        "experiment: other\nseed: 3\n"
    )
    assert fingerprints(same) == before


def test_unchanged_annotations_are_read_once(fingerprints, graph, model, tmp_path, monkeypatch):
    annotation = tmp_path / "rows.jsonl"
    annotation.write_text('{"id": 1, "conversations": []}\n')
    meta = tmp_path / "meta.json"
    meta.write_text(
        json.dumps(
            {"rows": {"root": str(tmp_path), "annotation": str(annotation), "length": 1, "repeat_time": 1}}
        )
    )
    monkeypatch.setattr(digests, "_RACY_NS", 0)
    records = f"{{format: internvl, path: {meta}}}"
    path = tmp_path / "pipeline.yaml"
    path.write_text(f"inputs: {{records: {records}, model: {model}}}\n")
    config = load_config(path, graph)
    time.sleep(0.01)
    cache = DigestCache(tmp_path)
    before = resolve(graph, config, cache).fingerprints
    cache.save()
    with monkeypatch.context() as patch:
        patch.setattr(digests, "file_sha256", lambda path: pytest.fail(f"read {path} again"))
        assert resolve(graph, config, DigestCache(tmp_path)).fingerprints == before
    annotation.write_text('{"id": 2, "conversations": []}\n')
    os.utime(annotation, (1, 1))
    assert resolve(graph, config, DigestCache(tmp_path)).fingerprints["shard"] != before["shard"]


def test_a_plan_over_an_empty_store_runs_everything(fingerprints, graph, model, tmp_path):
    fingerprints()
    config = load_config(tmp_path / "pipeline.yaml", graph)
    planned = plan(resolve(graph, config, DigestCache(tmp_path)), tmp_path / "store")
    assert [stage.as_json()["action"] for stage in planned] == ["run"] * len(STAGES)
    assert set(planned[0].as_json()) == {"stage", "action", "fingerprint", "reasons"}


def test_missing_inputs_are_named(fingerprints, tmp_path):
    with pytest.raises(UserError, match=r"inputs\.model=.*nowhere is not a folder"):
        fingerprints("", f"inputs.model={tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"no\.json"):
        fingerprints(records=f"{{format: internvl, path: {tmp_path / 'no.json'}}}")
