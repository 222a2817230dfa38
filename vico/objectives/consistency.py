"""ViCO's first stage, consistency training: policy, frozen reference and loss as one module.

    L = E_rate [ 1/N sum_i KL( p_ref(y_i | y_<i, tiles at 1/4) || p_policy(y_i | y_<i, tiles at their rates)
    ) ]

over the N answer tokens y of a sample, teacher forced (arXiv 2510.12793). The rates are drawn when packs are
planned; the mean over tokens and samples is in the weights of `vico/packing.py`.

Shapes: N tiles, P vision tokens per tile, v vision width, A answer tokens, D language width, V vocabulary,
S samples of the pack.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from vico.errors import UserError
from vico.model.internvl import VicoModel
from vico.model.unread import values_of
from vico.objectives.flops import consistency_flops, row_work
from vico.objectives.phases import Phases
from vico.packing import PackedBatch, PackedRow

Counts = dict[str, torch.Tensor | float]


def check_same_start(policy: VicoModel, reference: VicoModel, num_token_ids: int | None = None) -> int:
    """Return the number of ids over which policy and reference are compared.

    Heads of equal size are compared over all their rows, padding included, as a server's softmax includes
    it too. Heads of different size are accepted if their surplus rows are padding: the `num_token_ids` of
    the tokenizer must fit into the smaller head. Rows beyond the smaller head then enter neither softmax
    and get no gradient. Raises UserError if the reference is not the policy's start model.
    """
    for field in ("tile_size", "vision_tokens", "tokens_full", "tokens_compressed", "image_token_id"):
        policy_value, reference_value = getattr(policy.settings, field), getattr(reference.settings, field)
        if policy_value != reference_value:
            raise UserError(
                f"reference: {field}={reference_value}, but the policy has {field}={policy_value}; give the "
                "model that the policy starts from"
            )
    policy_size, reference_size = policy.lm_head.out_features, reference.lm_head.out_features
    smaller = min(policy_size, reference_size)
    if policy_size != reference_size and (num_token_ids is None or num_token_ids > smaller):
        raise UserError(
            f"reference: vocab_size={reference_size}, but the policy has vocab_size={policy_size}; they "
            f"differ by more than padding (the tokenizer has {num_token_ids} ids); give the model that the "
            "policy starts from"
        )
    return smaller


def same_tower(policy: VicoModel, reference: VicoModel) -> bool:
    """Return whether both models have vision towers of equal weights."""
    own, other = (dict(model.base.model.vision_tower.named_parameters()) for model in (policy, reference))
    return own.keys() == other.keys() and all(
        torch.equal(values_of(own[name]), values_of(other[name])) for name in own
    )


class ReferenceStates(nn.Module):
    """The frozen reference as a module of its own, which returns hidden states of answers."""

    def __init__(self, model: VicoModel):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pack: PackedBatch, features_NPv: torch.Tensor | None = None) -> torch.Tensor:
        """Return the reference's answer hidden states [A, D].

        `features_NPv` are vision tokens of a tower that serves both models; None: the reference runs its
        own tower.
        """
        if features_NPv is None:
            features_NPv = self.model.vision_features(pack.tiles)
        return answer_hidden_states(self.model, features_NPv, pack.reference)[0]


def _no_reference(pack: PackedBatch, features_NPv: torch.Tensor | None = None) -> torch.Tensor:
    raise AssertionError("the reference was dropped, and a pack has no kept states of it")


def answer_hidden_states(
    model: VicoModel, features_NPv: torch.Tensor, row: PackedRow
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (hidden states [A, D] of the row's answers, a tie of zero for the loss).

    The tie keeps in the graph what the row does not use: a connector without tiles, and the vision tower's
    output on the tile of zeros of a pack without tiles.
    """
    full, compressed, tie = model.visual_tokens(features_NPv, row)
    return model.answer_hidden_states(row, full, compressed), tie + features_NPv.sum() * 0


