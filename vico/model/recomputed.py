"""Activation checkpointing: layers recompute their activations in the backward pass instead of keeping them.

It wraps what a layer computes, plain or compiled, so it goes together with `vico/model/compiled.py`: compile
first, then checkpoint.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from vico.model.internvl import VicoModel

Checkpointing = Literal["none", "selective", "full"]
_FORWARD = "forward"
# Attention of every kernel that a layer may use: the only work that grows with the square of the tokens.
_ATTENTION_OPERATORS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
        "flash_attn_3::_flash_attn_forward",
    }
)


def recompute_layers(model: VicoModel, checkpointing: Checkpointing) -> None:
    """Make the layers of vision tower and language model recompute their activations, in training mode only.

    `full` keeps the input of each layer and computes everything again. `selective` also keeps what attention
    returns and computes the rest again; flash-attn 4, which torch's dispatcher does not see, is computed
    again, too. Results do not change: random draws are repeated.
    """
    if checkpointing == "none":
        return
    for layer in (*model.base.model.vision_tower.encoder.layer, *model.base.model.language_model.layers):
        compute = getattr(layer, _FORWARD)
        setattr(layer, _FORWARD, MethodType(_recomputed(compute, checkpointing), layer))


def _recomputed(compute: Callable[..., Any], checkpointing: Checkpointing) -> Callable[..., Any]:
    contexts = noop_context_fn
    if checkpointing == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _kept)

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return compute(*args, **kwargs)
        return checkpoint(partial(compute, **kwargs), *args, use_reentrant=False, context_fn=contexts)

    return forward


def _kept(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition(".")[0] if isinstance(operator, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if name in _ATTENTION_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE
