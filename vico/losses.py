"""KL(reference || policy) over both language model heads together, in chunks: logits never stand whole."""

# A answer tokens, V vocabulary, D width

import torch
from torch import nn


class ChunkedKL(torch.autograd.Function):
    """Weighted sum of per-token KL with its gradients computed in the forward pass, chunk by chunk.

    The weight of every token is known before the forward (`weights_A`), so d loss / d logits = w
    (softmax(policy) - softmax(reference)) can be folded into the gradients of hidden states and head while
    a chunk's logits exist: each head is used once a direction, and peak memory is chunk x V.
    """

    @staticmethod
    def forward(ctx, hidden_AD, weight_VD, reference_hidden_AD, reference_weight_VD, weights_A, chunk_rows):
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden_AD = torch.zeros_like(hidden_AD) if need_hidden else None
        # fp32 accumulation: with bf16 weights the sum over chunks would lose what a single product keeps
        dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else None
        kl_A = hidden_AD.new_zeros(len(hidden_AD), dtype=dtype)
        for start in range(0, len(hidden_AD), chunk_rows):
            rows = slice(start, start + chunk_rows)
            kl_A[rows], difference = _chunk_kl(
                hidden_AD[rows] @ weight_VD.T, reference_hidden_AD[rows] @ reference_weight_VD.T
            )
            if not (need_hidden or need_weight):
                continue
            grad_logits = (difference * weights_A[rows, None]).to(hidden_AD.dtype)
            if need_hidden:
                grad_hidden_AD[rows] = grad_logits @ weight_VD
            if need_weight:
                grad_weight_VD += grad_logits.T @ hidden_AD[rows]
        ctx.save_for_backward(grad_hidden_AD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(kl_A)
        return (kl_A * weights_A).sum(), kl_A

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden_AD, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_AD is not None:
            grad_hidden_AD = grad_hidden_AD * grad_loss.to(grad_hidden_AD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_loss).to(ctx.weight_dtype)
        return grad_hidden_AD, grad_weight_VD, None, None, None, None


def _chunk_kl(
    logits_CV: torch.Tensor, reference_logits_CV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL [C], softmax(policy) - softmax(reference) [C, V]) of one chunk, float32 or better."""
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    log_policy = logits_CV.to(dtype).log_softmax(-1)
    log_reference = reference_logits_CV.to(dtype).log_softmax(-1)
    reference = log_reference.exp()
    kl_C = (reference * (log_reference - log_policy)).sum(-1)
    return kl_C, log_policy.exp_().sub_(reference)


def chunked_kl(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    reference_hidden_AD: torch.Tensor,
    reference_weight_VD: torch.Tensor,
    weights_A: torch.Tensor,
    chunk_rows: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_A weights * KL(reference || policy), KL of each token [A] in nats without gradient).

    Exact: equal to `F.kl_div` over dense log-softmaxes in loss and gradients (of `hidden_AD` and
    `weight_VD`); ViCO equation of the consistency loss. Raises ValueError where the vocabularies differ.
    """
    if weight_VD.shape[0] != reference_weight_VD.shape[0]:
        raise ValueError(
            f"policy vocabulary {weight_VD.shape[0]} and reference vocabulary "
            f"{reference_weight_VD.shape[0]} differ"
        )
    if not torch.is_grad_enabled():  # else the gradient of the head would be computed for nobody
        hidden_AD, weight_VD = hidden_AD.detach(), weight_VD.detach()
    return ChunkedKL.apply(
        hidden_AD, weight_VD, reference_hidden_AD, reference_weight_VD, weights_A, chunk_rows
    )


class KLHead(nn.Linear):
    """The LM head as a module that can also give the consistency loss: under ZeRO-3 its weight is only whole
    inside its own forward and backward, so the loss has to live here."""

    def forward(
        self, hidden_AD, reference_hidden_AD=None, reference_weight_VD=None, weights_A=None, chunk_rows=256
    ):
        """Logits without a reference; with one, the pair of `chunked_kl`."""
        if reference_hidden_AD is None:
            return super().forward(hidden_AD)
        return chunked_kl(
            hidden_AD, self.weight, reference_hidden_AD, reference_weight_VD, weights_A, chunk_rows
        )
