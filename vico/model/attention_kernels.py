"""Which CUDA kernel computes attention: in packed rows of the language model, and in the vision tower.

`use_attention` takes what the site chose; without it every kernel is chosen automatically. Segments of
different lengths need a varlen kernel, tried in the order of `ROW_KERNELS`. Tiles have one length, 1,025
tokens for 448 px, so the vision tower runs torch's SDPA with the backends in the order of
`VISION_KERNELS`.

Shapes: L tokens of a row end to end, H query heads, K key heads, d width of a head.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from vico.errors import UserError

RowKernelName = Literal["auto", "flash-attn-4", "flash-attn-3", "flash-attn-2", "torch"]
VisionKernelName = Literal["auto", "cudnn", "flash", "efficient"]
VISION_KERNELS = ("cudnn", "flash", "efficient", "math")
"""Backends of torch's SDPA in the order in which the vision tower tries them."""
_FIELD = "train.attention"
logger = logging.getLogger(__name__)


class Bounds(NamedTuple):
    """Segments as varlen kernels take them: int32 bounds (starts, then the end) of queries and of keys, and
    the longest segment of each."""

    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int


Varlen = Callable[..., torch.Tensor]
"""(query [L, H, d], key [S, K, d], value [S, K, d], bounds, dropout, scaling) -> attention [L, H, d]."""


@dataclass(frozen=True)
class RowKernel:
    """A varlen kernel: the module with its function, and what it supports."""

    name: str
    module: str
    capabilities: tuple[int, ...]
    """Major compute capabilities of the devices that it runs on."""
    has_dropout: bool
    widest_head: int
    attended: Callable[[Callable[..., Any]], Varlen]
    """Turns the module's function into a `Varlen`."""

    def lacks(self, capability: int, width: int, dropout: float) -> str:
        """Return why the kernel cannot compute this, "" if it can."""
        if capability not in self.capabilities:
            return f"the device has compute capability {capability}.x"
        if width > self.widest_head:
            return f"heads of width {width} are too wide"
        return "it has no dropout" if dropout and not self.has_dropout else ""


def _flash_attn_2(function: Callable[..., Any]) -> Varlen:
    def attended(query: Any, key: Any, value: Any, bounds: Bounds, dropout: float, scaling: Any) -> Any:
        return function(query, key, value, *bounds, dropout_p=dropout, softmax_scale=scaling, causal=True)

    return attended


def _flash_attn_by_name(function: Callable[..., Any]) -> Varlen:
    """Versions 3 and 4 have other parameters in between, no dropout, and may return the logsumexp, too."""

    def attended(query: Any, key: Any, value: Any, bounds: Bounds, dropout: float, scaling: Any) -> Any:
        result = function(
            query,
            key,
            value,
            cu_seqlens_q=bounds.queries,
            cu_seqlens_k=bounds.keys,
            max_seqlen_q=bounds.longest_queries,
            max_seqlen_k=bounds.longest_keys,
            softmax_scale=scaling,
            causal=True,
        )
        return result[0] if isinstance(result, tuple) else result

    return attended


def _torch_varlen(function: Callable[..., Any]) -> Varlen:
    """torch's kernel needs head widths that are multiples of 8, so heads are padded with zeros."""
    # Shared key heads are enabled by an argument in torch 2.13 and later.
    needs_argument = "enable_gqa" in signature(function).parameters
    kernel = partial(function, enable_gqa=True) if needs_argument else function

    def attended(query: Any, key: Any, value: Any, bounds: Bounds, dropout: float, scaling: Any) -> Any:
        width = query.shape[-1]
        if width % 8:
            scaling = width**-0.5 if scaling is None else scaling
            query, key, value = (F.pad(part, (0, -width % 8)) for part in (query, key, value))
        return kernel(query, key, value, *bounds, window_size=(-1, 0), scale=scaling)[..., :width]

    return attended


_PUBLISHED_HEAD = 128
_AMPERE_ON = (8, 9, 10, 11, 12)
ROW_KERNELS = (
    RowKernel("flash-attn-4", "flash_attn.cute", (9, 10), False, 128, _flash_attn_by_name),
    RowKernel("flash-attn-3", "flash_attn_interface", (9,), False, 256, _flash_attn_by_name),
    RowKernel("flash-attn-2", "flash_attn", _AMPERE_ON, True, 256, _flash_attn_2),
    RowKernel("torch", "torch.nn.attention.varlen", _AMPERE_ON, False, 256, _torch_varlen),
)
"""The kernels for packed rows, in the order in which they are tried."""
_FUNCTIONS = {"torch": "varlen_attn"}
_PACKAGES = {"flash-attn-4": "flash-attn-4", "flash-attn-3": "flash_attn_3", "flash-attn-2": "flash-attn"}


