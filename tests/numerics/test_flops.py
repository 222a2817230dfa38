"""The FLOPs formula equals what torch counts in the matrix products of a real step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.numerics.consistency_case import consistency_task, samples
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.objectives.consistency import ConsistencyTask
from vico.objectives.flops import consistency_flops, row_work, sft_flops
from vico.packing import packed_batch
from vico.prompt import load_prompt_format

RELATIVE = 2e-3  # the rotary angles are products too, and not in the formula


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("flops") / "m")


@pytest.fixture(scope="module")
def pack(folder):
    prompt_format = load_prompt_format(folder)
    chosen = [samples(prompt_format, number, shape) for number, shape in enumerate([(3,), (2, 4), ()])]
    random = np.random.default_rng(5)
    rates = [random.random(sample.skeleton.num_tiles) < 0.5 for sample in chosen]
    return packed_batch(chosen, rates, prompt_format.settings, "sample")


def in_place_product(_sum, left, right, **_):
    return 2 * left[0] * left[1] * right[1]


def counted(step) -> int:
    # torch counts the products inside SDPA's plain implementation, not the CPU's flash kernel
    products = {torch.ops.aten.addmm_: in_place_product}  # it does not count this one
    with FlopCounterMode(display=False, custom_mapping=products) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def work(row):
    """Return the row's work with the zero tile that each connector also runs; the formula leaves it out."""
    row_only = row_work(row)
    return replace(
        row_only, full_tiles=row_only.full_tiles + 1, compressed_tiles=row_only.compressed_tiles + 1
    )


@pytest.mark.parametrize("train_vision", [True, False])
def test_consistency_step(folder, pack, train_vision):
    task = consistency_task(folder)
    if not train_vision:
        task.policy.base.model.vision_tower.requires_grad_(False)
        task = ConsistencyTask(task.policy, load_model(folder), 5)
    reference = replace(work(pack.reference), compressed_tiles=0)  # it has no compressed connector
    expected = consistency_flops(
        task.policy.base.config,
        pack.num_tiles,
        work(pack.policy),
        reference,
        train_vision=train_vision,
        causal=False,
    )
    assert counted(lambda: task(pack)[0].backward()) == pytest.approx(expected, rel=RELATIVE)


def test_sft_step(folder, pack):
    model = load_model(folder)
    expected = sft_flops(
        model.base.config,
        pack.num_tiles,
        replace(work(pack.reference), compressed_tiles=0),
        causal=False,
    )

    def step():
        full, _, tie = model.visual_tokens(model.vision_features(pack.tiles), pack.reference)
        logits = model.lm_head(model.answer_hidden_states(pack.reference, full, None))
        (torch.nn.functional.cross_entropy(logits, pack.reference.answer_ids) + tie).backward()

    assert counted(step) == pytest.approx(expected, rel=RELATIVE)


def test_causal_attention_counts_half_of_its_pairs(folder, pack):
    config, row = load_model(folder).base.config, row_work(pack.policy)
    whole, half = (sft_flops(config, pack.num_tiles, row, causal=causal) for causal in (False, True))
    text = config.text_config
    pairs = sum(length * length for length in row.lengths)
    products = 2 * 2 * pairs * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    assert whole - half == pytest.approx(3 * products / 2)


def test_an_empty_pack_asks_for_nothing(folder):
    settings = load_prompt_format(folder).settings
    empty = packed_batch([], [], settings, "sample")
    config = load_model(folder).base.config
    assert consistency_flops(config, 0, row_work(empty.policy), row_work(empty.reference)) == 0
