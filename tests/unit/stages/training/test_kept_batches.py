"""Batches of validations are decoded once, up to a limit of memory."""

from dataclasses import dataclass

import torch

from stages.training.kept_batches import KeptBatches


@dataclass
class Row:
    ids: torch.Tensor


@dataclass
class Batch:
    row: Row
    pixels: torch.Tensor
    loss_weight: float = 1.0


def test_a_batch_is_decoded_once_and_one_beyond_the_limit_each_time():
    decoded = []

    def decode(name, num_bytes):
        decoded.append(name)
        return Batch(Row(torch.zeros(100, dtype=torch.uint8)), torch.zeros(num_bytes, dtype=torch.uint8))

    kept = KeptBatches(limit_bytes=1000)
    first = kept.get("a", lambda: decode("a", 700))
    assert kept.get("a", lambda: decode("a", 700)) is first
    for _ in range(2):
        kept.get("b", lambda: decode("b", 150))  # 250 bytes with its row: 50 too many
    kept.get("c", lambda: decode("c", 50))
    kept.get("c", lambda: decode("c", 50))
    assert decoded == ["a", "b", "b", "c"]
