"""KL(reference || policy) over both language model heads together, in chunks: logits never stand whole."""

import torch
from torch import nn

# Rows of a chunk whose float32 copies stand at once, for each thread. On a CPU few, so that they stay in the
# cache and the allocator gives the same pages again, but not so few that threads wait for each other at every
# turn; on CUDA the whole chunk, where more launches would cost more.
_CPU_BLOCK_ROWS = 32
# Rows of the head whose product is added in one go where the sum is kept in another dtype than the product.
_HEAD_SLICE = 16384


class ChunkedKL(torch.autograd.Function):
    """Weighted sum of per-token KL with its gradients computed in the forward pass, chunk by chunk.

    The weight of every token is known before the forward (`weights_A`), so d loss / d logits = w
    (softmax(policy) - softmax(reference)) can be folded into the gradients of hidden states and head while
    a chunk's logits exist: each head is used once a direction. Beside the gradients stand two chunks of
    logits, on a CPU in the models' dtype with float32 copies of 32 rows a thread; on CUDA in float32, since
    the difference of two near distributions is mostly rounding where logits of 20 are kept to 0.06, and
    one chunk of its gradient in the models' dtype. The gradient of the head is summed in float32 (that is its
    own buffer where the model is float32, and one more where it is bfloat16). Gradients are handed out
    once: a second backward over the same graph raises RuntimeError.
    """

    @staticmethod
    def forward(
        ctx, hidden_AD, weight_VD, reference_hidden_AD, reference_weight_VD, weights_A, chunk_rows, num_ids
    ):
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden_AD = torch.zeros_like(hidden_AD) if need_hidden else None
        # fp32 accumulation: with bf16 weights the sum over chunks would lose what a single product keeps
        dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else None
        head_VD, reference_head_VD = weight_VD[:num_ids], reference_weight_VD[:num_ids]
        kl_A = hidden_AD.new_zeros(len(hidden_AD), dtype=dtype)
        most_rows = min(chunk_rows, len(hidden_AD))
        wide = dtype if hidden_AD.is_cuda else hidden_AD.dtype
        policy_CV = hidden_AD.new_empty(most_rows, num_ids, dtype=wide)
        reference_CV = hidden_AD.new_empty(most_rows, num_ids, dtype=wide)
        in_place = wide == hidden_AD.dtype
        gradient_CV = policy_CV if in_place else hidden_AD.new_empty(most_rows, num_ids)
        for start in range(0, len(hidden_AD), chunk_rows):
            chunk_AD = hidden_AD[start : start + chunk_rows]
            rows, chunk = slice(start, start + len(chunk_AD)), slice(len(chunk_AD))
            _logits(chunk_AD, head_VD, policy_CV[chunk])
            _logits(reference_hidden_AD[rows], reference_head_VD, reference_CV[chunk])
            kl_A[rows] = _kl_and_gradient(
                policy_CV[chunk], reference_CV[chunk], weights_A[rows], gradient_CV[chunk]
            )
            if need_hidden:
                torch.mm(gradient_CV[chunk], head_VD, out=grad_hidden_AD[rows])
            if need_weight:
                _add_product(grad_weight_VD[:num_ids], gradient_CV[chunk].T, chunk_AD)
        ctx.gradients = (grad_hidden_AD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(kl_A)
        return (kl_A * weights_A).sum(), kl_A

    @staticmethod
    def backward(ctx, grad_loss, _):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this KL were handed out already; run its forward again")
        (grad_hidden_AD, grad_weight_VD), ctx.gradients = ctx.gradients, None
        if grad_hidden_AD is not None:
            grad_hidden_AD.mul_(grad_loss)
        if grad_weight_VD is not None:  # in place: another [V, D] would be the largest buffer of the step
            grad_weight_VD = grad_weight_VD.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden_AD, grad_weight_VD, None, None, None, None, None


def _logits(hidden_CD: torch.Tensor, head_VD: torch.Tensor, logits_CV: torch.Tensor) -> None:
    """Writes `logits_CV`, which may be wider than what it is made of (CUDA only)."""
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
    """KL [C] of a chunk in float32 (float64 of float64); `gradient_CV`, which may be `logits_CV`, then holds
    w (softmax(policy) - softmax(reference))."""
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    if logits_CV.is_cuda and dtype == torch.float32:
        from vico.kl_kernel import kl_and_gradient  # Triton comes with torch's CUDA builds alone

        return kl_and_gradient(logits_CV, reference_logits_CV, weights_C, gradient_CV)
    kl_C = logits_CV.new_empty(len(logits_CV), dtype=dtype)
    block = len(logits_CV) if logits_CV.is_cuda else _CPU_BLOCK_ROWS * torch.get_num_threads()
    for start in range(0, len(logits_CV), block):
        rows = slice(start, start + block)
        log_policy = logits_CV[rows].to(dtype).log_softmax(-1)
        log_reference = reference_logits_CV[rows].to(dtype).log_softmax(-1)
        reference = log_reference.exp()
        kl_C[rows] = log_reference.sub_(log_policy).mul_(reference).sum(-1)
        gradient_CV[rows] = log_policy.exp_().sub_(reference).mul_(weights_C[rows, None])
    return kl_C


def _add_product(sum_VD: torch.Tensor, grad_logits_VC: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """sum_VD += grad_logits_VC @ hidden_CD, without another [V, D] beside it."""
    if sum_VD.dtype == hidden_CD.dtype:
        sum_VD.addmm_(grad_logits_VC, hidden_CD)
        return
    if sum_VD.is_cuda:  # one product that adds in float32 and rounds nothing to bfloat16 on its way
        torch.addmm(sum_VD, grad_logits_VC, hidden_CD, out_dtype=sum_VD.dtype, out=sum_VD)
        return
    for start in range(0, len(sum_VD), _HEAD_SLICE):
        rows = slice(start, start + _HEAD_SLICE)
        sum_VD[rows] += grad_logits_VC[rows] @ hidden_CD


def chunked_kl(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    reference_hidden_AD: torch.Tensor,
    reference_weight_VD: torch.Tensor,
    weights_A: torch.Tensor,
    chunk_rows: int = 256,
    num_ids: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_A weights * KL(reference || policy), KL of each token [A] in nats without gradient).

    Exact: equal to `F.kl_div` over dense log-softmaxes in loss and gradients (of `hidden_AD` and
    `weight_VD`); ViCO equation of the consistency loss. `num_ids`: only the first so many rows of both
    heads are ids, what follows is padding; it enters neither softmax and gets the gradient zero. Without it
    all rows are ids, and ValueError is raised where the heads differ in their number.
    """
    sizes = len(weight_VD), len(reference_weight_VD)
    if num_ids is None and sizes[0] != sizes[1]:
        raise ValueError(f"policy vocabulary {sizes[0]} and reference vocabulary {sizes[1]} differ")
    num_ids = sizes[0] if num_ids is None else num_ids
    if num_ids > min(sizes):
        raise ValueError(f"num_ids={num_ids} is more than the {min(sizes)} rows of the smaller head")
    if not torch.is_grad_enabled():  # else the gradient of the head would be computed for nobody
        hidden_AD, weight_VD = hidden_AD.detach(), weight_VD.detach()
    return ChunkedKL.apply(
        hidden_AD, weight_VD, reference_hidden_AD, reference_weight_VD, weights_A, chunk_rows, num_ids
    )


class KLHead(nn.Linear):
    """The LM head as a module that can also give the consistency loss: under ZeRO-3 its weight is only whole
    inside its own forward and backward, so the loss has to live here."""

    def forward(
        self,
        hidden_AD,
        reference_hidden_AD=None,
        reference_weight_VD=None,
        weights_A=None,
        chunk_rows=256,
        num_ids=None,
    ):
        """Logits without a reference; with one, the pair of `chunked_kl`."""
        if reference_hidden_AD is None:
            return super().forward(hidden_AD)
        return chunked_kl(
            hidden_AD, self.weight, reference_hidden_AD, reference_weight_VD, weights_A, chunk_rows, num_ids
        )