@dataclass
class _Chosen:
    rows: RowKernelName = "auto"
    vision: VisionKernelName = "auto"


_chosen = _Chosen()


def use_attention(rows: RowKernelName, vision: VisionKernelName) -> None:
    """Choose the kernels of this process from now on; `auto`: the first that is there and supports the
    model."""
    _chosen.rows, _chosen.vision = rows, vision


def kernel_on(device: torch.device, width: int, dropout: float) -> Varlen:
    """Return the kernel for packed rows on this CUDA device; raises as `row_kernel` does."""
    return _kernel_on(_chosen.rows, device, width, dropout)


@lru_cache(maxsize=16)
def _kernel_on(rows: RowKernelName, device: torch.device, width: int, dropout: float) -> Varlen:
    capability, _ = torch.cuda.get_device_capability(device)
    name, kernel = row_kernel(capability, width, dropout)
    logger.info("attention of packed rows: %s (%s.rows=%s)", name, _FIELD, rows)
    return kernel


def row_kernel(capability: int, width: int, dropout: float) -> tuple[str, Varlen]:
    """Return name and function of the kernel for a packed row on a device of this major capability.

    Raises UserError if the site forces a kernel that is not there or does not support the model, if a package
    is installed and cannot be imported, and if no kernel is left.
    """
    refused = []
    for kernel in ROW_KERNELS:
        if _chosen.rows not in ("auto", kernel.name):
            continue
        lack = kernel.lacks(capability, width, dropout)
        function = None if lack else loaded(kernel)
        if function is not None:
            return kernel.name, function
        refused.append(f"{kernel.name}: {lack or 'not installed'}")
    where = f"{_FIELD}.rows={_chosen.rows}"
    remedy = "install flash-attn (the extra gpu)" if _chosen.rows == "auto" else f"set {_FIELD}.rows: auto"
    raise UserError(f"{where}: no attention kernel for packed rows ({'; '.join(refused)}); {remedy}")


@lru_cache(maxsize=len(ROW_KERNELS))
def loaded(kernel: RowKernel) -> Varlen | None:
    """Return the kernel's function, or None if its package is not installed.

    Raises UserError if it is installed but cannot be imported.
    """
    if not _is_installed(kernel.module):
        return None
    try:
        function = getattr(
            import_module(kernel.module), _FUNCTIONS.get(kernel.name, "flash_attn_varlen_func")
        )
    except (ImportError, AttributeError) as error:
        package = _PACKAGES.get(kernel.name, "torch")
        raise UserError(
            f"{package} is installed and cannot be imported ({error}); install one that is built for torch "
            f"{torch.__version__}, uninstall it, or set {_FIELD}.rows to another kernel"
        ) from error
    return kernel.attended(function)


def _is_installed(module: str) -> bool:
    """Return whether a module is there, without importing it or its parents; a namespace without code, as
    flash-attn 4 alone makes of flash-attn 2's name, is not."""
    path, spec, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = find_spec(name) if path is None else PathFinder.find_spec(name, path)
        if spec is None:
            return False
        path = list(spec.submodule_search_locations or ())
    return spec is not None and spec.origin is not None


@contextmanager
def vision_attention(tensor: torch.Tensor) -> Iterator[None]:
    """Let SDPA use the vision tower's kernels in their order, or the forced one alone, for a CUDA tensor in
    bfloat16 or float16; elsewhere torch chooses."""
    if not (tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)):
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    by_name = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    names = VISION_KERNELS if _chosen.vision == "auto" else (_chosen.vision,)
    with sdpa_kernel([by_name[name] for name in names], set_priority=True):
        yield


def kernels_in_words() -> str:
    """Return which kernels compute attention in bfloat16 on this process's CUDA device, for heads of the
    published width. Raises as `row_kernel` does."""
    capability, _ = torch.cuda.get_device_capability()
    rows, _ = row_kernel(capability, _PUBLISHED_HEAD, 0.0)
    vision = f"{VISION_KERNELS[0]} first" if _chosen.vision == "auto" else _chosen.vision
    return f"attention of rows by {rows}, of tiles by {vision}"
