"""Pack samples into one long row: token ids, slots of the tiles' tokens, positions that predict answers.

A pack has two rows over the same tiles: the policy's, with each tile at its own rate, and the reference's,
with all tiles at the full rate. The answer tokens of both rows correspond one to one.

Shapes: N tiles of a pack, T tiles of a sample, S tile side in pixels, L tokens of a row, A answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from vico.prompt import Skeleton
from vico.settings import ModelSettings

LOSS_REDUCTIONS = ("sample", "token", "square")


@dataclass(frozen=True)
class EncodedText:
    """The text of a sample as its skeleton, with a placeholder per tile, and its row number in the index."""

    key: str
    row: int
    skeleton: Skeleton


@dataclass(frozen=True)
class EncodedSample(EncodedText):
    """One sample ready to pack: its text and `pixels` uint8 [T, 3, S, S]."""

    pixels: np.ndarray
    tiles_per_image: tuple[int, ...] = ()


class TiledSequence(NamedTuple):
    """A sequence at given rates: `compressed` bool [T], and the number of its first tile.

    Only the tokens from position `start` on enter a row; the earlier ones are computed elsewhere.
    """

    skeleton: Skeleton
    compressed: np.ndarray
    first_tile: int
    start: int = 0

    def token_starts(self, settings: ModelSettings) -> np.ndarray:
        """Return the position of each token of the skeleton in the sequence, and its end, int64 [L + 1].

        L are the tokens of the skeleton; a tile is one of them.
        """
        widths = np.ones(len(self.skeleton.ids), np.int64)
        is_tile = self.skeleton.ids == settings.image_token_id
        widths[is_tile] = np.where(self.compressed, settings.tokens_compressed, settings.tokens_full)
        return np.concatenate([[0], np.cumsum(widths)])


@dataclass(frozen=True)
class PackedRow:
    """Sequences end to end in one row of L tokens; all tensors are int64.

    `full_tiles` and `compressed_tiles` number tiles of the pack; several sequences may use the same tile.
    Their tokens go, in that order, to the positions `full_slots` and `compressed_slots`. `answer_index` [A]
    holds the positions whose hidden states predict answer tokens, `answer_ids` [A] those tokens. `lengths`
    are the tokens of each sequence, `num_answers` its answer tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    num_answers: tuple[int, ...]
    full_tiles: torch.Tensor
    full_slots: torch.Tensor
    compressed_tiles: torch.Tensor
    compressed_slots: torch.Tensor
    answer_index: torch.Tensor
    answer_ids: torch.Tensor

    def to(self, device: torch.device | str) -> "PackedRow":
        """Return a copy with all tensors on `device`."""
        return replace(self, **_tensors_on(self, device))


