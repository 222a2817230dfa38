"""Samples packed into one long row: token ids, where tiles' tokens go, which hidden states predict answers.

A pack holds two rows over the same tiles, the policy's (tiles at their rates) and the reference's (all at
the full rate); answer tokens of both line up one to one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from vico.prompt import Skeleton
from vico.settings import ModelSettings

LOSS_REDUCTIONS = ("sample", "token", "square")


@dataclass(frozen=True)
class EncodedSample:
    """One sample ready to pack: `pixels` float32 [T, 3, S, S], its skeleton, and its place in the index."""

    key: str
    row: int
    skeleton: Skeleton
    pixels: np.ndarray
    tiles_per_image: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackedRow:
    """Sequences end to end in one row of L tokens.

    `full_tiles` and `compressed_tiles` are numbers of tiles of the pack (a tile may be used by several
    sequences); their tokens go, in that order, to `full_slots` and `compressed_slots`. `answer_index` [A]
    is the position whose hidden state predicts an answer token, `answer_ids` [A] that token. All int64
    tensors but `lengths`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    full_tiles: torch.Tensor
    full_slots: torch.Tensor
    compressed_tiles: torch.Tensor
    compressed_slots: torch.Tensor
    answer_index: torch.Tensor
    answer_ids: torch.Tensor

    def to(self, device: torch.device | str) -> "PackedRow":
        return _moved(self, device)


@dataclass(frozen=True)
class PackedBatch:
    """A pack for one micro-step: `pixel_values` float32 [max(N, 1), 3, S, S] and both rows.

    `weights_A` float32 weighs the KL of each answer token, `loss_weight` is what the pack adds to the
    denominator of the global batch; a pack without tiles holds one zero tile, an empty pack one token and
    no answer.
    """

    pixel_values: torch.Tensor
    policy: PackedRow
    reference: PackedRow
    weights_A: torch.Tensor
    loss_weight: float
    sample_of_answer: torch.Tensor
    rows: tuple[int, ...]
    num_tiles: int
    num_compressed: int

    def to(self, device: torch.device | str) -> "PackedBatch":
        return replace(
            _moved(self, device), policy=self.policy.to(device), reference=self.reference.to(device)
        )


def _moved(packed, device):
    tensors = {f.name: getattr(packed, f.name) for f in fields(packed)}
    return replace(
        packed, **{n: t.to(device, non_blocking=True) for n, t in tensors.items() if torch.is_tensor(t)}
    )


def token_weights(num_answer_tokens: int, reduction: str) -> tuple[float, float]:
    """(weight of each answer token, the sample's share of the denominator) for a sample of N answer tokens.

    sample: 1/N and 1 (ViCO's formula); token: 1 and N; square: N^-1/2 and N^1/2 (InternVL's SFT). N = 0
    weighs nothing.
    """
    n = num_answer_tokens
    if n == 0:
        return 0.0, 0.0
    if reduction == "sample":
        return 1.0 / n, 1.0
    if reduction == "token":
        return 1.0, float(n)
    if reduction == "square":
        return n**-0.5, n**0.5
    raise ValueError(f"loss_reduction={reduction!r} is none of {', '.join(LOSS_REDUCTIONS)}")


def packed_row(sequences: Sequence[tuple[Skeleton, np.ndarray, int]], settings: ModelSettings) -> PackedRow:
    """The row of `(skeleton, compressed bool [T], number of its first tile)` sequences, in order.

    Positions restart with every sequence. An empty list gives a row of one token that answers nothing.
    """
    ids, positions, lengths, answers = [], [], [], []
    tiles, slots, rates = [], [], []
    offset = 0
    for skeleton, compressed, first_tile in sequences:
        is_tile = skeleton.ids == settings.image_token_id
        widths = np.ones(len(skeleton.ids), np.int64)
        widths[is_tile] = np.where(compressed, settings.tokens_compressed, settings.tokens_full)
        starts = offset + np.cumsum(widths) - widths
        ids.append(np.repeat(skeleton.ids, widths))
        length = int(widths.sum())
        positions.append(np.arange(length))
        lengths.append(length)
        answers.append(np.stack([starts[skeleton.answer] - 1, skeleton.ids[skeleton.answer]]))
        tiles.append(first_tile + np.arange(len(compressed)))
        slots.append(starts[is_tile])
        rates.append(np.asarray(compressed, bool))
        offset += length
    if not sequences:
        ids, positions, lengths = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [1]
    tile, slot, rate = (np.concatenate([np.zeros(0, np.int64), *part]) for part in (tiles, slots, rates))
    answer = np.concatenate([np.zeros((2, 0), np.int64), *answers], axis=1)
    rate = rate.astype(bool)
    return PackedRow(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        lengths=tuple(lengths),
        full_tiles=torch.from_numpy(tile[~rate]),
        full_slots=_widened(slot[~rate], settings.tokens_full),
        compressed_tiles=torch.from_numpy(tile[rate]),
        compressed_slots=_widened(slot[rate], settings.tokens_compressed),
        answer_index=torch.from_numpy(answer[0].copy()),
        answer_ids=torch.from_numpy(answer[1].copy()),
    )


def _widened(slots: np.ndarray, tokens: int) -> torch.Tensor:
    """First positions of tiles -> positions of all their tokens, int64 [len(slots) * tokens]."""
    return torch.from_numpy((slots[:, None] + np.arange(tokens)).reshape(-1))


def packed_batch(
    samples: Sequence[EncodedSample],
    compressed: Sequence[np.ndarray],
    settings: ModelSettings,
    reduction: str,
) -> PackedBatch:
    """One pack of samples with the rate of every tile (`compressed`, bool [T] a sample)."""
    first_tiles = np.cumsum([0, *(sample.skeleton.num_tiles for sample in samples)])
    skeletons = [sample.skeleton for sample in samples]
    full = [np.zeros(skeleton.num_tiles, bool) for skeleton in skeletons]
    weights = [token_weights(skeleton.num_answer_tokens, reduction) for skeleton in skeletons]
    counts = [skeleton.num_answer_tokens for skeleton in skeletons]
    num_tiles = int(first_tiles[-1])
    size = settings.tile_size
    pixels = (
        np.concatenate([sample.pixels for sample in samples if len(sample.pixels)]) if num_tiles else None
    )
    return PackedBatch(
        pixel_values=torch.zeros(1, 3, size, size) if pixels is None else torch.from_numpy(pixels),
        policy=packed_row(list(zip(skeletons, compressed, first_tiles, strict=False)), settings),
        reference=packed_row(list(zip(skeletons, full, first_tiles, strict=False)), settings),
        weights_A=torch.from_numpy(np.repeat(np.float32([w for w, _ in weights]), counts)),
        loss_weight=float(sum(share for _, share in weights)),
        sample_of_answer=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        rows=tuple(sample.row for sample in samples),
        num_tiles=num_tiles,
        num_compressed=int(sum(int(np.sum(flags)) for flags in compressed)),
    )
