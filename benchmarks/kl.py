"""The chunked KL over both heads against dense `F.kl_div`, TRL's and liger-kernel's: time and peak memory.

`python -m benchmarks.kl --json`. Every case runs in a process of its own; the last line of standard output is
one JSON object. `--repeats` goes for ours and dense up to 4,096 tokens, all else runs once; a case that
`--budget-s` leaves no time for is reported as such. Memory of a case = highest resident set (VmHWM, reset
before the forward) less what stood before the forward (both heads, hidden states, loaded libraries) and less
the gradients of head and hidden states in the model's dtype; under bfloat16 the float32 sum of the head's
gradient therefore counts as ours.
"""

# A answer tokens, V vocabulary, D width

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from vico.losses import chunked_kl

VOCABULARY, WIDTH = 151_936, 1_024  # Qwen3-0.6B, the language model of InternVL3.5-1B
GB = 1e9
CUDA_RUNS = 5  # a run there takes milliseconds; the median counts


def ours(hidden, weight, reference_hidden, reference_weight, weights):
    return chunked_kl(hidden, weight, reference_hidden, reference_weight, weights)[0]


def dense(hidden, weight, reference_hidden, reference_weight, weights):
    log_policy = F.log_softmax(hidden @ weight.T, dim=-1, dtype=torch.float32)
    log_reference = F.log_softmax(reference_hidden @ reference_weight.T, dim=-1, dtype=torch.float32)
    kl = F.kl_div(log_policy, log_reference, log_target=True, reduction="none").sum(-1)
    return (kl * weights).sum()


def trl(hidden, weight, reference_hidden, reference_weight, weights):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    heads = (hidden, weight, None, reference_hidden, reference_weight, None)
    return (ChunkedDivergenceFunction.apply(*heads, 0.0)[0] * weights).sum()  # beta 0: KL(teacher || student)


def liger_jsd(hidden, weight, reference_hidden, reference_weight, weights):
    """liger's Triton kernel of the same loss, CUDA only; a mean over tokens too."""
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    return LigerFusedLinearJSDFunction.apply(
        hidden, weight, reference_hidden, reference_weight, None, 0.0, -100, 1.0
    )


def liger(hidden, weight, reference_hidden, reference_weight, weights):
    """Its loss is a mean over tokens without weights, so it is compared at equal weights; on a CPU it runs
    uncompiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=hidden.is_cuda
    )
    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    return loss(hidden, weight, reference_hidden, reference_weight, labels)


CASES: dict[str, Callable] = {
    "ours": ours,
    "dense": dense,
    "trl": trl,
    "liger": liger,
    "liger-jsd": liger_jsd,
}
_MODULES = {"trl": "trl", "liger": "liger_kernel", "liger-jsd": "liger_kernel"}


def inputs(num_tokens: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """Hidden states and heads whose logits spread like a trained model's (a standard deviation of 3)."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, WIDTH, generator=generator, device=device) * scale).to(dtype)

    hidden, weight = draw(num_tokens, 1.0).requires_grad_(), draw(VOCABULARY, 0.09).requires_grad_()
    reference_weight = (weight.detach() * 1.01).contiguous()
    reference_hidden = hidden.detach() + 0.1 * draw(num_tokens, 1.0)
    weights = torch.full((num_tokens,), 1 / num_tokens, device=device)
    return hidden, weight, reference_hidden, reference_weight, weights


def resident_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this needs Linux")


