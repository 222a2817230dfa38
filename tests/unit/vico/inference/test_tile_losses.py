"""Packed losses at many rates, compared with one dense forward pass each."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.numerics.consistency_case import samples
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.inference.branches import RatedSample
from vico.inference.tile_losses import encoded_pair, encoded_tiles, rate_losses, share_tower
from vico.packing import EncodedSample
from vico.prompt import load_prompt_format

SHAPES = [(3,), (1,), (2, 1), (), (4,), (1, 1, 1)]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A policy that differs from its reference, and samples with all their rate vectors."""
    return case_in(tmp_path_factory.mktemp("model") / "m", torch.float32)


@pytest.fixture(scope="module")
def exact_case(tmp_path_factory):
    """The same in float64, and a conversation whose first answer comes before its second picture."""
    folder = tmp_path_factory.mktemp("model") / "m"
    policy, reference, encoded, rates = case_in(folder, torch.float64)
    prompt_format = load_prompt_format(folder)
    turns = [
        {"from": "human", "value": "what is <image> here"},
        {"from": "gpt", "value": "written here"},
        {"from": "human", "value": "and <image>"},
        {"from": "gpt", "value": "what"},
    ]
    size = prompt_format.settings.tile_size
    pixels = np.random.default_rng(5).standard_normal((4, 3, size, size))
    talk = EncodedSample("talk", 99, prompt_format.encode(turns, (2, 2)), pixels, (2, 2))
    return policy, reference, [*encoded, talk], [*rates, all_rates(4)]


def case_in(folder, dtype):
    make_tiny_model(folder)
    policy, reference = load_model(folder, dtype), load_model(folder, dtype)
    policy.add_compressed_connector(1)
    policy.eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.02)
    prompt_format = load_prompt_format(folder)
    encoded = [samples(prompt_format, number, shape) for number, shape in enumerate(SHAPES)]
    rates = [all_rates(sample.skeleton.num_tiles) for sample in encoded]
    return policy, reference, encoded, rates


def all_rates(num_tiles: int) -> list[np.ndarray]:
    return [np.array([n >> t & 1 for t in range(num_tiles)], bool) for n in range(2**num_tiles)]


def losses(policy, reference, encoded, rates, **changed: int) -> list[np.ndarray]:
    sizes = {"row_tokens": 200, "batch_tiles": 4, "kl_chunk_rows": 7, **changed}
    batch_tiles = sizes.pop("batch_tiles")
    pixels = np.concatenate([sample.pixels for sample in encoded])
    first_tiles = np.cumsum([0, *(len(sample.pixels) for sample in encoded)])
    return rate_losses(
        encoded_tiles(policy, pixels, batch_tiles),
        encoded_tiles(reference, pixels, batch_tiles),
        [
            RatedSample(sample.skeleton, int(first), vectors)
            for sample, first, vectors in zip(encoded, first_tiles, rates, strict=False)
        ],
        **sizes,
    )


@torch.no_grad()
def dense_answer_logits(model, sample, compressed):
    """Return the logits of the answer tokens by the forward pass of transformers over one sequence."""
    skeleton, parts, answers = sample.skeleton, [], []
    tiles = iter(zip(torch.from_numpy(sample.pixels), compressed, strict=True))
    length = 0
    for token, is_answer in zip(skeleton.ids.tolist(), skeleton.answer.tolist(), strict=True):
        if token == model.settings.image_token_id:
            pixels, flag = next(tiles)
            features = model.vision_features(pixels.unsqueeze(0))
            parts.append((model.compressed_tokens if flag else model.full_tokens)(features)[0])
        else:
            parts.append(model.base.model.get_input_embeddings()(torch.tensor([token])))
        if is_answer:
            answers.append(length - 1)
        length += len(parts[-1])
    logits = model.base(inputs_embeds=torch.cat(parts).unsqueeze(0), use_cache=False).logits[0]
    return logits[answers]


def test_packed_losses_equal_one_dense_forward_each(case):
    policy, reference, encoded, rates = case
    packed = losses(*case)
    for sample, vectors, values in zip(encoded, rates, packed, strict=True):
        full = np.zeros(sample.skeleton.num_tiles, bool)
        target = dense_answer_logits(reference, sample, full).log_softmax(-1)
        assert values.dtype == np.float64 and len(values) == len(vectors)
        for compressed, value in zip(vectors, values, strict=True):
            log_policy = dense_answer_logits(policy, sample, compressed).log_softmax(-1)
            kl = F.kl_div(log_policy, target, log_target=True, reduction="sum") / len(target)
            assert value == pytest.approx(kl.item(), rel=1e-4, abs=1e-7)
        # compressing a tile changes the loss, otherwise the comparison would prove nothing
        assert sample.skeleton.num_tiles == 0 or np.ptp(values) > 1e-5


