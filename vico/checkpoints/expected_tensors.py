"""Which tensors, of which shapes, the weight files of a config hold under our names; checked before a weight
is read.

In files each expert of a Qwen3-MoE has tensors of its own; in memory transformers fuses those of a layer.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from vico.errors import UserError
from vico.model.connectors import CompressedConnector
from vico.model.router import Router

OWN_PARTS = ("compressed_connector", "router")
HEAD = "lm_head.weight"
_FUSED_EXPERTS = re.compile(r"(model\.language_model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)$")
_SHOWN = 5


def tensors_of_files(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in memory under their names in files: fused experts become views of the single ones."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        fused = _FUSED_EXPERTS.match(name)
        if not fused:
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            if fused[2] == "down_proj":
                found[f"{fused[1]}{number}.down_proj.weight"] = expert
            else:
                gate, up = expert.chunk(2)
                found[f"{fused[1]}{number}.gate_proj.weight"] = gate
                found[f"{fused[1]}{number}.up_proj.weight"] = up
    return found


def expected_shapes(config: dict[str, Any], own_parts: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Shapes by name in files of a Hugging Face config, and of those parts of ours that are named."""
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig(**config))
        vision, text = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        modules = {"compressed_connector": lambda: CompressedConnector(vision, text)}
        modules["router"] = lambda: Router(vision)
        tensors = tensors_of_files(model.state_dict())
        for part in own_parts:
            tensors |= {f"{part}.{name}": tensor for name, tensor in modules[part]().state_dict().items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], folder: str) -> None:
    """Raises UserError unless the files hold exactly what the config says: first five names and the count.

    A tied head may stand in the files or not.
    """
    present = [part for part in OWN_PARTS if any(name.startswith(f"{part}.") for name in shapes)]
    for part in OWN_PARTS:
        if config.get("vico", {}).get(part) and part not in present:
            raise UserError(
                f"{folder}: config.json promises a {part.replace('_', ' ')}, but the weights hold none of "
                "its tensors; copy the whole folder again, or take the promise out of config.json"
            )
    expected = expected_shapes(config, present)
    if config.get("tie_word_embeddings") and HEAD not in shapes:
        del expected[HEAD]
    odd = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "surplus": sorted(shapes.keys() - expected.keys()),
        "wrongly shaped": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in sorted(expected.items())
            if name in shapes and shapes[name] != shape
        ],
    }
    faults = [
        f"{len(names)} {what} tensors in the weights: {', '.join(names[:_SHOWN])}"
        for what, names in odd.items()
        if names
    ]
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}. The weights do not belong to this config.json")
