"""Which tensors, in which shapes, the weight files of a model must contain; checked before a weight is read.

In files each expert of a Qwen3-MoE has tensors of its own. In memory transformers fuses the experts of a
layer.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

from vico.checkpoints.internlm2 import llama_tensors
from vico.checkpoints.layouts import tensors_in_our_layout
from vico.checkpoints.tensor_files import StoredTensor, joined, stored_tensors, tensors_of_file
from vico.errors import UserError, one_line
from vico.model.connectors import CompressedConnector
from vico.model.router import Router
from vico.model_files import model_config, raw_config
from vico.published_config import is_published

OWN_PARTS = ("compressed_connector", "router")
OWN_PREFIXES = tuple(f"{part}." for part in OWN_PARTS)
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
_FUSED_EXPERTS = re.compile(r"(model\.language_model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)$")
_SHOWN = 5


def checked_tensors(folder: Path, router_file: Path | None = None) -> dict[str, StoredTensor]:
    """Return the tensors of a folder's files by our names, without reading them.

    `router_file` holds tensors by our names that replace the folder's. Raises UserError unless the tensors
    are those of the folder's config.json.
    """
    config = model_config(folder)
    tensors = tensors_in_our_layout(llama_tensors(stored_tensors(folder), config["text_config"], joined))
    if router_file is not None:
        tensors |= tensors_of_file(router_file)
    written = raw_config(folder)
    own = sorted(name for name in tensors if name.startswith(OWN_PREFIXES))
    if own and is_published(written) and "flash_mode" not in written:
        raise UserError(
            f"{folder}: the weights hold {len(own)} tensors of connector and router, but config.json has no "
            "flash_mode; set flash_mode to true (or false for a model that never compresses)"
        )
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, config, str(folder))
    return tensors


def unfused_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors by their names in files: fused experts become views of each expert."""
    unfused: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        fused = _FUSED_EXPERTS.match(name)
        if not fused:
            unfused[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            if fused[2] == "down_proj":
                unfused[f"{fused[1]}{number}.down_proj.weight"] = expert
            else:
                gate, up = expert.chunk(2)
                unfused[f"{fused[1]}{number}.gate_proj.weight"] = gate
                unfused[f"{fused[1]}{number}.up_proj.weight"] = up
    return unfused


def expected_shapes(config: Mapping[str, Any], own_parts: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return shapes by name in files of a Hugging Face config and of our `own_parts`."""
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig(**config))
        vision, text = model.config.vision_config, model.config.text_config
        assert isinstance(vision, InternVLVisionConfig) and text is not None and not isinstance(text, dict)
        modules: dict[str, Callable[[], nn.Module]] = {
            "compressed_connector": lambda: CompressedConnector(vision.hidden_size, text.hidden_size),
            "router": lambda: Router(vision.hidden_size),
        }
        tensors = unfused_experts(model.state_dict())
        for part in own_parts:
            tensors |= {f"{part}.{name}": tensor for name, tensor in modules[part]().state_dict().items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _refuse_more_parts_than_tensors(num_tensors: int, config: Mapping[str, Any], folder: str) -> None:
    """Raise UserError if the config has more layers, or experts in one, than the files have tensors.

    Building them takes hours, even on the meta device.
    """
    vision, text = config["vision_config"], config["text_config"]
    numbers = {
        "vision_config.num_hidden_layers": vision.get("num_hidden_layers"),
        "text_config.num_hidden_layers": text.get("num_hidden_layers"),
        "text_config.num_experts": text.get("num_experts") or text.get("num_local_experts"),
    }
    for field, number in numbers.items():
        if isinstance(number, int) and number > num_tensors:
            raise UserError(
                f"{folder}: config.json has {field}={number}, but the weights hold only {num_tensors} "
                "tensors; copy the model folder again"
            )


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], folder: str) -> None:
    """Raise UserError unless the files hold exactly the tensors of the config.

    The message has the count and the first five names of each fault. The weight of a tied head may be
    present or not.
    """
    present = [part for part in OWN_PARTS if any(name.startswith(f"{part}.") for name in shapes)]
    for part in OWN_PARTS:
        if config.get("vico", {}).get(part) and part not in present:
            raise UserError(
                f"{folder}: config.json promises a {part.replace('_', ' ')}, but the weights hold none of "
                "its tensors; copy the whole folder again, or take the promise out of config.json"
            )
    _refuse_more_parts_than_tensors(len(shapes), config, folder)
    try:
        expected = expected_shapes(config, present)
    except Exception as error:  # transformers raises anything for a config that contradicts itself
        raise UserError(
            f"{folder}: config.json describes no model that can be built ({one_line(error)}); copy the model "
            "folder again"
        ) from error
    if config.get("tie_word_embeddings") and HEAD not in shapes:
        del expected[HEAD]
    names_by_fault = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "surplus": sorted(shapes.keys() - expected.keys()),
        "wrongly shaped": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in sorted(expected.items())
            if name in shapes and shapes[name] != shape
        ],
    }
    faults = [
        f"{len(names)} {fault} tensors in the weights: {', '.join(names[:_SHOWN])}"
        for fault, names in names_by_fault.items()
        if names
    ]
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}. The weights do not belong to this config.json")
