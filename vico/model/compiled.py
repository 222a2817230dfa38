"""What lies between a model's matrix products compiled by torch: fewer passes over memory, fewer launches.

Compiled are whole layers of the vision tower, and of the language model's layers the norms, the MLP and the
rotary embedding: all that is called with tensors alone, so that a pack of another shape compiles nothing new.
"""

import inspect
import sys
from types import MethodType

from torch import nn

from vico.model.internvl import VicoModel

# Variants of one function: with and without gradients, in training and not, one tile or several. Past torch's
# own limit of 8 it goes on uncompiled with a warning alone.
_MOST_VARIANTS = 32
_ROTARY = "apply_rotary_pos_emb"


def compile_layers(model: VicoModel, backend: str = "inductor") -> None:
    """Compiles the model's layers at their next call, for any number of tiles and tokens.

    Parameters, their names and the state dict stay as they are. Results differ from uncompiled ones by
    rounding; what is drawn (drop path) is the same. Layers no longer compute their activations again in
    the backward (activation checkpointing), and hooks on what is inside a vision layer are compiled in, so
    ZeRO-3 cannot gather it.
    """
    import torch._dynamo
    import torch._inductor.config  # seconds, for those who compile

    torch._inductor.config.fallback_random = True  # torch's own draws, not those of compiled code
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)

    def compile_forward(module: nn.Module) -> None:
        # unwrapped: transformers puts activation checkpointing around a layer's forward, the same for all
        plain = inspect.unwrap(type(module).forward)
        module.forward = MethodType(torch.compile(plain, dynamic=True, backend=backend), module)

    for layer in model.base.model.vision_tower.encoder.layer:
        compile_forward(layer)
    for layer in model.base.model.language_model.layers:
        norms = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
        for part in (layer.input_layernorm, layer.post_attention_layernorm, *norms, layer.mlp):
            if part is not None and not hasattr(part, "experts"):  # experts are chosen by the data
                compile_forward(part)
        code = sys.modules[type(layer.self_attn).__module__]
        if not hasattr(getattr(code, _ROTARY), "_torchdynamo_orig_callable"):
            setattr(code, _ROTARY, torch.compile(getattr(code, _ROTARY), dynamic=True, backend=backend))
