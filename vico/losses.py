"""ViCO's consistency loss: KL(reference || policy) over the vocabulary, without ever holding all logits.

    KL_a = sum_v p_ref(v) (log p_ref(v) - log p_policy(v))        for each answer token a

The loss is the weighted sum of KL_a; `vico/packing.py` computes the weights. Both language model heads run
together, chunk by chunk. With the answer tokens themselves as the reference (all probability on one token),
the KL is their cross entropy, and no reference runs.

Shapes: A answer tokens, V rows of a head (token ids, then padding), D language width, C rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

# Rows whose float32 copies exist at once, per CPU thread. Few, so that they stay in the cache and the
# allocator reuses the same pages; not fewer, or threads wait for each other at every block. On CUDA the
# whole chunk is one block, as more kernel launches would cost more.
_CPU_BLOCK_ROWS = 32
# Rows of the head whose product is added at once when the sum has another dtype than the product.
_HEAD_SLICE = 16384


class _Gradients(NamedTuple):
    """Gradients of the loss, None if not needed; the head's is float32 (float64 of float64)."""

    hidden_AD: torch.Tensor | None
    weight_VD: torch.Tensor | None


class _Context(FunctionCtx):
    """What autograd keeps between forward and backward."""

    needs_input_grad: tuple[bool, ...]
    gradients: _Gradients | None
    weight_dtype: torch.dtype