@pytest.mark.parametrize("row_tokens", [1, 60, 200, 10**6])
def test_shared_beginnings_change_no_loss(exact_case, row_tokens):
    """In float64 the losses are those of whole forward passes one by one, whatever the rows are."""
    policy, reference, encoded, rates = exact_case
    shared = losses(*exact_case, row_tokens=row_tokens)
    for sample, vectors, values in zip(encoded, rates, shared, strict=True):
        full = np.zeros(sample.skeleton.num_tiles, bool)
        target = dense_answer_logits(reference, sample, full).log_softmax(-1)
        for compressed, value in zip(vectors, values, strict=True):
            log_policy = dense_answer_logits(policy, sample, compressed).log_softmax(-1)
            kl = F.kl_div(log_policy, target, log_target=True, reduction="sum") / len(target)
            assert value == pytest.approx(kl.item(), rel=1e-9)


def test_the_language_model_computes_a_shared_beginning_once(case, monkeypatch):
    policy, reference, encoded, _ = case
    sample = encoded[SHAPES.index((4,))]
    one_at_a_time = [np.zeros(4, bool), *np.eye(4, dtype=bool)]
    num_tokens = {id(policy): 0, id(reference): 0}
    forward = type(policy).answer_hidden_states

    def counting(self, row, *arguments):
        num_tokens[id(self)] += len(row.input_ids)
        return forward(self, row, *arguments)

    monkeypatch.setattr(type(policy), "answer_hidden_states", counting)
    losses(policy, reference, [sample], [one_at_a_time], row_tokens=30)
    before = int(np.flatnonzero(sample.skeleton.ids == policy.settings.image_token_id)[0])
    text = sample.skeleton.num_text_tokens
    after = text - before
    branches = sum(1 + 4 * later + after for later in range(4))
    assert num_tokens[id(reference)] == text + 16
    assert num_tokens[id(policy)] == text + 16 + branches


def test_a_tower_that_both_models_have_runs_once(case):
    _, reference, encoded, _ = case
    policy, other = copy.deepcopy(reference), copy.deepcopy(reference)
    policy.add_compressed_connector(1)
    pixels = encoded[0].pixels
    apart = encoded_pair(policy, other, pixels, 2)
    assert share_tower(policy, other)
    tower, seen = policy.base.model.vision_tower, []
    assert other.base.model.vision_tower is tower
    hook = tower.register_forward_hook(lambda _, inputs, output: seen.append(len(output[0])))
    together = encoded_pair(policy, other, pixels, 2)
    hook.remove()
    assert sum(seen) == len(pixels)
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a.full_NFD, b.full_NFD)
    assert torch.equal(apart[0].compressed_NCD, together[0].compressed_NCD)
    changed = copy.deepcopy(reference)
    with torch.no_grad():
        next(changed.base.model.vision_tower.parameters()).view(-1)[0] += 1
    assert not share_tower(policy, changed)


def test_rows_chunks_and_batches_change_nothing(case):
    expected = losses(*case)
    for sizes in ({"row_tokens": 1}, {"row_tokens": 10**6, "kl_chunk_rows": 10**6}, {"batch_tiles": 1}):
        for a, b in zip(expected, losses(*case, **sizes), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_the_reference_has_no_loss_against_itself(case):
    _, reference, encoded, _ = case
    full = [[np.zeros(sample.skeleton.num_tiles, bool)] for sample in encoded]
    reference_losses = np.concatenate(losses(reference, reference, encoded, full))
    assert (reference_losses >= 0).all() and reference_losses.max() < 1e-6


def test_text_without_tiles_and_no_samples(case):
    policy, reference, encoded, rates = case
    text = [n for n, sample in enumerate(encoded) if not len(sample.pixels)]
    (values,) = losses(policy, reference, [encoded[text[0]]], [rates[text[0]]])
    assert len(values) == 1 and values[0] > 0
    tiles = encoded_tiles(policy, encoded[text[0]].pixels, 4)
    assert rate_losses(tiles, tiles, [], row_tokens=10, kl_chunk_rows=4) == []
