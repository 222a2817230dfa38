"""One model over many tiles at many rates: visual tokens are computed once, then reused for any rate vectors.

The ratio stage compresses one tile after another with it; evaluation compares rate vectors.

Shapes: N tiles, T tiles of a sample, S tile side in pixels, F tokens of a tile at the full rate, C at the
compressed rate, A answer tokens, L tokens, D language width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vico.inference.branches import KeptTokens, RatedSample, plan_of, rows_of
from vico.losses import chunked_kl
from vico.model.internvl import VicoModel
from vico.model.shared_keys import SharedKeys
from vico.objectives.consistency import same_tower
from vico.packing import PackedRow, TiledSequence, packed_row
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

    def answers_by_sequence(
        self, sequences: Sequence[TiledSequence], shared_keys: SharedKeys | None = None
    ) -> list[torch.Tensor]:
        """Return the hidden states [A, D] that predict the answer tokens of each sequence, computed as one
        packed row."""
        row = packed_row(sequences, self.model.settings).to(self.device)
        hidden_AD = self.model.answer_hidden_states(row, *self._row_tokens(row), shared_keys)
        return list(hidden_AD.split(row.num_answers))

    def embeddings(self, sequences: Sequence[TiledSequence]) -> list[torch.Tensor]:
        """Return the input embeddings [L, D] of each sequence."""
        row = packed_row(sequences, self.model.settings).to(self.device)
        return list(self.model.embedded_row(row, *self._row_tokens(row)).split(row.lengths))


def encoded_tiles(model: VicoModel, pixels_N3SS: np.ndarray, batch_tiles: int) -> EncodedTiles:
    """Run vision tower and connectors over tiles uint8 [N, 3, S, S], about `batch_tiles` at a time."""
    (tiles,) = _encoded([model], pixels_N3SS, batch_tiles)
    return tiles


def encoded_pair(
    policy: VicoModel, reference: VicoModel, pixels_N3SS: np.ndarray, batch_tiles: int
) -> tuple[EncodedTiles, EncodedTiles]:
    """Return the tiles of both models. A tower that they share (`share_tower`) runs once."""
    policy_tiles, reference_tiles = _encoded([policy, reference], pixels_N3SS, batch_tiles)
    return policy_tiles, reference_tiles


def share_tower(policy: VicoModel, reference: VicoModel) -> bool:
    """Give the reference the policy's vision tower if both have equal weights, and return whether they have.

    So one pass serves both, and one copy is freed: a consistency training may freeze the tower.
    """
    if not same_tower(policy, reference):
        return False
    reference.base.model.vision_tower = policy.base.model.vision_tower
    return True


@torch.no_grad()
def _encoded(models: Sequence[VicoModel], pixels_N3SS: np.ndarray, batch_tiles: int) -> list[EncodedTiles]:
    batches = np.array_split(pixels_N3SS, max(-(-len(pixels_N3SS) // batch_tiles), 1))
    full: list[list[torch.Tensor]] = [[] for _ in models]
    compressed: list[list[torch.Tensor]] = [[] for _ in models]
    for batch in batches:
        features_NPv, tower = None, None
        for number, model in enumerate(models):
            if features_NPv is None or model.base.model.vision_tower is not tower:
                features_NPv, tower = _features(model, batch), model.base.model.vision_tower
            full[number].append(model.full_tokens(features_NPv))
            if model.compressed_connector is not None:
                compressed[number].append(model.compressed_tokens(features_NPv))
    return [
        EncodedTiles(
            model, torch.cat(full[number]), torch.cat(parts) if (parts := compressed[number]) else None
        )
        for number, model in enumerate(models)
    ]


def _features(model: VicoModel, pixels_N3SS: np.ndarray) -> torch.Tensor:
    """Return the vision tokens [N, P, v] of a batch, which may have no tiles."""
    weight = model.lm_head.weight
    if not len(pixels_N3SS):
        return weight.new_zeros(0, model.settings.vision_tokens, model.vision_width)
    return model.vision_features(torch.from_numpy(pixels_N3SS).to(weight.device))


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
    rates), in nats; rounding errors below zero become 0. The language model computes a beginning that several
    rate vectors of a sample share once (`vico/inference/branches.py`), in rows of about `row_tokens` tokens.
    Every sample needs an answer token.
    """
    expected = _reference_answers(reference, samples, row_tokens)
    plan = plan_of(samples, policy.model.settings)
    kept = KeptTokens()
    kl_by_branch: list[np.ndarray] = []
    for row in rows_of(plan.branches, row_tokens):
        branches = [plan.branches[number] for number in row.branches]
        shared_keys = kept.next_row(plan.branches, row, policy.device)
        hidden = policy.answers_by_sequence([branch.sequence for branch in branches], shared_keys)
        targets = [expected[branch.sample][branch.num_earlier_answers :] for branch in branches]
        kl_A = _token_kl(policy.model, torch.cat(hidden), reference.model, torch.cat(targets), kl_chunk_rows)
        own = np.split(kl_A.double().cpu().numpy(), np.cumsum([len(part) for part in hidden])[:-1])
        for branch, own_kl in zip(branches, own, strict=True):
            if branch.parent is not None:
                own_kl = np.concatenate([kl_by_branch[branch.parent][: branch.num_earlier_answers], own_kl])
            kl_by_branch.append(own_kl)
    losses = [max(float(kl_A.mean()), 0.0) for kl_A in kl_by_branch]
    return [np.array([losses[number] for number in numbers]) for numbers in plan.branch_of]


def _reference_answers(
    reference: EncodedTiles, samples: Sequence[RatedSample], row_tokens: int
) -> list[torch.Tensor]:
    """Return the reference's hidden states [A, D] of each sample at the full rate."""
    full_rate = [sample.at_full_rate() for sample in samples]
    rows = _rows(full_rate, reference.model.settings, row_tokens)
    return [answers for row in rows for answers in reference.answers_by_sequence(row)]


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