class ChunkedKL(torch.autograd.Function):
    """The weighted sum of KL per token; the forward pass also computes its gradients, chunk by chunk.

    The weight w of every token is known before the forward pass, so d loss / d logits = w (softmax(policy)
    - softmax(reference)) goes into the gradients of hidden states and head while the logits of a chunk
    exist. Each head is used once per direction.

    Memory beside the gradients: two chunks of logits. On a CPU they have the models' dtype, with float32
    copies of 32 rows per thread. On CUDA they are float32, as bfloat16 keeps logits of 20 only to 0.06 and
    the difference of two near distributions would be mostly rounding; the chunk's gradient is one more
    buffer in the models' dtype. The head's gradient is summed in float32 (its own buffer for a float32
    model, one more for a bfloat16 model).

    The gradients are returned once: a second backward pass over the same graph raises RuntimeError.
    """

    # nine parameters: `Function.apply` passes its arguments as they are, tensors must be arguments of
    # their own
    @staticmethod
    def forward(
        ctx: _Context,
        hidden_AD: torch.Tensor,
        weight_VD: torch.Tensor,
        reference_hidden_AD: torch.Tensor | None,
        reference_weight_VD: torch.Tensor | None,
        answer_ids_A: torch.Tensor | None,
        weights_A: torch.Tensor,
        chunk_rows: int,
        num_ids: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The sum over chunks is float32: in bfloat16 it would lose what a single product keeps.
        dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        gradients = _Gradients(
            torch.zeros_like(hidden_AD) if ctx.needs_input_grad[0] else None,
            torch.zeros_like(weight_VD, dtype=dtype) if ctx.needs_input_grad[1] else None,
        )
        head_VD = weight_VD[:num_ids]
        kl_A = hidden_AD.new_zeros(len(hidden_AD), dtype=dtype)
        buffer_rows = min(chunk_rows, len(hidden_AD))
        logits_dtype = dtype if hidden_AD.is_cuda else hidden_AD.dtype
        policy_CV = hidden_AD.new_empty(buffer_rows, num_ids, dtype=logits_dtype)
        reference_CV = None if reference_hidden_AD is None else torch.empty_like(policy_CV)
        in_place = logits_dtype == hidden_AD.dtype
        gradient_CV = policy_CV if in_place else hidden_AD.new_empty(buffer_rows, num_ids)
        for start in range(0, len(hidden_AD), chunk_rows):
            hidden_CD = hidden_AD[start : start + chunk_rows]
            rows, chunk = slice(start, start + len(hidden_CD)), slice(len(hidden_CD))
            _write_logits(hidden_CD, head_VD, policy_CV[chunk])
            if reference_CV is None or reference_hidden_AD is None or reference_weight_VD is None:
                assert answer_ids_A is not None
                kl_A[rows] = _cross_entropy_and_gradient(
                    policy_CV[chunk], answer_ids_A[rows], weights_A[rows], gradient_CV[chunk]
                )
            else:
                _write_logits(reference_hidden_AD[rows], reference_weight_VD[:num_ids], reference_CV[chunk])
                kl_A[rows] = _kl_and_gradient(
                    policy_CV[chunk], reference_CV[chunk], weights_A[rows], gradient_CV[chunk]
                )
            if gradients.hidden_AD is not None:
                torch.mm(gradient_CV[chunk], head_VD, out=gradients.hidden_AD[rows])
            if gradients.weight_VD is not None:
                _add_product(gradients.weight_VD[:num_ids], gradient_CV[chunk].T, hidden_CD)
        ctx.gradients, ctx.weight_dtype = gradients, weight_VD.dtype
        ctx.mark_non_differentiable(kl_A)
        return (kl_A * weights_A).sum(), kl_A

    @staticmethod
    def backward(
        ctx: _Context, grad_loss: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this KL were handed out already; run its forward again")
        (grad_hidden_AD, grad_weight_VD), ctx.gradients = ctx.gradients, None
        if grad_hidden_AD is not None:
            grad_hidden_AD.mul_(grad_loss)
        if grad_weight_VD is not None:  # in place: another [V, D] would be the largest buffer of the step
            grad_weight_VD = grad_weight_VD.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden_AD, grad_weight_VD, None, None, None, None, None, None


def _write_logits(hidden_CD: torch.Tensor, head_VD: torch.Tensor, logits_CV: torch.Tensor) -> None:
    """Write the logits to `logits_CV`, whose dtype may be wider than that of its factors (CUDA only)."""
    if logits_CV.dtype == hidden_CD.dtype:
        torch.mm(hidden_CD, head_VD.T, out=logits_CV)
    else:
        torch.mm(hidden_CD, head_VD.T, out_dtype=logits_CV.dtype, out=logits_CV)


def _kl_and_gradient(
    logits_CV: torch.Tensor,
    reference_logits_CV: torch.Tensor,
    weights_C: torch.Tensor,
    gradient_CV: torch.Tensor,
) -> torch.Tensor:
    """Return the KL [C] of a chunk, float32 (float64 of float64), and write the gradient to `gradient_CV`.

    The gradient of the logits is w (softmax(policy) - softmax(reference)). `gradient_CV` may be `logits_CV`.
    """
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    if logits_CV.is_cuda and dtype == torch.float32:
        from vico.kl_kernel import kl_and_gradient  # only CUDA builds of torch bring Triton

        return kl_and_gradient(logits_CV, reference_logits_CV, weights_C, gradient_CV)
    kl_C = logits_CV.new_empty(len(logits_CV), dtype=dtype)
    block_rows = len(logits_CV) if logits_CV.is_cuda else _CPU_BLOCK_ROWS * torch.get_num_threads()
    for start in range(0, len(logits_CV), block_rows):
        rows = slice(start, start + block_rows)
        log_policy = logits_CV[rows].to(dtype).log_softmax(-1)
        log_reference = reference_logits_CV[rows].to(dtype).log_softmax(-1)
        reference = log_reference.exp()
        kl_C[rows] = log_reference.sub_(log_policy).mul_(reference).sum(-1)
        gradient_CV[rows] = log_policy.exp_().sub_(reference).mul_(weights_C[rows, None])
    return kl_C


def _cross_entropy_and_gradient(
    logits_CV: torch.Tensor, answer_ids_C: torch.Tensor, weights_C: torch.Tensor, gradient_CV: torch.Tensor
) -> torch.Tensor:
    """Return the cross entropy [C] of a chunk, float32 (float64 of float64), and write the gradient.

    The gradient of the logits is w (softmax(policy) - one-hot). `gradient_CV` may be `logits_CV`.
    """
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    loss_C = logits_CV.new_empty(len(logits_CV), dtype=dtype)
    block_rows = len(logits_CV) if logits_CV.is_cuda else _CPU_BLOCK_ROWS * torch.get_num_threads()
    for start in range(0, len(logits_CV), block_rows):
        rows = slice(start, start + block_rows)
        ids_C1 = answer_ids_C[rows, None]
        log_policy = logits_CV[rows].to(dtype).log_softmax(-1)
        loss_C[rows] = -log_policy.gather(1, ids_C1)[:, 0]
        gradient = log_policy.exp_()
        gradient.scatter_add_(1, ids_C1, gradient.new_full((), -1).expand_as(ids_C1))
        gradient_CV[rows] = gradient.mul_(weights_C[rows, None])
    return loss_C


def _add_product(sum_VD: torch.Tensor, grad_logits_VC: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """Add grad_logits_VC @ hidden_CD to `sum_VD` without another [V, D] buffer."""
    if sum_VD.dtype == hidden_CD.dtype:
        sum_VD.addmm_(grad_logits_VC, hidden_CD)
        return
    if sum_VD.is_cuda:  # one product that adds in float32, without rounding to bfloat16 first
        torch.addmm(sum_VD, grad_logits_VC, hidden_CD, out_dtype=sum_VD.dtype, out=sum_VD)
        return
    for start in range(0, len(sum_VD), _HEAD_SLICE):
        rows = slice(start, start + _HEAD_SLICE)
        sum_VD[rows] += grad_logits_VC[rows] @ hidden_CD


# seven parameters: flat tensors, like the losses of torch, TRL and liger-kernel that it replaces
def chunked_kl(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    reference_hidden_AD: torch.Tensor,
    reference_weight_VD: torch.Tensor,
    weights_A: torch.Tensor,
    chunk_rows: int = 256,
    num_ids: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of weights_A * KL(reference || policy), KL of each token [A] in nats without gradient).

    Exact: loss and gradients (of `hidden_AD` and `weight_VD`) equal those of `F.kl_div` over dense
    log-softmaxes. Source: the consistency loss of the ViCO paper, arXiv 2510.12793.

    Only the first `num_ids` rows of both heads are token ids; later rows are padding, which enters neither
    softmax and gets a zero gradient. None: all rows are ids. Raises ValueError if the heads then differ in
    size, or if `num_ids` exceeds the smaller head.
    """
    sizes = len(weight_VD), len(reference_weight_VD)
    if num_ids is None and sizes[0] != sizes[1]:
        raise ValueError(f"policy vocabulary {sizes[0]} and reference vocabulary {sizes[1]} differ")
    num_ids = sizes[0] if num_ids is None else num_ids
    if num_ids > min(sizes):
        raise ValueError(f"num_ids={num_ids} is more than the {min(sizes)} rows of the smaller head")
    if not torch.is_grad_enabled():  # otherwise the forward pass would compute a gradient that nobody uses
        hidden_AD, weight_VD = hidden_AD.detach(), weight_VD.detach()
    return ChunkedKL.apply(
        hidden_AD, weight_VD, reference_hidden_AD, reference_weight_VD, None, weights_A, chunk_rows, num_ids
    )


def chunked_cross_entropy(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    answer_ids_A: torch.Tensor,
    weights_A: torch.Tensor,
    chunk_rows: int = 256,
    num_ids: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of weights_A * cross entropy, cross entropy of each token [A] in nats without gradient).

    The loss of SFT, computed like `chunked_kl`: the reference has all probability on the answer's token,
    int64 [A]. Only the first `num_ids` rows of the head are token ids (None: all).
    """
    num_ids = len(weight_VD) if num_ids is None else num_ids
    if not torch.is_grad_enabled():
        hidden_AD, weight_VD = hidden_AD.detach(), weight_VD.detach()
    return ChunkedKL.apply(hidden_AD, weight_VD, None, None, answer_ids_A, weights_A, chunk_rows, num_ids)


class KLHead(nn.Linear):
    """The language model head, which can also compute the consistency loss.

    Under ZeRO-3 its weight is whole only inside its own forward and backward pass, so the loss is computed
    here.
    """

    def forward(  # type: ignore[override]  # it also takes the reference, and then returns a pair
        self,
        hidden_AD: torch.Tensor,
        reference_hidden_AD: torch.Tensor | None = None,
        reference_weight_VD: torch.Tensor | None = None,
        weights_A: torch.Tensor | None = None,
        chunk_rows: int = 256,
        num_ids: int | None = None,
        answer_ids_A: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return logits [A, V], with a reference the pair that `chunked_kl` returns, with answers that of
        `chunked_cross_entropy`."""
        if answer_ids_A is not None:
            assert weights_A is not None
            return chunked_cross_entropy(hidden_AD, self.weight, answer_ids_A, weights_A, chunk_rows, num_ids)
        if reference_hidden_AD is None:
            return super().forward(hidden_AD)
        assert reference_weight_VD is not None and weights_A is not None
        return chunked_kl(
            hidden_AD, self.weight, reference_hidden_AD, reference_weight_VD, weights_A, chunk_rows, num_ids
        )
