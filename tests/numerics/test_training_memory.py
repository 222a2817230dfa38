"""The memory model's activations are the bytes that autograd keeps, counted with saved-tensor hooks; its
sum is what torch's allocator counts."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.saved_bytes import POLICIES, counted, counting_shape, rows_of
from tests.waiting import PATIENCE_S
from vico.memory.training_memory import saved_language_bytes, saved_vision_bytes

TOKENS, TILES = 256, 2
WIDTHS = {  # (vision, text) in the proportions of a published model, and in others
    "published": (
        {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4},
        {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
    "other": (
        {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 4},
        {
            "hidden_size": 192,
            "intermediate_size": 1000,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 48,
        },
    ),
}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_layer_keeps_what_the_model_of_memory_says(tmp_path, widths, dtype, checkpointing):
    shape = replace(counting_shape(TOKENS, TILES, dtype.itemsize), checkpointing=checkpointing)
    few, many = (counted(tmp_path / str(layers), WIDTHS[widths], layers, shape) for layers in (1, 3))
    for part, model_of in (("vision", saved_vision_bytes), ("language", saved_language_bytes)):
        expected = model_of(many.sizes, shape) - model_of(few.sizes, shape)
        assert getattr(many, part) - getattr(few, part) == pytest.approx(expected, rel=0.02), part


@pytest.mark.slow
@pytest.mark.parametrize("widths", ["1B", "8B"])
def test_the_memory_model_is_within_10_percent_at_real_widths(widths):
    rows = rows_of(widths, counting_shape(1024, 2), (2, 4))
    assert {row["checkpointing"] for row in rows} == set(POLICIES)
    for row in rows:
        assert row["ratio"] == pytest.approx(1, abs=0.1), row
        assert row["ratio_per_layer"] == pytest.approx(1, abs=0.05), row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_experts_keeps_a_copy_of_each_token_per_expert(tmp_path, dtype):
    experts = {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "intermediate_size": 768,
        "moe_intermediate_size": 96,
        "num_experts": 16,
        "num_experts_per_tok": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    shape = counting_shape(TOKENS, TILES, dtype.itemsize)
    few, many = (
        counted(tmp_path / str(layers), (WIDTHS["published"][0], experts), layers, shape) for layers in (1, 3)
    )
    expected = saved_language_bytes(many.sizes, shape) - saved_language_bytes(few.sizes, shape)
    assert many.language - few.language == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_the_memory_of_a_whole_update_is_within_10_percent():
    """Weights, optimizer, gradients and DeepSpeed's buffers, as torch's allocator counts them."""
    command = [sys.executable, "-m", "benchmarks.step_memory", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=2 * PATIENCE_S)
    rows = json.loads(ended.stdout.splitlines()[-1])["rows"]
    assert {(row["zero_stage"], row["offload"]) for row in rows} >= {
        (1, "none"),
        (2, "optimizer"),
        (3, "none"),
    }
    for row in rows:
        assert row["ratio"] == pytest.approx(1, abs=0.1), row
