"""Time and memory of the chunked KL over both heads, compared with dense `F.kl_div`, TRL and liger-kernel.

    python -m benchmarks.kl --json

Every case runs in a process of its own; the last line of standard output is one JSON object. `--repeats`
applies to ours and dense up to 4,096 tokens, other cases run once; a case without time left in `--budget-s`
is reported as skipped. The memory of a case is its highest resident set (VmHWM, reset before the forward
pass) without what existed before the forward pass (both heads, hidden states, loaded libraries) and without
the gradients of head and hidden states in the model's dtype. So in bfloat16 the float32 sum of the head's
gradient counts as memory of ours.

Shapes: A answer tokens, V vocabulary, D width; every loss takes `Inputs`.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.reports import append_row
from vico.losses import chunked_kl

VOCABULARY, WIDTH = 151_936, 1_024  # Qwen3-0.6B, the language model of InternVL3.5-1B
GB = 1e9
CUDA_RUNS = 5  # a run there takes milliseconds; the median is reported


class Inputs(NamedTuple):
    """Policy and reference hidden states [A, D] and heads [V, D], and the weight of each token [A]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    reference_hidden: torch.Tensor
    reference_weight: torch.Tensor
    weights: torch.Tensor


def ours(case: Inputs) -> torch.Tensor:
    return chunked_kl(*case)[0]


def ours_1024(case: Inputs) -> torch.Tensor:
    """Run ours with the default of `train.memory.kl_chunk_rows` on GPUs."""
    return chunked_kl(*case, chunk_rows=1024)[0]


def dense(case: Inputs) -> torch.Tensor:
    log_policy = F.log_softmax(case.hidden @ case.weight.T, dim=-1, dtype=torch.float32)
    reference_logits = case.reference_hidden @ case.reference_weight.T
    log_reference = F.log_softmax(reference_logits, dim=-1, dtype=torch.float32)
    kl = F.kl_div(log_policy, log_reference, log_target=True, reduction="none").sum(-1)
    return (kl * case.weights).sum()


def trl(case: Inputs) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    heads = (case.hidden, case.weight, None, case.reference_hidden, case.reference_weight, None)
    kl = ChunkedDivergenceFunction.apply(*heads, 0.0)[0]  # beta 0: KL(teacher || student)
    return (kl * case.weights).sum()


def liger_kl(case: Inputs) -> torch.Tensor:
    """Run liger's fused linear KL. It takes the reference's probabilities [A, V], which are computed here as
    a part of the loss; a mean over tokens, too."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    target = (case.reference_hidden @ case.reference_weight.T).softmax(-1, dtype=torch.float32)
    return LigerFusedLinearKLDivLoss()(case.hidden, case.weight, target)


def liger_jsd(case: Inputs) -> torch.Tensor:
    """Run liger's Triton kernel of the same loss, CUDA only; it is a mean over tokens too."""
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    heads = (case.hidden, case.weight, case.reference_hidden, case.reference_weight)
    return LigerFusedLinearJSDFunction.apply(*heads, None, 0.0, -100, 1.0)


def liger(case: Inputs) -> torch.Tensor:
    """Run liger's chunked loss, uncompiled on a CPU; a mean over tokens, so all weights must be equal."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=case.hidden.is_cuda
    )
    labels = torch.zeros(len(case.hidden), dtype=torch.long, device=case.hidden.device)
    return loss(case.hidden, case.weight, case.reference_hidden, case.reference_weight, labels)


CASES: dict[str, Callable[[Inputs], torch.Tensor]] = {
    "ours": ours,
    "ours-1024": ours_1024,
    "dense": dense,
    "trl": trl,
    "liger": liger,
    "liger-jsd": liger_jsd,
    "liger-kl": liger_kl,
}
_MODULES = {"liger-kl": "liger_kernel", "trl": "trl", "liger": "liger_kernel", "liger-jsd": "liger_kernel"}


def inputs(num_tokens: int, dtype: torch.dtype, device: str) -> Inputs:
    """Return inputs whose logits spread like a trained model's (a standard deviation of 3)."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, WIDTH, generator=generator, device=device) * scale).to(dtype)

    hidden, weight = draw(num_tokens, 1.0).requires_grad_(), draw(VOCABULARY, 0.09).requires_grad_()
    reference_weight = (weight.detach() * 1.01).contiguous()
    reference_hidden = hidden.detach() + 0.1 * draw(num_tokens, 1.0)
    weights = torch.full((num_tokens,), 1 / num_tokens, device=device)
    return Inputs(hidden, weight, reference_hidden, reference_weight, weights)