class PeakMemory:
    """Highest memory since `start`, above what stood then; bytes."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"

    def start(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew at VmRSS
            self._before = resident_bytes("VmRSS")

    def above(self) -> int:
        if self._cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._before
        return resident_bytes("VmHWM") - self._before


def measured(case: str, num_tokens: int, dtype: torch.dtype, device: str) -> dict:
    """One forward and backward of a case in this process."""
    if device == "cpu":
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this than anybody else on the machine
    loss_of = CASES[case]
    small = tuple(t[:64].detach().requires_grad_(t.requires_grad) for t in inputs(64, dtype, device))
    loss_of(*small).backward()  # libraries load and warm up before anything is measured
    arguments = inputs(num_tokens, dtype, device)
    memory, spent = PeakMemory(device), []
    for _ in range(CUDA_RUNS if device == "cuda" else 1):
        loss = gradients = arguments[0].grad = arguments[1].grad = None
        memory.start()
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = loss_of(*arguments)
        forward_above = memory.above()
        loss.backward()
        peak = memory.above()
        spent.append((time.perf_counter() - started, time.process_time() - cpu_started))
        gradients = [t.grad for t in arguments[:2]]
    gradient_bytes = sum(g.numel() * g.element_size() for g in gradients)
    return {
        "seconds": statistics.median(one[0] for one in spent),
        "cpu_seconds": statistics.median(one[1] for one in spent),
        "memory_gb": (peak - gradient_bytes) / GB,
        "forward_memory_gb": forward_above / GB,
        "gradients_gb": gradient_bytes / GB,
        "loss": loss.item(),
        "hidden_grad_norm": gradients[0].float().norm().item(),
        "head_grad_norm": gradients[1].float().norm().item(),
        "hidden_grad_error": hidden_gradient_error(*arguments),
    }


def hidden_gradient_error(hidden, weight, reference_hidden, reference_weight, weights) -> float:
    """Of the first 64 tokens' hidden states: distance of their gradient from that in float64 of the same
    numbers, relative."""
    rows = slice(64)
    exact = hidden.detach()[rows].double().requires_grad_()
    log_policy = (exact @ weight.detach().double().T).log_softmax(-1)
    log_reference = (reference_hidden[rows].double() @ reference_weight.double().T).log_softmax(-1)
    kl = (log_reference.exp() * (log_reference - log_policy)).sum(-1)
    (kl * weights[rows]).sum().backward()
    return ((hidden.grad[rows] - exact.grad).norm() / exact.grad.norm()).item()


def predicted_gb(case: str, num_tokens: int) -> float:
    """What a case will need above heads and gradients: dense holds five float32 [A, V] at once (two
    log-softmaxes and, inside kl_div, exp, difference and product), the others some chunks."""
    return 5 * num_tokens * VOCABULARY * 4 / GB if case == "dense" else 4.0 if case != "ours" else 1.0


def room_gb(limit_gb: float | None) -> float:
    """GB that a case may take: the limit given, else what the machine has left less 2 GB, heads and
    gradients (four times a float32 head)."""
    if limit_gb is not None:
        return limit_gb
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024 / GB - 2.0 - 4 * VOCABULARY * WIDTH * 4 / GB
    raise RuntimeError("/proc/meminfo has no MemAvailable; give --limit-gb")


def row(case: str, num_tokens: int, options: argparse.Namespace) -> dict:
    """A case in a process of its own, or why it was not run."""
    named = {"case": case, "answer_tokens": num_tokens}
    module = _MODULES.get(case)
    if module and importlib.util.find_spec(module) is None:
        return {**named, "skipped": f"{module} is not installed"}
    need, room = predicted_gb(case, num_tokens), room_gb(options.limit_gb)
    if options.device == "cpu" and need > room:
        return {**named, "skipped": f"does not fit: needs {need:.1f} GB, {room:.1f} GB may be taken"}
    command = [sys.executable, "-m", "benchmarks.kl", "--child", case, "--tokens", str(num_tokens)]
    command += ["--dtype", options.dtype, "--device", options.device, "--threads", str(options.threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        return {**named, "skipped": f"ended with {child.returncode}: {child.stderr.strip()[-300:]}"}
    return {**named, **json.loads(child.stdout.splitlines()[-1])}


def rounds(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(case, answer tokens) in the order they run: first ours and dense in turns, `repeats` times where that
    is short, then the others once."""
    cases, sizes = options.cases.split(","), [int(tokens) for tokens in options.tokens.split(",")]
    pair = [case for case in cases if case in ("ours", "dense")]
    found = []
    for num_tokens in sizes:
        for repeat in range(options.repeats if num_tokens <= 4096 else 1):
            found += [(case, num_tokens) for case in (pair if repeat % 2 == 0 else pair[::-1])]
    return found + [(case, num_tokens) for num_tokens in sizes for case in cases if case not in pair]


def ratios(rows: list[dict]) -> dict[str, float | None]:
    """Ours over dense (and over the others) at 4k answer tokens: medians over the repeats."""

    def median(case: str, what: str) -> float | None:
        found = [r[what] for r in rows if r["case"] == case and r["answer_tokens"] == 4096 and what in r]
        return statistics.median(found) if found else None

    found = {}
    for other in ("dense", "trl", "liger"):
        for name, what in (("memory", "memory_gb"), ("time", "seconds"), ("cpu_time", "cpu_seconds")):
            mine, theirs = median("ours", what), median(other, what)
            found[f"{name}_vs_{other}_4k"] = mine / theirs if mine and theirs else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--tokens", default="4096,1024,16384")
    parser.add_argument("--cases", default="ours,dense,trl,liger")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours and dense, in turns")
    parser.add_argument("--budget-s", type=float, help="start no case after so many seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit-gb", type=float, help="refuse a case that needs more than this")
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
            left_out = {"case": case, "answer_tokens": num_tokens}
            rows.append({**left_out, "skipped": f"no time left of {options.budget_s:g} s"})
        else:
            rows.append(row(case, num_tokens, options))
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
