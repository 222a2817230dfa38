"""ZeRO-1 = 2 = 3 and 1 = 2 ranks = torch alone, over 10 consistency steps with mixed rates, text-only and
empty packs."""

import pytest
import torch

from tests.numerics.consistency_case import reference_run
from tests.numerics.ranks import finish, start_ranks
from tests.tiny_model import make_tiny_model

MODULE = "tests.numerics.consistency_case"
RELATIVE = 1e-5
# A key bias shifts every score of a query alike, so its true gradient is zero and Adam's normalised step
# turns rounding into full-size updates. They are not compared.
ZERO_GRADIENT = ("k_proj.bias",)
TIED = ("lm_head.weight", "model.language_model.embed_tokens.weight")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What torch alone, one rank and two ranks computed: {(world size, ZeRO stage): run}."""
    folder = tmp_path_factory.mktemp("zero")
    model = make_tiny_model(folder / "model")
    found = {}
    for world_size in (1, 2):
        out = folder / str(world_size)
        ranks = start_ranks(MODULE, [str(model), str(out), "1", "2", "3"], out, world_size)
        if world_size == 1:
            found["torch"] = reference_run(model)
        finish(ranks, out)
        for stage in (1, 2, 3):
            found[world_size, stage] = torch.load(out / f"zero{stage}.pt", weights_only=True)
    return found


CASES = [(world_size, stage) for world_size in (1, 2) for stage in (1, 2, 3)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}ranks-zero{case[1]}")
def test_losses_gradients_and_parameters_equal_a_single_process(runs, case):
    reference, run = runs["torch"], runs[case]
    torch.testing.assert_close(run["losses"], reference["losses"], rtol=RELATIVE, atol=0)
    for step, expected in reference["gradients"].items():
        for name, gradient in expected.items():
            if not name.endswith(ZERO_GRADIENT):
                difference = (run["gradients"][step][name] - gradient).norm()
                assert difference <= RELATIVE * gradient.norm(), f"gradient of {name} at step {step}"
    assert run["state"].keys() == reference["state"].keys()
    head, embedding = (run["state"][f"policy.base.{name}"] for name in TIED)
    assert head.data_ptr() == embedding.data_ptr()  # a copy each would be stored twice and train apart
    for name, expected in reference["state"].items():
        if not name.endswith(ZERO_GRADIENT):
            difference = (run["state"][name] - expected).abs().max()
            assert difference <= RELATIVE * max(expected.abs().max(), 1.0), f"parameter {name}"


def test_losses_are_worth_comparing(runs):
    losses = runs["torch"]["losses"]
    assert losses.min() > 1e-3
    assert losses.unique().numel() == losses.numel()


def test_the_parameters_left_out_have_no_gradient(runs):
    for gradients in runs["torch"]["gradients"].values():
        left_out = [gradient for name, gradient in gradients.items() if name.endswith(ZERO_GRADIENT)]
        assert left_out
        assert all(gradient.norm() < 1e-10 for gradient in left_out)