def resident_bytes(field: str) -> int:
    """Return `VmRSS` or `VmHWM` of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this needs Linux")


class PeakMemory:
    """Measures the highest memory since `start` above its level then, in bytes."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"

    def start(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
            self._before = resident_bytes("VmRSS")

    def above(self) -> int:
        if self._cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._before
        return resident_bytes("VmHWM") - self._before


def measured(case: str, num_tokens: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Run forward and backward of a case in this process; return time, memory, loss and gradient norms."""
    if device == "cpu":
        Path("/proc/self/oom_score_adj").write_text("1000")  # the kernel should kill this process first
    loss_of = CASES[case]
    small = Inputs(*(t[:64].detach().requires_grad_(t.requires_grad) for t in inputs(64, dtype, device)))
    loss_of(small).backward()  # libraries load and warm up before the measurement
    case_inputs = inputs(num_tokens, dtype, device)
    hidden, weight = case_inputs.hidden, case_inputs.weight
    memory, seconds, cpu_seconds = PeakMemory(device), [], []
    for _ in range(CUDA_RUNS if device == "cuda" else 1):
        loss = gradients = hidden.grad = weight.grad = None
        memory.start()
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = loss_of(case_inputs)
        forward_bytes = memory.above()
        loss.backward()
        peak_bytes = memory.above()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
        gradients = [hidden.grad, weight.grad]
    gradient_bytes = sum(g.numel() * g.element_size() for g in gradients)
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "memory_gb": (peak_bytes - gradient_bytes) / GB,
        "forward_memory_gb": forward_bytes / GB,
        "gradients_gb": gradient_bytes / GB,
        "loss": loss.item(),
        "hidden_grad_norm": gradients[0].float().norm().item(),
        "head_grad_norm": gradients[1].float().norm().item(),
        "hidden_grad_error": hidden_gradient_error(case_inputs),
    }


def hidden_gradient_error(case: Inputs) -> float:
    """Return the relative error of the gradient of the first 64 hidden states, compared with float64."""
    rows = slice(64)
    exact = case.hidden.detach()[rows].double().requires_grad_()
    log_policy = (exact @ case.weight.detach().double().T).log_softmax(-1)
    reference_logits = case.reference_hidden[rows].double() @ case.reference_weight.double().T
    log_reference = reference_logits.log_softmax(-1)
    kl = (log_reference.exp() * (log_reference - log_policy)).sum(-1)
    (kl * case.weights[rows]).sum().backward()
    return ((case.hidden.grad[rows] - exact.grad).norm() / exact.grad.norm()).item()


def predicted_gb(case: str, num_tokens: int) -> float:
    """Return what a case will need above heads and gradients.

    Dense holds five float32 [A, V] at once (two log-softmaxes and, inside kl_div, exp, difference and
    product), the others a few chunks.
    """
    return 5 * num_tokens * VOCABULARY * 4 / GB if case == "dense" else 4.0 if case != "ours" else 1.0


def room_gb(limit_gb: float | None) -> float:
    """Return the GB that a case may use: `limit_gb`, or the free memory without 2 GB, heads and gradients.

    Heads and gradients are four times a float32 head.
    """
    if limit_gb is not None:
        return limit_gb
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024 / GB - 2.0 - 4 * VOCABULARY * WIDTH * 4 / GB
    raise RuntimeError("/proc/meminfo has no MemAvailable; give --limit-gb")


def row(case: str, num_tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run a case in a process of its own; return its row, or why it was skipped."""
    named: dict[str, Any] = {"case": case, "answer_tokens": num_tokens}
    module = _MODULES.get(case)
    if module and importlib.util.find_spec(module) is None:
        return {**named, "skipped": f"{module} is not installed"}
    need, room = predicted_gb(case, num_tokens), room_gb(options.limit_gb)
    if options.device == "cpu" and need > room:
        return {**named, "skipped": f"does not fit: needs {need:.1f} GB, {room:.1f} GB are available"}
    command = [sys.executable, "-m", "benchmarks.kl", "--child", case, "--tokens", str(num_tokens)]
    command += ["--dtype", options.dtype, "--device", options.device, "--threads", str(options.threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        return {**named, "skipped": f"ended with {child.returncode}: {child.stderr.strip()[-300:]}"}
    return {**named, **json.loads(child.stdout.splitlines()[-1])}


def rounds(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return (case, answer tokens) in the order of running: ours and dense alternating, then the others once.

    Ours and dense run `repeats` times up to 4,096 tokens.
    """
    cases, sizes = options.cases.split(","), [int(tokens) for tokens in options.tokens.split(",")]
    pair = [case for case in cases if case in ("ours", "dense")]
    alternating = []
    for num_tokens in sizes:
        for repeat in range(options.repeats if num_tokens <= 4096 else 1):
            alternating += [(case, num_tokens) for case in (pair if repeat % 2 == 0 else pair[::-1])]
    return alternating + [(case, num_tokens) for num_tokens in sizes for case in cases if case not in pair]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return ours over each other case at 4k answer tokens: medians over the repeats."""

    def median(case: str, key: str) -> float | None:
        values = [r[key] for r in rows if r["case"] == case and r["answer_tokens"] == 4096 and key in r]
        return statistics.median(values) if values else None

    by_name = {}
    for other in ("dense", "trl", "liger"):
        for name, key in (("memory", "memory_gb"), ("time", "seconds"), ("cpu_time", "cpu_seconds")):
            mine, theirs = median("ours", key), median(other, key)
            by_name[f"{name}_vs_{other}_4k"] = mine / theirs if mine and theirs else None
    return by_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--tokens", default="4096,1024,16384")
    parser.add_argument("--cases", default="ours,dense,trl,liger")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours and dense, alternating")
    parser.add_argument("--budget-s", type=float, help="start no case after this many seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit-gb", type=float, help="refuse a case that needs more than this")
    parser.add_argument("--out", type=Path, help="file that gets one line of JSON per row")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(options.threads)
        dtype = getattr(torch, options.dtype)
        print(json.dumps(measured(options.child, int(options.tokens), dtype, options.device)))
        return
    rows, started = [], time.perf_counter()
    for case, num_tokens in rounds(options):
        if options.budget_s and time.perf_counter() - started > options.budget_s:
            skipped = {"case": case, "answer_tokens": num_tokens}
            rows.append({**skipped, "skipped": f"no time left of {options.budget_s:g} s"})
        else:
            rows.append(row(case, num_tokens, options))
        append_row(options.out, rows[-1])
        print(rows[-1], file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "name": "kl",
                "dtype": options.dtype,
                "threads": options.threads,
                "rows": rows,
                "ratios": ratios(rows),
            }
        )
    )


if __name__ == "__main__":
    main()
