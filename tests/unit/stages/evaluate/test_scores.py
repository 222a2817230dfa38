"""Points of metrics.json from answers with known scores."""

import numpy as np
import pyarrow as pa
import pytest

from stages.controls import COMPRESSED, FEWER_TILES, FULL, RANDOM, ROUTED
from stages.evaluate.points import EvaluatedTiles, Point
from stages.evaluate.scores import all_point_scores, evaluation_metrics, rate_text
from tests.tiny_model import make_tiny_model
from vico.settings import load_settings

SHAPES = [(3,), (1,), (), (1, 1)]
KINDS = ["prose", "plain", "text", "prose"]
KEYS = ["a", "b", "c", "d"]
FEWER_S = np.array([1, 1, 0, 2])
TILES = EvaluatedTiles(SHAPES, np.zeros(6, np.float32), None, retiled_S={1: FEWER_S})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model with 4 tokens per tile at the full rate, 1 compressed."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m")


def prediction(sample: int, model: str, rates: str) -> dict:
    """Return an answer whose similarity is 0.1 lower per compressed tile: 0.8 without any, and 0 for text."""
    similarity = 0.0 if KINDS[sample] == "text" else 0.8 - 0.1 * rates.count("1")
    return {
        "key": KEYS[sample],
        "model": model,
        "rates": rates,
        "exact_match": "1" not in rates,
        "similarity": similarity,
        "kl": float("nan") if len(rates) < sum(SHAPES[sample]) else 0.01 * rates.count("1"),
        "truncated": sample == 2,
    }


@pytest.fixture(scope="module")
def metrics(model):
    flags = [np.array([int(c) for c in text], bool) for text in ("110000", "000000", "111111", "001011")]
    points = [
        Point(FULL, (flags[1],)),
        Point(COMPRESSED, (flags[2],)),
        Point(ROUTED, (flags[0],), 0.5),
        Point(RANDOM, (flags[0], flags[1], flags[3]), 0.5),
        Point(FEWER_TILES, (np.zeros(4, bool),), max_tiles=1),
    ]
    rows = [prediction(s, "reference", "0" * sum(shape)) for s, shape in enumerate(SHAPES)]
    for point in points:
        for replicate in point.replicates:
            by_sample = point.by_sample(TILES, replicate)
            rows += [prediction(s, "policy", rate_text(part)) for s, part in enumerate(by_sample)]
    samples = pa.table({"key": KEYS, "kind": KINDS, "tiles": [list(shape) for shape in SHAPES]})
    scored = all_point_scores(samples, TILES, points, pa.Table.from_pylist(rows))
    return evaluation_metrics(samples, TILES, scored, load_settings(model))


def test_tokens_are_exact_counts(metrics):
    assert metrics["reference"]["visual_tokens"] == metrics["full"]["visual_tokens"] == 24
    assert metrics["compressed"]["visual_tokens"] == 6
    assert metrics["compressed"]["tokens_saved"] == 0.75 and metrics["compressed"]["share_compressed"] == 1
    (routed,) = metrics["routed"]
    assert routed["visual_tokens"] == 18 and routed["share_compressed"] == 2 / 6
    assert routed["tokens_saved"] == 0.25 and routed["threshold"] == 0.5


def test_dropped_tiles_save_all_of_their_tokens(metrics):
    (fewer,) = metrics["fewer_tiles"]
    assert fewer["max_tiles"] == 1 and "threshold" not in fewer
    assert fewer["visual_tokens"] == 16 and fewer["tokens_saved"] == pytest.approx(2 / 6)
    assert fewer["share_compressed"] == 0 and fewer["kl"] is None
    assert fewer["quality_kept"] == 1


def test_means_over_samples(metrics):
    assert metrics["reference"]["similarity"] == pytest.approx(0.6)
    (routed,) = metrics["routed"]
    assert routed["similarity"] == pytest.approx((0.6 + 0.8 + 0.0 + 0.8) / 4)
    assert routed["quality_kept"] == pytest.approx(routed["similarity"] / 0.6)
    assert routed["exact_match"] == 3 / 4 and routed["truncated"] == 1 / 4
    assert routed["kl"] == pytest.approx(0.02 / 4) and metrics["reference"]["kl"] == 0
    assert "similarity_sd" not in routed


def test_random_points_are_means_with_a_standard_deviation(metrics):
    (random,) = metrics["random"]
    by_draw = [0.55, 0.6, 0.525]
    assert random["similarity"] == pytest.approx(np.mean(by_draw))
    assert random["similarity_sd"] == pytest.approx(np.std(by_draw, ddof=1))
    assert random["visual_tokens"] == pytest.approx(24 - 3 * (2 + 0 + 3) / 3)


def test_every_control_has_a_key_and_lists_may_be_empty(metrics):
    for name in ("served", "shuffled", "pixel_rule", "blind_oracle", "seeing_oracle", "oracle"):
        assert metrics[name] == []
    assert metrics["num_samples"] == 4 and metrics["num_tiles"] == 6 and metrics["ratios_known"] is False


def test_each_kind_is_measured_separately(metrics):
    prose = metrics["by_kind"]["prose"]
    assert prose["num_samples"] == 2 and prose["reference"]["visual_tokens"] == 20
    assert prose["routed"][0]["tokens_saved"] == pytest.approx(2 * 3 / 20)
    assert prose["routed"][0]["quality_kept"] == pytest.approx(0.7 / 0.8)
    assert metrics["by_kind"]["plain"]["compressed"]["similarity"] == pytest.approx(0.7)
    text = metrics["by_kind"]["text"]["compressed"]
    assert text["visual_tokens"] == 0 and text["tokens_saved"] == 0 and text["share_compressed"] == 0
    assert text["quality_kept"] is None  # the reference had nothing to keep
