"""A pack gives the same as one sample at a time and as transformers' own forward; the KL of a model and
itself is 0."""

import numpy as np
import pytest
import torch

from tests.numerics.consistency_case import consistency_task, samples
from tests.tiny_model import make_tiny_model
from vico.packing import LOSS_REDUCTIONS, TiledSequence, packed_batch, packed_row
from vico.prompt import load_prompt_format

SHAPES = [((3,), (1,)), ((2, 1), ()), ((4,), (1,), (1,)), ((1,),), ((), ())]


KINDS = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "llama": {"tied": False, "text": {"model_type": "llama", "attention_bias": True}},
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", **request.param)


@pytest.fixture(scope="module")
def chosen(model):
    """Return samples with one, several and no images, and random rates of their tiles."""
    prompt_format = load_prompt_format(model)
    shapes = [shape for group in SHAPES for shape in group]
    encoded = [samples(prompt_format, number, shape) for number, shape in enumerate(shapes)]
    random = np.random.default_rng(3)
    return prompt_format, encoded, [random.random(sample.skeleton.num_tiles) < 0.5 for sample in encoded]


def loss_and_gradients(task, batches):
    task.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = task(batch)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in task.named_parameters()}


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
def test_packed_equals_unpacked_in_loss_and_gradients(model, chosen, reduction):
    prompt_format, encoded, rates = chosen
    task = consistency_task(model)
    with torch.no_grad():  # away from the reference, so that the loss is not that of the new connector alone
        for parameter in task.policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    settings = prompt_format.settings
    packed, gradients = loss_and_gradients(task, [packed_batch(encoded, rates, settings, reduction)])
    alone, expected = loss_and_gradients(
        task, [packed_batch([s], [r], settings, reduction) for s, r in zip(encoded, rates, strict=True)]
    )
    assert packed == pytest.approx(alone, rel=1e-5)
    for name, gradient in expected.items():
        if not name.endswith("k_proj.bias"):  # true gradient zero: only rounding is left
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@torch.no_grad()
def test_the_kl_of_each_sample_of_a_pack_is_that_of_the_sample_alone(model, chosen):
    prompt_format, encoded, rates = chosen
    task, settings = consistency_task(model), prompt_format.settings
    counts = task(packed_batch(encoded, rates, settings, "sample"), by_sample=True)[1]
    alone = [
        float(task(packed_batch([s], [r], settings, "sample"))[1]["kl_sum"])
        for s, r in zip(encoded, rates, strict=True)
    ]
    torch.testing.assert_close(counts["kl_S"], torch.tensor(alone), rtol=1e-5, atol=1e-6)
    assert counts["kl_S"].sum().item() == pytest.approx(counts["kl_sum"].item(), rel=1e-5)
    empty = packed_batch([], [], settings, "sample")
    assert task(empty, by_sample=True)[1]["kl_S"].shape == (0,)


def test_kl_is_zero_for_the_reference_itself_at_the_full_rate(model, chosen):
    prompt_format, encoded, _ = chosen
    full = [np.zeros(sample.skeleton.num_tiles, bool) for sample in encoded]
    task = consistency_task(model)
    loss, counts = task(packed_batch(encoded, full, prompt_format.settings, "sample"))
    assert counts["answer_tokens"] > 0
    assert loss.item() == 0 and counts["kl_sum"].item() == 0


def test_full_rate_gives_the_logits_of_plain_transformers(model, chosen):
    prompt_format, encoded, _ = chosen
    policy = consistency_task(model).policy
    for sample in encoded:
        if not sample.skeleton.num_tiles:
            continue
        full_rate = np.zeros(sample.skeleton.num_tiles, bool)
        row = packed_row([TiledSequence(sample.skeleton, full_rate, 0)], prompt_format.settings)
        pixels = torch.from_numpy(sample.pixels)
        with torch.no_grad():
            full, compressed, _ = policy.visual_tokens(policy.vision_features(pixels), row)
            ours = policy.lm_head(policy.answer_hidden_states(row, full, compressed))
            theirs = policy.base(input_ids=row.input_ids[None], pixel_values=pixels).logits[
                0, row.answer_index
            ]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_compressed_tile_takes_the_place_of_a_shorter_block(model, chosen):
    prompt_format, encoded, _ = chosen
    settings, sample = prompt_format.settings, encoded[0]
    flags = np.array([True, False, True])
    row = packed_row([TiledSequence(sample.skeleton, flags, 0)], settings)
    expected = sample.skeleton.num_text_tokens + settings.tokens_full + 2 * settings.tokens_compressed
    assert row.lengths == (expected,)
    tokens = (row.input_ids == settings.image_token_id).sum().item()
    assert tokens == settings.tokens_full + 2 * settings.tokens_compressed
    slots = torch.cat([row.full_slots, row.compressed_slots]).sort().values
    assert torch.equal(slots, (row.input_ids == settings.image_token_id).nonzero()[:, 0])
    assert torch.equal(row.input_ids[row.answer_index + 1], row.answer_ids)


def test_an_empty_pack_costs_nothing_and_moves_nothing(model, chosen):
    prompt_format, _, _ = chosen
    task = consistency_task(model)
    batch = packed_batch([], [], prompt_format.settings, "sample")
    loss, gradients = loss_and_gradients(task, [batch])
    assert loss == 0 and batch.loss_weight == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())