@dataclass(frozen=True)
class PackedBatch:
    """A pack for one micro-step: its tiles and both rows.

    `tiles` holds pixels, uint8 [max(N, 1), 3, S, S], or kept vision features, [max(N, 1), P, v].
    `reference_hidden_AD` are the reference's kept hidden states at the answers; None: it has to run.
    `weights_A` float32 weights the KL of each answer token, and `loss_weight` is what the pack adds to the
    denominator of the global batch. `sample_of_answer` int64 [A] is the number, within the pack, of the
    sample of each answer token. A pack without tiles has one tile of zeros; an empty pack has one token and
    no answer.
    """

    tiles: torch.Tensor
    policy: PackedRow
    reference: PackedRow
    weights_A: torch.Tensor
    loss_weight: float
    sample_of_answer: torch.Tensor
    rows: tuple[int, ...]
    num_tiles: int
    num_compressed: int
    reference_hidden_AD: torch.Tensor | None = None

    @property
    def has_features(self) -> bool:
        """Whether `tiles` are vision features."""
        return self.tiles.ndim == 3

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return a copy with all tensors, those of both rows included, on `device`."""
        policy, reference = self.policy.to(device), self.reference.to(device)
        return replace(self, policy=policy, reference=reference, **_tensors_on(self, device))


# Any: `replace` would compare the value's type with the types of all fields
def _tensors_on(packed: PackedRow | PackedBatch, device: torch.device | str) -> dict[str, Any]:
    values = {field.name: getattr(packed, field.name) for field in fields(packed)}
    return {
        name: value.to(device, non_blocking=True) for name, value in values.items() if torch.is_tensor(value)
    }


def token_weights(num_answer_tokens: int, reduction: str) -> tuple[float, float]:
    """Return (weight of each answer token, the sample's part of the denominator) for N answer tokens.

    `sample`: 1 / N and 1, the formula of the ViCO paper. `token`: 1 and N. `square`: N^-1/2 and N^1/2, as in
    InternVL's SFT. Both are 0 for N = 0.
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
    raise ValueError(f"loss_reduction={reduction!r} is not one of {', '.join(LOSS_REDUCTIONS)}")


def packed_row(sequences: Sequence[TiledSequence], settings: ModelSettings) -> PackedRow:
    """Return the row of `sequences`, in order, each from its `start` on.

    Positions restart with every sequence and are those of the whole sequence. Without sequences the row has
    one token and no answer.
    """
    ids, positions, lengths, answers = [], [], [], []
    tiles, slots, rates = [], [], []
    offset = 0
    for sequence in sequences:
        skeleton, bounds = sequence.skeleton, sequence.token_starts(settings)
        own = slice(int(np.searchsorted(bounds, sequence.start)), None)
        starts, widths = bounds[:-1][own], np.diff(bounds)[own]
        is_tile = skeleton.ids == settings.image_token_id
        tile_numbers = np.cumsum(is_tile)[own][is_tile[own]] - 1
        shift = offset - sequence.start
        ids.append(np.repeat(skeleton.ids[own], widths))
        positions.append(np.arange(sequence.start, bounds[-1]))
        lengths.append(int(bounds[-1]) - sequence.start)
        answer_starts = bounds[:-1][skeleton.answer]
        is_own = answer_starts > sequence.start  # the token before it predicts an answer token
        answers.append(np.stack([answer_starts[is_own] - 1 + shift, skeleton.ids[skeleton.answer][is_own]]))
        tiles.append(sequence.first_tile + tile_numbers)
        slots.append(starts[is_tile[own]] + shift)
        rates.append(np.asarray(sequence.compressed, bool)[tile_numbers])
        offset += lengths[-1]
    if not sequences:
        ids, positions, lengths = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [1]
    tile, slot, rate = (np.concatenate([np.zeros(0, np.int64), *part]) for part in (tiles, slots, rates))
    answer = np.concatenate([np.zeros((2, 0), np.int64), *answers], axis=1)
    rate = rate.astype(bool)
    return PackedRow(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        lengths=tuple(lengths),
        num_answers=tuple(part.shape[1] for part in answers) or (0,),
        full_tiles=torch.from_numpy(tile[~rate]),
        full_slots=_all_slots(slot[~rate], settings.tokens_full),
        compressed_tiles=torch.from_numpy(tile[rate]),
        compressed_slots=_all_slots(slot[rate], settings.tokens_compressed),
        answer_index=torch.from_numpy(answer[0].copy()),
        answer_ids=torch.from_numpy(answer[1].copy()),
    )


def _all_slots(first_slots: np.ndarray, tokens_per_tile: int) -> torch.Tensor:
    """Return the positions of all tokens of the tiles that start at `first_slots`, int64 [tiles * tokens]."""
    return torch.from_numpy((first_slots[:, None] + np.arange(tokens_per_tile)).reshape(-1))


def packed_batch(
    samples: Sequence[EncodedSample],
    compressed: Sequence[np.ndarray],
    settings: ModelSettings,
    reduction: str,
) -> PackedBatch:
    """Return one pack of samples; `compressed` holds the rate of every tile, bool [T] per sample."""
    pixels = [sample.pixels for sample in samples if len(sample.pixels)]
    size = settings.tile_size
    tiles = (
        torch.from_numpy(np.concatenate(pixels))
        if pixels
        else torch.zeros(1, 3, size, size, dtype=torch.uint8)
    )
    return packed_texts(samples, tiles, compressed, settings, reduction)


def packed_texts(
    samples: Sequence[EncodedText],
    tiles: torch.Tensor,
    compressed: Sequence[np.ndarray],
    settings: ModelSettings,
    reduction: str,
) -> PackedBatch:
    """Return `packed_batch` with these `tiles`, pixels or features of all samples in order."""
    first_tiles = np.cumsum([0, *(sample.skeleton.num_tiles for sample in samples)]).tolist()
    skeletons = [sample.skeleton for sample in samples]
    all_full = [np.zeros(skeleton.num_tiles, bool) for skeleton in skeletons]
    weights = [token_weights(skeleton.num_answer_tokens, reduction) for skeleton in skeletons]
    num_answers = [skeleton.num_answer_tokens for skeleton in skeletons]
    num_tiles = first_tiles[-1]
    policy, reference = (
        [TiledSequence(*parts) for parts in zip(skeletons, rates, first_tiles[:-1], strict=True)]
        for rates in (compressed, all_full)
    )
    return PackedBatch(
        tiles=tiles,
        policy=packed_row(policy, settings),
        reference=packed_row(reference, settings),
        weights_A=torch.from_numpy(
            np.repeat(np.array([weight for weight, _ in weights], np.float32), num_answers)
        ),
        loss_weight=float(sum(share for _, share in weights)),
        sample_of_answer=torch.from_numpy(np.repeat(np.arange(len(samples)), num_answers)),
        rows=tuple(sample.row for sample in samples),
        num_tiles=num_tiles,
        num_compressed=int(sum(int(np.sum(flags)) for flags in compressed)),
    )
