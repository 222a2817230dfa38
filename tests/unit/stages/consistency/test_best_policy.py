"""The best policy so far is kept across restarts, and a rise of the KL is reported."""

import logging
import math

import pytest
import torch

from cluster.metric_lines import MetricsWriter
from stages.consistency.best_policy import BestPolicy
from stages.parts import Parts
from stages.training.checkpoints import best_policies
from stages.training.faults import Diverged
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("best") / "model")


def unchanged(value: object) -> object:
    """Return rank 0's value, for a single rank."""
    return value


def metrics(full: float, compressed: float) -> dict[str, float]:
    return {"kl_full": full, "kl_compressed": compressed}


def state(model, value: float):
    tensors = load_model(model, torch.float32).state_dict()
    return lambda: {name: torch.full_like(tensor, value) for name, tensor in tensors.items()}


def value_kept(parts: Parts) -> float:
    [folder] = best_policies(parts)
    return next(load_model(folder, torch.float32).parameters()).flatten()[0].item()


def test_the_lowest_sum_over_both_rates_is_kept_across_a_restart(model, tmp_path, caplog):
    parts = Parts(tmp_path, 1)
    best = BestPolicy(parts, model, keep=True, of_rank_0=unchanged)
    assert best.offer(10, metrics(0.5, 0.5), state(model, 1.0)) == {"kl_over_best": 1.0}
    assert best.offer(20, metrics(0.1, 0.7), state(model, 2.0)) == {"kl_over_best": 1.0}
    again = BestPolicy(Parts(tmp_path, 2), model, keep=True, of_rank_0=unchanged)
    with caplog.at_level(logging.WARNING):
        assert again.offer(30, metrics(0.0, 0.9), state(model, 3.0))["kl_over_best"] == pytest.approx(1.125)
        assert not caplog.records
        assert again.offer(40, metrics(0.8, 0.8), state(model, 4.0))["kl_over_best"] == pytest.approx(2.0)
    assert "step 40: the validation KL is 2.00 times its best (step 20)" in caplog.text
    assert value_kept(parts) == 2.0


def test_a_restart_without_kept_policies_compares_with_what_was_reported(tmp_path):
    """Steps after the one it resumes from are done again, so that what they reported does not count."""
    names = ("validation_kl_full", "validation_kl_compressed")
    folder = Parts(tmp_path, 1).attempt_folder
    folder.mkdir(parents=True)
    report = MetricsWriter(folder / "metrics.jsonl")
    for step, kl in ((10, 0.5), (15, None), (40, 0.1)):
        report.append(step, {"loss": 1.0} if kl is None else dict.fromkeys(names, kl))
    again = BestPolicy(Parts(tmp_path, 2), tmp_path, keep=False, of_rank_0=unchanged)
    assert again.offer(20, metrics(1.0, 1.0), lambda: None) == {"kl_over_best": 2.0}
    assert again.offer(40, metrics(0.1, 0.1), lambda: None) == {"kl_over_best": 1.0}


def test_a_non_finite_validation_is_never_the_best(model, tmp_path, caplog):
    last = BestPolicy(Parts(tmp_path, 1), model, keep=False, of_rank_0=unchanged)
    with caplog.at_level(logging.WARNING):
        assert last.offer(10, metrics(math.nan, 0.5), lambda: None) == {}
    assert "step 10: the validation gives kl_full=nan; look at the calibration samples" in caplog.text
    assert last.offer(20, metrics(1.0, 1.0), lambda: None) == {"kl_over_best": 1.0}
    best = BestPolicy(Parts(tmp_path, 1), model, keep=True, of_rank_0=unchanged)
    with pytest.raises(Diverged, match="step 10: the validation gives kl_compressed=inf, and select: best"):
        best.offer(10, metrics(0.5, math.inf), state(model, 1.0))
    assert best_policies(Parts(tmp_path, 1)) == []


def test_nothing_is_kept_if_the_last_policy_is_selected(model, tmp_path):
    best = BestPolicy(Parts(tmp_path, 1), model, keep=False, of_rank_0=unchanged)
    best.offer(10, metrics(0.5, 0.5), state(model, 1.0))
    assert best_policies(Parts(tmp_path, 1)) == []
    assert best.offer(20, {}, state(model, 1.0)) == {}
