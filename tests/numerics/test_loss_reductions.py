"""The three loss reductions over a step of several packs equal their formulas, computed densely in
float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.numerics.consistency_case import consistency_task, samples
from tests.tiny_model import make_tiny_model
from vico.objectives.consistency import ConsistencyTask, answer_hidden_states
from vico.packing import LOSS_REDUCTIONS, EncodedSample, PackedBatch, packed_batch
from vico.prompt import PromptFormat, load_prompt_format

PACKS = [[((3,), 0), ((1,), 1)], [((2, 1), 2), ((), 3), ((1,), 4)], []]
"""The samples of each pack of a step: tiles per image, and the number from which the sample is drawn."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("reductions") / "m")


def step_samples(prompt_format: PromptFormat) -> list[list[EncodedSample]]:
    return [[samples(prompt_format, number, tiles) for tiles, number in pack] for pack in PACKS]


def step_packs(prompt_format: PromptFormat, reduction: str) -> list[PackedBatch]:
    packs = step_samples(prompt_format)
    return [
        packed_batch(pack, [rates(sample) for sample in pack], prompt_format.settings, reduction)
        for pack in packs
    ]


def rates(sample: EncodedSample) -> np.ndarray:
    """Return alternating rates, the first tile compressed."""
    return np.arange(sample.skeleton.num_tiles) % 2 == 0


def dense_kl(task: ConsistencyTask, prompt_format: PromptFormat) -> list[torch.Tensor]:
    """Return the KL of every answer token of each sample [N_s], from whole rows of logits of the sample
    alone."""
    kl = []
    reference_states, reference_head_VD, _ = task._reference
    for sample in (sample for pack in step_samples(prompt_format) for sample in pack):
        pack = packed_batch([sample], [rates(sample)], prompt_format.settings, "sample")
        hidden_AD, _ = answer_hidden_states(task.policy, task.policy.vision_features(pack.tiles), pack.policy)
        log_policy_AV = task.policy.lm_head(hidden_AD).log_softmax(-1)
        log_reference_AV = (reference_states(pack) @ reference_head_VD.T).log_softmax(-1)
        kl.append(F.kl_div(log_policy_AV, log_reference_AV, log_target=True, reduction="none").sum(-1))
    return kl


def formula(kl: list[torch.Tensor], reduction: str) -> torch.Tensor:
    """Return the loss of a step, as the docstring of `consistency.loss_reduction` states it."""
    lengths = [len(kl_A) for kl_A in kl]
    if reduction == "sample":
        return sum(kl_A.sum() / len(kl_A) for kl_A in kl) / len(kl)
    if reduction == "token":
        return sum(kl_A.sum() for kl_A in kl) / sum(lengths)
    weighted = sum(kl_A.sum() / math.sqrt(len(kl_A)) for kl_A in kl)
    return weighted / sum(math.sqrt(length) for length in lengths)


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
def test_loss_and_gradients_of_a_step_equal_the_formula(folder, reduction):
    prompt_format = load_prompt_format(folder)
    task = consistency_task(folder, torch.float64)
    packs = step_packs(prompt_format, reduction)
    loss = sum(task(pack)[0] for pack in packs) / sum(pack.loss_weight for pack in packs)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in task.named_parameters()}
    task.zero_grad()
    kl = dense_kl(task, prompt_format)
    assert len({len(kl_A) for kl_A in kl}) > 2, "with answers of one length the reductions would be the same"
    expected = formula(kl, reduction)
    expected.backward()
    # the weights of answer tokens are float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and loss.item() > 1e-3
    compared = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    for name, gradient in compared.items():
        if not name.endswith("k_proj.bias"):  # its true gradient is zero, so that only rounding is left
            assert (gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    assert len(compared) > 20


def test_the_reductions_differ(folder):
    prompt_format = load_prompt_format(folder)
    kl = dense_kl(consistency_task(folder, torch.float64), prompt_format)
    losses = [formula(kl, reduction).item() for reduction in LOSS_REDUCTIONS]
    assert all(abs(a / b - 1) > 1e-3 for a in losses for b in losses if a is not b), losses
