"""Compile the parts of a model between its matrix products: fewer passes over memory, fewer kernel launches.

Compiled are whole layers of the vision tower, and the norms, MLP and rotary embedding of the language model's
layers. All of them take only tensors, so that a pack of another shape causes no new compilation.
"""

import inspect
import os
import sys
from pathlib import Path
from types import MethodType

from torch import nn

from vico.model.internvl import VicoModel
from vico.own_files import make_own_folder

# Variants of one function: with and without gradients, in training or not, one tile or several. Beyond its
# default limit of 8, torch runs the function uncompiled and only warns.
_MAX_VARIANTS = 32
_ROTARY = "apply_rotary_pos_emb"


def compile_layers(model: VicoModel, backend: str = "inductor") -> None:
    """Compile the model's layers at their next call, for any number of tiles and tokens.

    Parameters, their names and the state dict do not change. Results differ from those of the uncompiled
    model by rounding; random draws (drop path) are the same. `vico/model/recomputed.py` applies to compiled
    layers, too, if it comes afterwards. ZeRO-3 has to gather a layer's parameters as a whole
    (`compiled_layer_types`): hooks of the parts would be compiled into the layer.
    Raises UserError if the folder for compiled code is somebody else's.
    """
    import torch._dynamo
    import torch._inductor.config  # takes seconds to import, so only when compiling
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        # torch runs what it finds there, and others can guess the name in the folder for temporary files
        folder = Path(default_cache_dir())
        make_own_folder(folder, "set TORCHINDUCTOR_CACHE_DIR to a folder of yours")
    torch._inductor.config.fallback_random = True  # draw from torch's generator, as uncompiled code does
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_VARIANTS)

    def compile_forward(module: nn.Module) -> None:
        # transformers wraps every layer's forward for activation checkpointing; compile the function inside
        forward = inspect.unwrap(type(module).forward)
        module.forward = MethodType(torch.compile(forward, dynamic=True, backend=backend), module)

    for layer in model.base.model.vision_tower.encoder.layer:
        compile_forward(layer)
        layer.is_compiled = True
    for layer in model.base.model.language_model.layers:
        layer.is_compiled = True
        norms = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
        for part in (layer.input_layernorm, layer.post_attention_layernorm, *norms, layer.mlp):
            if part is not None and not hasattr(part, "experts"):  # the data choose the experts
                compile_forward(part)
        code = sys.modules[type(layer.self_attn).__module__]
        if not hasattr(getattr(code, _ROTARY), "_torchdynamo_orig_callable"):
            setattr(code, _ROTARY, torch.compile(getattr(code, _ROTARY), dynamic=True, backend=backend))


def compiled_layer_types(module: nn.Module) -> set[type[nn.Module]]:
    """Return the types of the layers in `module` that `compile_layers` has compiled, or parts of which."""
    return {type(part) for part in module.modules() if getattr(part, "is_compiled", False)}
