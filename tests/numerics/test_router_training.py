"""Training of routers on real ranks: kills, early stopping, kept and computed features, blank tiles."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from stages.inference import load_router
from stages.outputs import ROUTER_FILE, SCORES_FILE
from stages.parts import Parts
from stages.router.best_routers import BestRouters
from stages.router.blank_tiles import NUM_BLANK
from stages.training.metrics import read_metrics
from tests.numerics.ranks import check_ranks, finish, start_scenarios, stop_ranks
from tests.numerics.router_case import MODEL, settings_of, write_case
from vico.checkpoints import load_model
from vico.inference.calibration import placed_threshold

EARLY = {"epochs": 40, "patience": 3, "optimizer": {"learning_rate": 3e-3, "warmup_share": 0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_case(tmp_path_factory.mktemp("router"))


started = partial(start_scenarios, "tests.numerics.router_case")


@pytest.fixture(scope="module")
def early(folder) -> Path:
    """The stage's folder after a training that stopped early, on 2 ranks."""
    finish(*started(folder, [{"name": "early", "config": EARLY}], 2))
    return folder / "early"


def test_a_killed_training_ends_as_an_undisturbed_one_bit_for_bit(folder, early):
    """Ranks are killed while features are computed, and again between a checkpoint and the next one."""
    scenario = {"name": "killed", "config": EARLY}
    parts = Parts(folder / "killed", 1)
    reached = [
        lambda: any((parts.folder / "kept" / "features").glob("0*")),
        lambda: steps(parts)[-1:] >= [10],
        lambda: False,
    ]
    for attempt, is_reached in enumerate(reached, start=1):
        ranks, logs = started(folder, [{**scenario, "attempt": attempt}], 2)
        while not check_ranks(ranks, logs) and not is_reached():
            time.sleep(0.02)
        stop_ranks(ranks)
    for name in (ROUTER_FILE, SCORES_FILE):
        assert (parts.output / name).read_bytes() == (early / "output" / name).read_bytes()
    assert steps(parts) == steps(Parts(early, 1))


def steps(parts: Parts) -> list[int]:
    return [step for step, _ in read_metrics(parts)]


def test_the_training_stops_when_no_candidate_improves_and_keeps_the_best_weights(folder, early):
    settings = settings_of(folder, {"name": "early", "config": EARLY})
    metrics = dict(read_metrics(Parts(early, 1)))
    validated = {
        step: [values[f"validation_auc/{c}"] for c in range(2)]
        for step, values in metrics.items()
        if "validation_auc/0" in values
    }
    last = max(metrics)
    assert last == max(validated) < 40 * min(validated)
    best = BestRouters(settings.parts, 2, 3, lambda value: value).best(last)
    assert [auc for _, auc in best] == np.max(list(validated.values()), axis=0).tolist()
    later = [step for step in validated if step > max(step for step, _ in best)]
    assert len(later) == 3
    calib = split_of(early, "calib")
    auc = roc_auc_score(calib["label"], 1 - calib["p_compress"].to_numpy())
    assert auc == pytest.approx(max(auc for _, auc in best), abs=5e-3)  # scores are of unrounded features


def split_of(stage: Path, split: str):
    table = pq.read_table(stage / "output" / SCORES_FILE)
    return table.filter(pc.equal(table["split"], split))


def test_kept_and_computed_features_train_alike(folder):
    short = {"max_steps": 6, "validate_every_steps": 6}
    computed = {"memory": {"frozen_outputs_gb": 0}}
    finish(
        *started(
            folder,
            [{"name": "kept", "config": short}, {"name": "computed", "config": short, "site": computed}],
            1,
        )
    )
    assert list((folder / "kept" / "kept" / "features").iterdir())
    assert not (folder / "computed" / "kept").exists()
    losses = [
        [metrics["loss"] for _, metrics in read_metrics(Parts(folder / name, 1))]
        for name in ("kept", "computed")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.slow
def test_other_settings_train(folder):
    """Soft targets, balanced classes, token dropout and ZeRO-3; each router ranks the test tiles well."""
    settings = [{"targets": "soft"}, {"class_weights": "balanced", "token_dropout": 0.25}, {}]
    scenarios = [
        {
            "name": f"other-{number}",
            "config": {**config, "max_steps": 8, "optimizer": {"learning_rate": 3e-3}},
            "site": {"memory": {"zero_stage": 2 if config else 3}},
        }
        for number, config in enumerate(settings)
    ]
    finish(*started(folder, scenarios, 2))
    for scenario in scenarios:
        test = split_of(folder / scenario["name"], "test")
        assert roc_auc_score(test["label"], 1 - test["p_compress"].to_numpy()) > 0.8


@pytest.fixture(scope="module")
def router(early):
    """The trained router's probability to compress tiles, uint8 [N, 3, S, S], and its threshold."""
    policy = load_model(MODEL)
    router = load_router(policy, early / "output" / ROUTER_FILE).eval()
    calib, blank = (split_of(early, split)["p_compress"].to_numpy() for split in ("calib", "blank"))
    threshold = placed_threshold(calib, 0.5, 0.02, blank)

    @torch.no_grad()
    def probability(pixels: np.ndarray) -> np.ndarray:
        batches = torch.from_numpy(pixels).split(64)
        return torch.cat(
            [router.compress_probability(policy.vision_features(batch)) for batch in batches]
        ).numpy()

    return probability, threshold


def test_uniform_tiles_of_every_shade_and_almost_all_blank_tiles_are_compressed(router):
    """One margin of strong contrast among 512 blank tiles may stay: about 90 records train this router."""
    probability, threshold = router
    shades = np.arange(256, dtype=np.uint8)[:, None, None, None]
    kept = np.flatnonzero(probability(np.tile(shades, (1, 3, 112, 112))) < threshold.value)
    assert kept.tolist() == []
    assert threshold.num_blank_kept <= 0.002 * NUM_BLANK


def test_margins_of_pages_are_compressed_and_their_text_is_kept(router):
    from data_prep.demo.canvas import SANS, Canvas, TextStyle

    probability, threshold = router
    tiles = []
    for paper, ink in (("white", (0, 0, 0)), ("black", (255, 255, 255)), ("white", (60, 60, 120))):
        canvas = Canvas(3, 3, 1.0, {"white": (255, 255, 255), "black": (0, 0, 0)}[paper])
        for line in range(8):
            canvas.text(114, 114 + 13 * line, "vision router 4718", TextStyle(SANS, 12, ink))
        page = np.asarray(canvas.image.convert("RGB").resize((336, 336)))
        tiles += [
            page[112 * row : 112 * row + 112, 112 * column : 112 * column + 112].transpose(2, 0, 1)
            for row, column in ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2), (0, 1))
        ]
    compressed = (probability(np.stack(tiles)) >= threshold.value).reshape(3, 6)
    assert not compressed[:, 0].any()
    assert compressed[:, 1:].all()
