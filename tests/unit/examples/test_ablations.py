"""Ablations: what they change, and the paired comparison with the base."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from examples.ablations.__main__ import HEAD, table
from examples.ablations.compare import Evaluation, compared
from examples.ablations.runs import Ablation, Command, ablations
from pipeline.config.graph import pipeline_graph
from pipeline.config.pipeline_file import load_config
from pipeline.identity.fingerprints import stage_fingerprint, stage_identity
from stages.controls import COMPRESSED, FULL, ROUTED
from stages.evaluate.intervals import ResampledPoints
from stages.evaluate.points import Point
from stages.evaluate.scores import PointScores
from vico.errors import UserError

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "configs" / "ablations"
ALL = ablations(FOLDER)
IS_BASE = {
    "quickstart.yaml": {"percentile_67", "soft", "no_joint"},
    "demo.yaml": {"percentile_67", "hard"},
    "headline.yaml": {"percentile_67", "hard"},
}
"""Ablations that are what the pipeline does anyway."""


def fingerprints(config: str, overrides: tuple[str, ...] = ()) -> dict[str, str]:
    loaded = load_config(ROOT / "configs" / config, pipeline_graph(), overrides)
    values = {name: name for name in ("records", "tokenizer", "model")}
    for spec in loaded.stages_of(pipeline_graph()).stages:
        inputs = {name: values[name] for name in spec.inputs if name in values}
        identity = stage_identity(spec.code_version, loaded.stage(spec.name), inputs)
        values[spec.name] = stage_fingerprint(spec.name, identity)
    return values


@pytest.mark.parametrize("config", IS_BASE)
@pytest.mark.parametrize("ablation", ALL[1:], ids=lambda ablation: ablation.name)
def test_every_ablation_is_a_pipeline_that_keeps_shards_and_test_questions(config, ablation):
    base, changed = fingerprints(config), fingerprints(config, ablation.overrides)
    assert changed["shard"] == base["shard"]
    first = load_config(ROOT / "configs" / config, pipeline_graph())
    second = load_config(ROOT / "configs" / config, pipeline_graph(), ablation.overrides)
    assert first.stage("evaluate") == second.stage("evaluate")
    assert ablation.description
    assert (changed["export"] == base["export"]) == (ablation.name in IS_BASE[config])


def test_the_issues_ablations_are_there():
    assert {ablation.name for ablation in ALL} >= {
        "base",
        "no_consistency",
        "rate_image",
        "answers",
        "train_vision",
        "joint",
        "isolation_image",
        "isolation_random",
        "percentile_50",
        "floor_large",
        "hard",
        "soft",
    }


def test_an_ablation_of_the_labels_reuses_losses_and_policy():
    base = fingerprints("quickstart.yaml")
    (hard,) = [ablation for ablation in ALL if ablation.name == "hard"]
    changed = fingerprints("quickstart.yaml", hard.overrides)
    assert [name for name in base if base[name] != changed[name]] == ["router", "evaluate", "export"]


def test_the_keys_of_an_ablation_come_after_those_for_all_runs(tmp_path):
    (tmp_path / "high.yaml").write_text("# More\n# epochs.\nrouter: {epochs: 9}\njoint: {}\n")
    _, high = ablations(tmp_path)
    assert high == Ablation("high", "More epochs.", ("router.epochs=9", "joint={}"))
    command = Command(Path("a.yaml"), Path("runs"), "here", ("router.epochs=2",))
    arguments = command.arguments(high)
    assert arguments[:6] == ["run", "a.yaml", "--storage", "runs", "--site", "here"]
    assert arguments[6:] == ["--set", "router.epochs=2", "--set", "router.epochs=9", "--set", "joint={}"]
    loaded = load_config(ROOT / "configs" / "quickstart.yaml", pipeline_graph(), arguments[7::2])
    assert loaded.stage("router").epochs == 9 and loaded.has_joint


def test_what_is_no_ablation_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--only harder: .* has answers, floor_large, "):
        ablations(FOLDER, ["harder"])
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(UserError, match=r"empty\.yaml changes no key"):
        ablations(tmp_path)


def evaluation(quality_P, seed: int = 0, noise: float = 0.05, key: str = "a") -> Evaluation:
    """Return an evaluation with points at 0, 25, 50 and 75 % of the tokens saved and 200 resamples, whose
    noise is that of the questions: the same for equal seeds."""
    points = [Point(FULL, ()), Point(ROUTED, (), 0.7), Point(ROUTED, (), 0.3), Point(COMPRESSED, ())]
    scored = [PointScores(point, {}, np.zeros((1, 1)), np.zeros(1)) for point in points]
    of_questions_B = np.random.default_rng(seed).normal(0, noise, 201)
    of_questions_B[0] = 0
    quality_BP = np.array(quality_P)[None] + of_questions_B[:, None]
    saved_BP = np.tile([0, 0.25, 0.5, 0.75], (201, 1))
    routed = [
        {"threshold": threshold, "tokens_saved": saved, "quality_kept": quality}
        for threshold, saved, quality in ((0.7, 0.25, quality_P[1]), (0.3, 0.5, quality_P[2]))
    ]
    metrics = {"routed": routed, "absolute_threshold": 0.7, "router": {"auc": 0.8}}
    samples = pa.table({"key": [key], "group": [""], "tiles": [[1]]})
    resampled = ResampledPoints(scored, quality_BP, quality_BP, saved_BP)
    return Evaluation("r", metrics, samples, resampled, 120.0, 60.0, 0.75)


def test_a_run_does_not_differ_from_itself():
    row = compared("same", evaluation([1, 0.9, 0.8, 0.6]), evaluation([1, 0.9, 0.8, 0.6]))
    assert row.minus_base_at_half == row.minus_base_over_curve == 0
    assert row.minus_base_at_half_interval == [0, 0]
    assert row.kept_at_half == pytest.approx(0.8)
    assert (row.tokens_saved, row.kept) == (0.25, 0.9)


def test_a_difference_is_certain_although_both_intervals_overlap():
    """What the questions have in common cancels: both runs have the same resamples."""
    base, better = evaluation([1, 0.9, 0.8, 0.6]), evaluation([1, 0.92, 0.84, 0.6])
    row = compared("better", better, base)
    assert row.minus_base_at_half == pytest.approx(0.04)
    assert row.minus_base_at_half_interval == pytest.approx([0.04, 0.04])
    assert row.minus_base_over_curve == pytest.approx(0.02, abs=5e-4)
    assert row.kept_at_half_interval[0] < 0.8


def test_other_test_questions_are_refused():
    with pytest.raises(UserError, match="other: run r has other test questions"):
        compared("other", evaluation([1, 1, 1, 1], key="b"), evaluation([1, 1, 1, 1]))


def test_the_table_has_one_row_per_run_and_says_what_changed():
    base = evaluation([1, 0.9, 0.8, 0.6])
    rows = [compared("base", base, base), compared("more", evaluation([1, 0.92, 0.84, 0.6]), base)]
    lines = table(rows, {"base": "as it is", "more": "More epochs."}).splitlines()
    assert "\n".join(lines[:2]) + "\n" == HEAD
    assert lines[2].startswith("| base | 0.800 | 25.0% | 0.900 | - | 0.800 |")
    assert lines[3].startswith("| more |") and "| +0.040 | +0.040 to +0.040 |" in lines[3]
    assert lines[3].endswith("| 1.0 |") and lines[2].endswith("| 2.0 |")
    assert {line.count("|") for line in lines[:4]} == {13}
    assert lines[-1] == "- more: More epochs."


def test_the_headline_reuses_the_first_training_of_the_demo():
    """Its header promises it."""
    demo, headline = fingerprints("demo.yaml"), fingerprints("headline.yaml")
    shared = [name for name in demo if demo[name] == headline[name]]
    assert shared[3:] == ["shard", "consistency"]  # after three inputs
