"""The consistency task: policy, frozen reference and loss as one small module (the engine wraps it whole)."""

# A answer tokens, D width, V vocabulary, N tiles, P vision tokens, v vision width

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from vico.model import VicoModel
from vico.packing import PackedBatch, PackedRow


class ReferenceStates(nn.Module):
    """The frozen reference as a module of its own: `forward(pack)` gives its answer hidden states [A, D]."""

    def __init__(self, model: VicoModel):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pack: PackedBatch) -> torch.Tensor:
        return answer_hidden_states(self.model, pack, pack.reference)[0]


def answer_hidden_states(
    model: VicoModel, pack: PackedBatch, row: PackedRow
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states [A, D] of the row's answers, a zero that keeps what the row does not use in the
    graph)."""
    features_NPv = model.vision_features(pack.pixel_values)
    full, compressed, tie = model.visual_tokens(features_NPv, row)
    # A pack without tiles runs the vision tower on its zero tile; the tie keeps that output in the graph.
    return model.answer_hidden_states(row, full, compressed), tie + features_NPv.sum() * 0


class ConsistencyTask(nn.Module):
    """`forward(pack)` gives the weighted sum of KL(reference || policy) over the pack's answer tokens.

    Only the policy's parameters are the module's: the reference is held outside of module registration, so no
    optimizer, state dict or partitioning touches it.
    """

    def __init__(
        self,
        policy: VicoModel,
        reference: VicoModel,
        kl_chunk_rows: int,
        shard: Callable[[nn.Module], Callable[[PackedBatch], torch.Tensor]] = lambda states: states,
        whole: Callable[[nn.Parameter], AbstractContextManager] = nullcontext,
    ):
        """`shard` may spread the reference's parameters over ranks; then `whole` makes one of them whole for
        a while."""
        super().__init__()
        self.policy = policy
        head = reference.lm_head.weight
        self._reference = (shard(ReferenceStates(reference)), head, whole)
        self.kl_chunk_rows = kl_chunk_rows

    def forward(self, pack: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """(loss sum, counts of the pack: summed KL in nats, answer tokens, samples, tiles, tokens of both
        rows)."""
        reference_states, reference_head_VD, whole = self._reference
        reference_hidden_AD = reference_states(pack)
        hidden_AD, tie = answer_hidden_states(self.policy, pack, pack.policy)
        with whole(reference_head_VD):
            loss, kl_A = self.policy.lm_head(
                hidden_AD, reference_hidden_AD, reference_head_VD, pack.weights_A, self.kl_chunk_rows
            )
        empty = not pack.rows
        counts = {
            "kl_sum": kl_A.sum(),
            "answer_tokens": float(len(kl_A)),
            "samples": float(len(pack.rows)),
            "tiles": float(pack.num_tiles),
            "compressed_tiles": float(pack.num_compressed),
            "policy_tokens": 0.0 if empty else float(sum(pack.policy.lengths)),
            "reference_tokens": 0.0 if empty else float(sum(pack.reference.lengths)),
            "packs": float(not empty),
        }
        return loss + tie.to(loss.dtype), counts
