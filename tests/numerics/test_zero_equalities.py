"""Over 10 consistency steps, every ZeRO stage on 1, 2 or 3 ranks equals torch alone: rates per tile or image,
text-only and empty packs, experts, and every key of DeepSpeed that a site may set."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.training.engine_settings import SITE_ZERO_KEYS
from tests.numerics.consistency_case import MOE, SITE_KEYS, reference_run
from tests.numerics.ranks import finish, start_ranks
from tests.tiny_model import make_tiny_model

MODULE = "tests.numerics.consistency_case"
RELATIVE = 1e-5
Run = dict[str, Any]
# Allowed distance as a share of that between torch alone in bfloat16 and in float32, for the final parameters
# and the losses. Ten steps amplify rounding, which differs between CPUs. Weights without a float32 copy, no
# clipping, or a learning rate that is 10 % too low give 0.9 and more.
BFLOAT16 = 0.5
# A key bias shifts all scores of a query by the same amount, so its true gradient is zero, and Adam's
# normalised step turns rounding into full-size updates. Key biases are not compared.
ZERO_GRADIENT = ("k_proj.bias",)
TIED = ("lm_head.weight", "model.language_model.embed_tokens.weight")


STAGES = (1, 2, 3)
# The fast part: every stage on one and two ranks with all kinds of packs; the whole matrix is slow.
FAST = {world_size: [f"mixed:{stage}:float32" for stage in STAGES] for world_size in (1, 2)}
FAST[2] += ["moe:2:float32", "moe:3:float32", *(f"mixed:{stage}:float32:fused" for stage in STAGES)]
EXPERTS = {"model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
# Ranks and cases by key; a key that groups ranks needs two groups of two.
KEYS = {
    key: (
        4 if key == "zero_hpz_partition_size" else 2,
        [f"mixed:{stage}:float32:key-{key}" for stage in stages],
    )
    for key, (stages, _) in SITE_KEYS.items()
}
VARIANTS = [
    "mixed:2:float32:offload-optimizer",
    "mixed:3:float32:offload-parameters",
    "mixed:2:float32:reference-sharded",
    "mixed:3:float32:reference-sharded",
    "mixed:3:float32:reference-cpu",
    *(
        f"mixed:{stage}:float32:checkpointing-{which}{compiled}"
        for stage in STAGES
        for which in ("none", "selective", "full")
        for compiled in ("", "-compiled")
        if which != "none" or compiled
    ),
    "mixed:2:float32:reference-sharded-compiled",
    "moe:3:float32:reference-sharded",
    "moe:3:float32:checkpointing-full",
    *(case for world_size, cases in KEYS.values() if world_size == 2 for case in cases),
]
SLOW = {
    world_size: [
        f"{kind}:{stage}:float32"
        for kind in ("tile", "image", f"text-{max(world_size, 2)}")
        for stage in STAGES
    ]
    + [f"mixed:{stage}:bfloat16" for stage in STAGES]
    + ([f"moe:{stage}:float32" for stage in STAGES] if world_size == 3 else [])
    + ([f"mixed:{stage}:float32" for stage in STAGES] if world_size == 3 else [])
    for world_size in (1, 2, 3)
}


def alone(case: str) -> tuple[str, str]:
    """Return kind and dtype of a case: those of the run of torch alone to compare with."""
    kind, _, dtype, *_ = case.split(":")
    return kind, dtype


def runs_of(cases: dict[int, list[str]], folder: Path) -> dict[tuple[str | int, str], Run]:
    """Return what torch alone and the ranks computed: {(kind, dtype): run} and {(world size, case): run}."""
    model = make_tiny_model(folder / "model")
    make_tiny_model(folder / MOE, text=EXPERTS)
    runs = {}
    for world_size, wanted in cases.items():
        out = folder / str(world_size)
        ranks = start_ranks(MODULE, [str(model), str(out), *wanted], out, world_size)
        for kind, dtype in {alone(case) for case in wanted} - runs.keys():
            runs[kind, dtype] = reference_run(model, kind, getattr(torch, dtype))
        finish(ranks, out)
        for case in wanted:
            runs[world_size, case] = torch.load(out / f"{case}.pt", weights_only=True)
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return runs_of(FAST, tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return runs_of(SLOW, tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    return runs_of({2: VARIANTS}, tmp_path_factory.mktemp("variants"))


def listed(cases: dict[int, list[str]], dtype: str) -> list[Any]:
    return [
        pytest.param(world_size, case, id=f"{world_size}ranks-{case}")
        for world_size, wanted in cases.items()
        for case in wanted
        if case.split(":")[2] == dtype
    ]


@pytest.mark.parametrize(("world_size", "case"), listed(FAST, "float32"))
def test_losses_gradients_and_parameters_equal_a_single_process(runs, world_size, case):
    assert_equal(runs[world_size, case], runs[alone(case)])


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "case"), listed(SLOW, "float32"))
def test_the_whole_matrix_equals_a_single_process(matrix, world_size, case):
    assert_equal(matrix[world_size, case], matrix[alone(case)])


@pytest.mark.slow
@pytest.mark.parametrize("case", VARIANTS)
def test_the_placement_of_states_and_reference_changes_nothing(variants, case):
    assert_equal(variants[2, case], variants[alone(case)])


@pytest.mark.slow
def test_parameters_kept_twice_in_groups_of_ranks_change_nothing(tmp_path):
    world_size, [case] = KEYS["zero_hpz_partition_size"]
    runs = runs_of({world_size: [case]}, tmp_path)
    assert_equal(runs[world_size, case], runs[alone(case)])


def test_every_key_that_a_site_may_set_is_compared():
    assert SITE_KEYS.keys() == SITE_ZERO_KEYS - {"stage"}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "case"), listed(SLOW, "bfloat16"))
def test_bfloat16_is_near_torch_alone_in_bfloat16(matrix, world_size, case):
    ours, in_bfloat16, in_float32 = matrix[world_size, case], matrix[alone(case)], matrix["mixed", "float32"]
    for distance in (parameter_distance, loss_distance):
        assert distance(ours, in_bfloat16) <= BFLOAT16 * distance(in_bfloat16, in_float32)


def parameter_distance(run: Run, reference: Run) -> torch.Tensor:
    """Return the Euclidean distance of all compared parameters."""
    names = [name for name in reference["state"] if not name.endswith(ZERO_GRADIENT)]
    differences = [run["state"][name].double() - reference["state"][name].double() for name in names]
    return torch.stack([difference.norm() for difference in differences]).norm()


def loss_distance(run: Run, reference: Run) -> torch.Tensor:
    """Return the root mean square over the steps of the relative differences."""
    return (run["losses"] / reference["losses"] - 1).square().mean().sqrt()


def assert_equal(run: Run, reference: Run) -> None:
    """Compare the losses of every step, the gradients of the first and last, and the final parameters."""
    torch.testing.assert_close(run["losses"], reference["losses"], rtol=RELATIVE, atol=0)
    for step, expected in reference["gradients"].items():
        for name, gradient in expected.items():
            if not name.endswith(ZERO_GRADIENT):
                difference = (run["gradients"][step][name] - gradient).norm()
                assert difference <= RELATIVE * gradient.norm(), f"gradient of {name} at step {step}"
    assert run["state"].keys() == reference["state"].keys()
    head, embedding = (run["state"][f"policy.base.{name}"] for name in TIED)
    assert head.data_ptr() == embedding.data_ptr()  # copies would be stored twice and diverge
    for name, expected in reference["state"].items():
        if not name.endswith(ZERO_GRADIENT):
            difference = (run["state"][name] - expected).abs().max()
            assert difference <= RELATIVE * max(expected.abs().max(), 1.0), f"parameter {name}"


def test_losses_are_worth_comparing(runs):
    losses = runs["mixed", "float32"]["losses"]
    assert losses.min() > 1e-3
    assert losses.unique().numel() == losses.numel()


def test_the_parameters_left_out_have_no_gradient(runs):
    for gradients in runs["mixed", "float32"]["gradients"].values():
        left_out = [gradient for name, gradient in gradients.items() if name.endswith(ZERO_GRADIENT)]
        assert left_out
        assert all(gradient.norm() < 1e-10 for gradient in left_out)