class ConsistencyTask(nn.Module):
    """Computes the weighted sum of KL(reference || policy) over the answer tokens of a pack.

    Only the policy's parameters are registered. The reference is kept outside of module registration, so
    that no optimizer, state dict or partitioning includes it. If no parameter of the policy's vision tower
    needs a gradient and the reference has the same tower, one pass in eval mode serves both, and the
    reference's copy is dropped. A policy that continues an earlier training may have a tower of its own.
    `phases` may be replaced to time the parts of a step.
    """

    def __init__(
        self,
        policy: VicoModel,
        reference: VicoModel,
        kl_chunk_rows: int,
        shard: Callable[[nn.Module], Callable[..., torch.Tensor]] = lambda states: states,
        whole: Callable[[nn.Parameter], AbstractContextManager[object]] = nullcontext,
        num_token_ids: int | None = None,
        learns_answers: bool = False,
    ):
        """Raise UserError unless the reference is the policy's start model (`check_same_start`).

        `shard` may spread the reference's parameters over ranks; `whole` then gathers one of them within a
        context. With `learns_answers`, the loss in training mode is the cross entropy of the answer tokens,
        and the reference does not run.
        """
        super().__init__()
        self.num_ids = check_same_start(policy, reference, num_token_ids)
        self.policy = policy
        self.kl_chunk_rows = kl_chunk_rows
        self.phases = Phases()
        self.learns_answers = learns_answers
        tower = policy.base.model.vision_tower
        self.trains_vision = any(parameter.requires_grad for parameter in tower.parameters())
        self.one_vision_pass = not self.trains_vision and same_tower(policy, reference)
        if not self.trains_vision:
            tower.eval()
        if self.one_vision_pass:
            reference.base.model.vision_tower = None
        head = reference.lm_head.weight
        assert isinstance(head, nn.Parameter)
        self._reference = (
            shard(ReferenceStates(reference)),
            head,
            whole,
        )  # a tuple: modules in it stay unregistered

    def train(self, mode: bool = True) -> "ConsistencyTask":
        """Set the training mode; a frozen vision tower stays in eval mode, as the reference uses it too."""
        super().train(mode)
        if not self.trains_vision:
            self.policy.base.model.vision_tower.eval()
        return self

    def forward(self, pack: PackedBatch, by_sample: bool = False) -> tuple[torch.Tensor, Counts]:
        """Return (loss sum, counts of the pack); divide the loss by the weight of the whole global batch.

        Counts: summed KL (with `learns_answers` in training: cross entropy) in nats, answer tokens, samples,
        tiles, tokens of both rows, FLOPs. `by_sample` adds `kl_S`, the summed KL of each sample.
        """
        if self.learns_answers and self.training:
            return self._of_answers(pack)
        reference_states, reference_head_VD, whole = self._reference
        features_NPv = self._frozen_features(pack)
        reference_hidden_AD = pack.reference_hidden_AD
        if reference_hidden_AD is None:
            with self.phases.phase("reference"):
                reference_hidden_AD = reference_states(pack, features_NPv)
        if features_NPv is None:
            features_NPv = self._policy_features(pack)  # after the reference: fewer activations exist at once
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
        counts = self._counts(pack, kl_A, ran_reference=pack.reference_hidden_AD is None)
        if by_sample:
            kl_S = kl_A.new_zeros(len(pack.rows))
            counts["kl_S"] = kl_S.index_add(0, pack.sample_of_answer, kl_A)
        return loss + tie.to(loss.dtype), counts

    def reference_hidden(self, pack: PackedBatch) -> torch.Tensor:
        """Return the reference's hidden states at the answers of a pack, [A, D]."""
        reference_states, _, _ = self._reference
        return reference_states(pack, self._frozen_features(pack))

    def drop_reference(self) -> None:
        """Free the reference except its head: from now on every pack has `reference_hidden_AD`."""
        self._reference = (_no_reference, *self._reference[1:])

    def _of_answers(self, pack: PackedBatch) -> tuple[torch.Tensor, Counts]:
        """Return what `forward` does for the loss against the answer tokens."""
        with torch.set_grad_enabled(self.trains_vision and torch.is_grad_enabled()):
            features_NPv = self._policy_features(pack)
        with self.phases.phase("language"):
            hidden_AD, tie = answer_hidden_states(self.policy, features_NPv, pack.policy)
        with self.phases.phase("loss"):
            loss, loss_A = self.policy.lm_head(
                hidden_AD,
                weights_A=pack.weights_A,
                chunk_rows=self.kl_chunk_rows,
                num_ids=self.num_ids,
                answer_ids_A=pack.policy.answer_ids,
            )
        return loss + tie.to(loss.dtype), self._counts(pack, loss_A, ran_reference=False)

    @torch.no_grad()
    def _frozen_features(self, pack: PackedBatch) -> torch.Tensor | None:
        """Return the vision tokens that serve both models; None if each runs its own tower."""
        return self._policy_features(pack) if self.one_vision_pass else None

    def _policy_features(self, pack: PackedBatch) -> torch.Tensor:
        if pack.has_features:
            assert self.one_vision_pass, "kept features are those of a frozen tower that serves both models"
            return pack.tiles
        with self.phases.phase("vision"):
            return self.policy.vision_features(pack.tiles)

    def _counts(self, pack: PackedBatch, kl_A: torch.Tensor, *, ran_reference: bool) -> Counts:
        empty = not pack.rows
        return {
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
                0 if pack.has_features else pack.num_tiles,
                row_work(pack.policy),
                row_work(pack.reference),
                train_vision=self.trains_vision,
                with_reference=ran_reference,
            ),
        }
