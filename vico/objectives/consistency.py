"""The consistency task: policy, frozen reference and loss as one small module (the engine wraps it whole)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from vico.errors import UserError
from vico.model.internvl import VicoModel
from vico.objectives.flops import consistency_flops, row_work
from vico.objectives.phases import Phases
from vico.packing import PackedBatch, PackedRow


def check_same_start(policy: VicoModel, reference: VicoModel, num_token_ids: int | None = None) -> int:
    """The number of ids over which policy and reference are compared; UserError where the reference is not
    the policy's start model.

    Heads of one size are compared over all their rows, padding included, as a server takes its softmax.
    Heads of different size agree where the surplus rows are padding: `num_token_ids` (ids of the tokenizer)
    have to fit into the smaller one. Then rows past the smaller head enter neither softmax, and get no
    gradient.
    """
    for field in ("tile_size", "vision_tokens", "tokens_full", "tokens_compressed", "image_token_id"):
        mine, theirs = getattr(policy.settings, field), getattr(reference.settings, field)
        if mine != theirs:
            raise UserError(
                f"reference: {field}={theirs}, but the policy has {field}={mine}; the reference has to be "
                "the model that the policy starts from"
            )
    sizes = policy.lm_head.out_features, reference.lm_head.out_features
    if sizes[0] != sizes[1] and (num_token_ids is None or num_token_ids > min(sizes)):
        raise UserError(
            f"reference: vocab_size={sizes[1]}, but the policy has vocab_size={sizes[0]}, which differs by "
            f"more than padding (the tokenizer has {num_token_ids} ids); give the model that the policy "
            "starts from"
        )
    return min(sizes)


class ReferenceStates(nn.Module):
    """The frozen reference as a module of its own: `forward(pack, features)` gives its answer hidden states
    [A, D], from vision tokens [N, P, v] of a tower that serves policy and reference, or from its own."""

    def __init__(self, model: VicoModel):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pack: PackedBatch, features_NPv: torch.Tensor | None = None) -> torch.Tensor:
        if features_NPv is None:
            features_NPv = self.model.vision_features(pack.pixel_values)
        return answer_hidden_states(self.model, features_NPv, pack.reference)[0]


def answer_hidden_states(
    model: VicoModel, features_NPv: torch.Tensor, row: PackedRow
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states [A, D] of the row's answers, a zero that keeps what the row does not use in the
    graph)."""
    full, compressed, tie = model.visual_tokens(features_NPv, row)
    # A pack without tiles runs the vision tower on its zero tile; the tie keeps that output in the graph.
    return model.answer_hidden_states(row, full, compressed), tie + features_NPv.sum() * 0


class ConsistencyTask(nn.Module):
    """`forward(pack)` gives the weighted sum of KL(reference || policy) over the pack's answer tokens.

    Only the policy's parameters are the module's: the reference is held outside of module registration, so no
    optimizer, state dict or partitioning touches it. `phases` may be replaced to time the parts.

    Where no parameter of the policy's vision tower needs a gradient, the tower is still the reference's: one
    pass in eval mode serves both, and the reference's own copy is dropped.
    """

    def __init__(
        self,
        policy: VicoModel,
        reference: VicoModel,
        kl_chunk_rows: int,
        shard: Callable[[nn.Module], Callable[..., torch.Tensor]] = lambda states: states,
        whole: Callable[[nn.Parameter], AbstractContextManager] = nullcontext,
        num_token_ids: int | None = None,
    ):
        """`shard` may spread the reference's parameters over ranks; then `whole` makes one of them whole for
        a while. `num_token_ids` as in `check_same_start`."""
        super().__init__()
        self.num_ids = check_same_start(policy, reference, num_token_ids)
        self.policy = policy
        self.kl_chunk_rows = kl_chunk_rows
        self.phases = Phases()
        tower = policy.base.model.vision_tower
        self.one_vision_pass = not any(parameter.requires_grad for parameter in tower.parameters())
        if self.one_vision_pass:
            tower.eval()
            reference.base.model.vision_tower = None
        head = reference.lm_head.weight
        self._reference = (shard(ReferenceStates(reference)), head, whole)

    def train(self, mode: bool = True) -> "ConsistencyTask":
        """A frozen vision tower stays in eval mode: it is the reference's too."""
        super().train(mode)
        if self.one_vision_pass:
            self.policy.base.model.vision_tower.eval()
        return self

    def forward(
        self, pack: PackedBatch, by_sample: bool = False
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """(loss sum, counts of the pack: summed KL in nats, answer tokens, samples, tiles, tokens of both
        rows); `by_sample` adds `kl_S`, the summed KL of each sample."""
        reference_states, reference_head_VD, whole = self._reference
        if self.one_vision_pass:
            with torch.no_grad():
                features_NPv = self._policy_features(pack)
            reference_features = (features_NPv,)
        else:
            reference_features = ()
        with self.phases.phase("reference"):
            reference_hidden_AD = reference_states(pack, *reference_features)
        if not self.one_vision_pass:  # after the reference: no activation of the policy stands meanwhile
            features_NPv = self._policy_features(pack)
        with self.phases.phase("language"):
            hidden_AD, tie = answer_hidden_states(self.policy, features_NPv, pack.policy)
        with self.phases.phase("loss"), whole(reference_head_VD):
            loss, kl_A = self.policy.lm_head(
                hidden_AD,
                reference_hidden_AD,
                reference_head_VD,
                pack.weights_A,
                self.kl_chunk_rows,
                self.num_ids,
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
            "flops": consistency_flops(
                self.policy.base.config,
                pack.num_tiles,
                row_work(pack.policy),
                row_work(pack.reference),
                train_vision=not self.one_vision_pass,
            ),
        }
        if by_sample:
            kl_S = kl_A.new_zeros(len(pack.rows))
            counts["kl_S"] = kl_S.index_add(0, pack.sample_of_answer, kl_A)
        return loss + tie.to(loss.dtype), counts

    def _policy_features(self, pack: PackedBatch) -> torch.Tensor:
        with self.phases.phase("vision"):
            return self.policy.vision_features(pack.pixel_values)
