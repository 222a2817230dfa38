"""One model over many tiles at many rates: visual tokens are computed once, then reused for any rate vectors.

The ratio stage compresses one tile after another with it; evaluation compares rate vectors.

Shapes: N tiles, T tiles of a sample, S tile side in pixels, F tokens of a tile at the full rate, C at the
compressed rate, A answer tokens, L tokens, D language width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vico.losses import chunked_kl
from vico.model.internvl import VicoModel
from vico.packing import PackedRow, TiledSequence, packed_row
from vico.prompt import Skeleton
from vico.settings import ModelSettings


@dataclass(frozen=True)
class EncodedTiles:
    """A model with its visual tokens of N tiles; `compressed_NCD` is None without a compressed connector."""

    model: VicoModel
    full_NFD: torch.Tensor
    compressed_NCD: torch.Tensor | None

    @property
    def device(self) -> torch.device:
        """The device of the visual tokens."""
        return self.full_NFD.device

    def _row_tokens(self, row: PackedRow) -> tuple[torch.Tensor, torch.Tensor | None]:
        compressed = None if self.compressed_NCD is None else self.compressed_NCD[row.compressed_tiles]
        return self.full_NFD[row.full_tiles], compressed

    def answer_hidden_states(self, row: PackedRow) -> torch.Tensor:
        """Return the hidden states [A, D] that predict the row's answer tokens."""
        return self.model.answer_hidden_states(row, *self._row_tokens(row))

    def embeddings(self, sequences: Sequence[TiledSequence]) -> list[torch.Tensor]:
        """Return the input embeddings [L, D] of each sequence."""
        row = packed_row(sequences, self.model.settings).to(self.device)
        return list(self.model.embedded_row(row, *self._row_tokens(row)).split(row.lengths))


@torch.no_grad()
def encoded_tiles(model: VicoModel, pixels_N3SS: np.ndarray, batch_tiles: int) -> EncodedTiles:
    """Run vision tower and connectors over tiles uint8 [N, 3, S, S], `batch_tiles` at a time."""
    weight = model.lm_head.weight
    full = [weight.new_zeros(0, model.settings.tokens_full, model.language_width)]
    compressed = [weight.new_zeros(0, model.settings.tokens_compressed, model.language_width)]
    for start in range(0, len(pixels_N3SS), batch_tiles):
        pixels = torch.from_numpy(pixels_N3SS[start : start + batch_tiles]).to(weight.device)
        features_NPv = model.vision_features(pixels)
        full.append(model.full_tokens(features_NPv))
        if model.compressed_connector is not None:
            compressed.append(model.compressed_tokens(features_NPv))
    return EncodedTiles(
        model, torch.cat(full), None if model.compressed_connector is None else torch.cat(compressed)
    )


@dataclass(frozen=True)
class RatedSample:
    """A sample whose encoded tiles start at `first_tile`, and rate vectors (compressed, bool [T] each)."""

    skeleton: Skeleton
    first_tile: int
    rates: Sequence[np.ndarray]

    def sequences(self) -> list[TiledSequence]:
        """Return the sample's sequence at each rate vector."""
        return [TiledSequence(self.skeleton, compressed, self.first_tile) for compressed in self.rates]

    def at_full_rate(self) -> TiledSequence:
        """Return the sample's sequence with all tiles at the full rate."""
        return TiledSequence(self.skeleton, np.zeros(self.skeleton.num_tiles, bool), self.first_tile)


@torch.no_grad()
def rate_losses(
    policy: EncodedTiles,
    reference: EncodedTiles,
    samples: Sequence[RatedSample],
    *,
    row_tokens: int,
    kl_chunk_rows: int,
) -> list[np.ndarray]:
    """Return ViCO's loss of each sample at each of its rate vectors, one float64 array per sample.

    The loss is the mean over the sample's answer tokens of KL(reference at the full rate || policy at the
    rates), in nats; rounding errors below zero become 0. Sequences are packed into rows of about
    `row_tokens` tokens. Every sample needs an answer token.
    """
    full_rate = [sample.at_full_rate() for sample in samples]
    reference_hidden = [
        part
        for row in _rows(full_rate, reference.model.settings, row_tokens)
        for part in _answers_by_sequence(reference, row)
    ]
    sample_numbers = [n for n, sample in enumerate(samples) for _ in sample.rates]
    sequences = [sequence for sample in samples for sequence in sample.sequences()]
    losses: list[float] = []
    for row in _rows(sequences, policy.model.settings, row_tokens):
        hidden = _answers_by_sequence(policy, row)
        expected = [reference_hidden[n] for n in sample_numbers[len(losses) : len(losses) + len(row)]]
        kl_A = _token_kl(policy.model, torch.cat(hidden), reference.model, torch.cat(expected), kl_chunk_rows)
        means = [part.double().mean() for part in kl_A.split([len(part) for part in hidden])]
        losses += torch.stack(means).clamp_min(0).tolist()
    bounds = np.cumsum([len(sample.rates) for sample in samples])[:-1]
    return np.split(np.asarray(losses, np.float64), bounds) if samples else []


def _token_kl(
    policy: VicoModel,
    hidden_AD: torch.Tensor,
    reference: VicoModel,
    reference_hidden_AD: torch.Tensor,
    kl_chunk_rows: int,
) -> torch.Tensor:
    weights_A = torch.ones(len(hidden_AD), device=hidden_AD.device)
    heads = policy.lm_head.weight, reference.lm_head.weight
    num_ids = min(map(len, heads))  # `check_same_start` made sure that further rows are padding
    _, kl_A = chunked_kl(
        hidden_AD, heads[0], reference_hidden_AD, heads[1], weights_A, kl_chunk_rows, num_ids
    )
    return kl_A


def _answers_by_sequence(tiles: EncodedTiles, sequences: Sequence[TiledSequence]) -> list[torch.Tensor]:
    """Return the answer hidden states [A, D] of each sequence, computed as one packed row."""
    row = packed_row(sequences, tiles.model.settings).to(tiles.device)
    num_answers = [sequence.skeleton.num_answer_tokens for sequence in sequences]
    return list(tiles.answer_hidden_states(row).split(num_answers))


def num_tokens(sequence: TiledSequence, settings: ModelSettings) -> int:
    """Return the number of tokens of a sequence at its rates."""
    num_compressed = int(np.sum(sequence.compressed))
    num_full = sequence.skeleton.num_tiles - num_compressed
    visual = num_full * settings.tokens_full + num_compressed * settings.tokens_compressed
    return sequence.skeleton.num_text_tokens + visual


def _rows(
    sequences: Sequence[TiledSequence], settings: ModelSettings, row_tokens: int
) -> Iterator[list[TiledSequence]]:
    """Yield rows of sequences, in order, of at most `row_tokens`; a longer sequence gets its own row."""
    row: list[TiledSequence] = []
    filled = 0
    for sequence in sequences:
        tokens = num_tokens(sequence, settings)
        if row and filled + tokens > row_tokens:
            yield row
            row, filled = [], 0
        row.append(sequence)
        filled += tokens
    if row:
        yield row
