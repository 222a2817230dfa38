"""The KL and gradient of a chunk (`vico/losses.py`) as one Triton kernel for CUDA.

The kernel reads each row twice, once for both log-sum-exps and once for KL and gradient, and writes the
gradient once. All arithmetic is float32 in registers. liger-kernel 0.8.5 has no kernel for this: its KL
needs the reference's probabilities of all tokens at once, and its JSD takes no weights per token.
Measurements: docs/measurements/cuda.md.

Shapes: C rows of a chunk, V token ids.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # columns that a program holds at once
_WARPS = 8


# Ten parameters: a Triton kernel takes pointers and strides one by one. Unannotated: Triton passes pointers
# and blocks, for which there are no types.
@triton.jit
def _kl_rows(  # type: ignore[no-untyped-def]
    policy_ptr,
    reference_ptr,
    weights_ptr,
    gradient_ptr,
    kl_ptr,
    policy_stride,
    reference_stride,
    gradient_stride,
    num_ids: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    policy_ptr += row * policy_stride
    reference_ptr += row * reference_stride
    gradient_ptr += row * gradient_stride
    lanes = tl.arange(0, BLOCK)

    # Running maximum and sum per lane; a lane that has read nothing yet holds -inf and 0.
    high_p = tl.full([BLOCK], float("-inf"), tl.float32)
    high_r = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_p = tl.zeros([BLOCK], tl.float32)
    sum_r = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_ids, BLOCK):
        inside = start + lanes < num_ids
        p = tl.load(policy_ptr + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        r = tl.load(reference_ptr + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        new_p, new_r = tl.maximum(high_p, p), tl.maximum(high_r, r)
        sum_p = tl.where(inside, sum_p * tl.exp(high_p - new_p) + tl.exp(p - new_p), sum_p)
        sum_r = tl.where(inside, sum_r * tl.exp(high_r - new_r) + tl.exp(r - new_r), sum_r)
        high_p, high_r = new_p, new_r
    top_p, top_r = tl.max(high_p, axis=0), tl.max(high_r, axis=0)
    log_sum_p = top_p + tl.log(tl.sum(sum_p * tl.exp(high_p - top_p), axis=0))
    log_sum_r = top_r + tl.log(tl.sum(sum_r * tl.exp(high_r - top_r), axis=0))

    weight = tl.load(weights_ptr + row).to(tl.float32)
    kl = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_ids, BLOCK):
        inside = start + lanes < num_ids
        p = tl.load(policy_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32) - log_sum_p
        r = tl.load(reference_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32) - log_sum_r
        probability = tl.exp(r)
        kl += tl.where(inside, probability * (r - p), 0.0)
        gradient = weight * (tl.exp(p) - probability)
        tl.store(gradient_ptr + start + lanes, gradient, mask=inside)
    tl.store(kl_ptr + row, tl.sum(kl, axis=0))


def kl_and_gradient(
    logits_CV: torch.Tensor,
    reference_logits_CV: torch.Tensor,
    weights_C: torch.Tensor,
    gradient_CV: torch.Tensor,
) -> torch.Tensor:
    """Return KL(reference || policy) [C] in float32 and write the gradient of the logits to `gradient_CV`.

    The gradient is w (softmax(policy) - softmax(reference)). `gradient_CV` may be `logits_CV`. All tensors
    may have any float dtype up to float32; rows must be contiguous.
    """
    kl_C = torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    if len(logits_CV):
        _kl_rows[(len(logits_CV),)](
            logits_CV,
            reference_logits_CV,
            weights_C.contiguous(),
            gradient_CV,
            kl_C,
            logits_CV.stride(0),
            reference_logits_CV.stride(0),
            gradient_CV.stride(0),
            logits_CV.shape[1],
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return kl_C
