"""Attention kernels one by one, at the shapes of InternVL3.5-1B: time of forward and backward, and error.

    python -m benchmarks.attention --json

A packed row (causal within each segment) runs on every kernel of `vico/model/attention_kernels.py` and on
SDPA segment by segment; tiles of 1,025 tokens run on every SDPA backend. Errors are relative to float32. A
kernel that is not installed or does not run on this device is reported with the reason. On a CPU the shapes
are tiny and only SDPA runs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.reports import append_row
from vico.errors import UserError, one_line
from vico.model.attention_kernels import ROW_KERNELS, use_attention
from vico.model.segments import segment_attention

SIZES = {
    # 16 query heads and 8 key heads of 128 over 16,384 tokens; 48 tiles with 16 heads of 64
    "cuda": {"lengths": [2731] * 6, "heads": (16, 8), "width": 128, "tiles": 48, "tokens": 1025},
    "cpu": {"lengths": [40, 24], "heads": (4, 2), "width": 32, "tiles": 2, "tokens": 65},
}
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Attention = Callable[[list[torch.Tensor]], torch.Tensor]


def drawn(shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query, key and value of these shapes, whose gradients are wanted."""
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor.to(torch.bfloat16).to(device, dtype).requires_grad_() for tensor in tensors]


def results(attention: Attention, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output and the gradients of the inputs, in float32 on the CPU."""
    output = attention(inputs)
    output.float().square().sum().backward()
    values = [output.detach(), *(tensor.grad for tensor in inputs)]
    for tensor in inputs:
        tensor.grad = None
    return [value.float().cpu() for value in values]


def row(
    name: str, attention: Attention, inputs: list[torch.Tensor], exact: list[torch.Tensor], repeats: int
) -> dict[str, Any]:
    """Return the row of one kernel: milliseconds and error, or why it did not run."""
    try:
        computed = results(attention, inputs)
        times = [timed(attention, inputs) for _ in range(repeats)]
    except (UserError, RuntimeError, TypeError, ValueError) as error:
        return {"kernel": name, "skipped": one_line(error, max_chars=300)}
    distances = [
        float((mine - other).norm() / other.norm()) for mine, other in zip(computed, exact, strict=True)
    ]
    return {"kernel": name, "ms": 1e3 * statistics.median(times), "error": max(distances)}


def timed(attention: Attention, inputs: list[torch.Tensor]) -> float:
    """Return the seconds of one forward and backward pass."""
    synchronise()
    started = time.perf_counter()
    output = attention(inputs)
    output.backward(torch.ones_like(output))
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row_kernels(size: dict[str, Any], device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the row of each kernel for packed rows."""
    lengths, total = size["lengths"], sum(size["lengths"])
    heads, key_heads = size["heads"]
    shapes = [(1, count, total, size["width"]) for count in (heads, key_heads, key_heads)]

    def attention(inputs: list[torch.Tensor]) -> torch.Tensor:
        return segment_attention(None, *inputs, None, segment_lengths=lengths)[0]

    exact = results(attention, drawn(shapes, device, torch.float32))  # float32 runs SDPA by segment
    yield row("SDPA by segment, float32", attention, drawn(shapes, device, torch.float32), exact, repeats)
    for kernel in ROW_KERNELS:
        if device == "cpu":
            yield {"kernel": kernel.name, "skipped": "runs on CUDA only"}
            continue
        use_attention(kernel.name, "auto")
        yield row(kernel.name, attention, drawn(shapes, device, torch.bfloat16), exact, repeats)
    use_attention("auto", "auto")


def tile_kernels(size: dict[str, Any], device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the row of each SDPA backend for tiles of one length."""
    shapes = [(size["tiles"], 16, size["tokens"], 64)] * 3

    def attention(inputs: list[torch.Tensor]) -> torch.Tensor:
        return scaled_dot_product_attention(*inputs)

    exact = results(attention, drawn(shapes, device, torch.float32))
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            yield row(name, attention, drawn(shapes, device, torch.bfloat16), exact, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="file that gets one line of JSON per row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for part, kernels in (("packed row", row_kernels), ("tiles", tile_kernels)):
        for measured in kernels(SIZES[options.device], options.device, options.repeats):
            rows.append({"part": part, **measured})
            append_row(options.out, rows[-1])
            print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"name": "attention", "device": options.device, "rows": rows, "ratios": {}}))


if __name__ == "__main__":
    main()
