"""The consistency task: policy, frozen reference and loss as one small module (the engine wraps it whole)."""

import torch
from torch import nn

from vico.model import VicoModel
from vico.packing import PackedBatch


class ConsistencyTask(nn.Module):
    """`forward(pack)` gives the weighted sum of KL(reference || policy) over the pack's answer tokens.

    Only the policy's parameters are the module's: the reference is held outside of module registration, so no
    optimizer, state dict or partitioning touches it.
    """

    def __init__(self, policy: VicoModel, reference: VicoModel, kl_chunk_rows: int):
        super().__init__()
        self.policy = policy
        self._reference = (reference.eval().requires_grad_(False),)
        self.kl_chunk_rows = kl_chunk_rows

    @property
    def reference(self) -> VicoModel:
        return self._reference[0]

    def forward(self, pack: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """(loss sum, counts of the pack: summed KL in nats, answer tokens, samples, tiles, tokens of both
        rows)."""
        with torch.no_grad():
            reference_hidden_AD = self._answer_hidden_states(self.reference, pack, pack.reference)[0]
        hidden_AD, tie = self._answer_hidden_states(self.policy, pack, pack.policy)
        loss, kl_A = self.policy.lm_head(
            hidden_AD, reference_hidden_AD, self.reference.lm_head.weight, pack.weights_A, self.kl_chunk_rows
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

    @staticmethod
    def _answer_hidden_states(model: VicoModel, pack: PackedBatch, row) -> tuple[torch.Tensor, torch.Tensor]:
        features_NPv = model.vision_features(pack.pixel_values)
        full, compressed, tie = model.visual_tokens(features_NPv, row)
        # A pack without tiles runs the vision tower on its zero tile; the tie keeps that output in the graph.
        return model.answer_hidden_states(row, full, compressed), tie + features_NPv.sum() * 0
