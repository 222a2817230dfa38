"""Open a model folder in any layout: base model, compressed connector and router from the same files.

`load_model` reads the whole model. `open_unread` reads no weight: each is read when it is needed.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, InternVLConfig, InternVLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from vico.checkpoints.expected_tensors import (
    EMBEDDING,
    HEAD,
    OWN_PREFIXES,
    checked_tensors,
    unfused_experts,
)
from vico.checkpoints.hub import model_folder
from vico.checkpoints.internlm2 import llama_tensors
from vico.checkpoints.layouts import tensors_in_our_layout
from vico.checkpoints.tensor_files import StoredTensor, read_into
from vico.errors import UserError
from vico.model.internvl import VicoModel
from vico.model.unread import unread
from vico.model_files import model_config, weight_files
from vico.settings import load_settings

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> VicoModel:
    """Return the model of a folder or Hub id, in eval mode, with connector and router if its files have them.

    A folder may have any layout of `vico/checkpoints/layouts.py`; a Hub id (`owner/name`) is fetched once.
    Raises UserError, before any weight is read, for missing, surplus or wrongly shaped tensors (naming the
    first five and their count) and for damaged files.
    """
    folder = model_folder(path)
    settings = load_settings(folder)
    checked_tensors(folder)
    config = model_config(folder)
    tensors = tensors_in_our_layout(llama_tensors(_read_tensors(folder), config["text_config"], _joined))
    own = {key: tensors.pop(key).to(dtype) for key in list(tensors) if key.startswith(OWN_PREFIXES)}
    model = VicoModel(_base_model(InternVLConfig(**config), tensors, dtype), settings)
    _add_own_parts(model, own)
    model.load_state_dict(own, strict=False)
    return model.to(device).eval()


def open_unread(path: str | Path, dtype: torch.dtype = torch.float32) -> VicoModel:
    """Return what `load_model` returns, except that its parameters are unread (`vico/model/unread.py`).

    Buffers are on the CPU. Raises UserError as `load_model` does, and when a parameter is read from a file
    that has changed.
    """
    folder = model_folder(path)
    settings = load_settings(folder)
    tensors = checked_tensors(folder)
    config = InternVLConfig(**model_config(folder))
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        _set_norm_epsilon(base)
        model = VicoModel(base, settings)
        _add_own_parts(model, tensors)
    for part in base.modules():
        if any(buffer.is_meta for buffer in part.buffers(recurse=False)):
            # rotary frequencies: in no file, they follow from the config
            part._buffers.update(type(part)(part.config)._buffers)
    head = model.lm_head
    if head.weight is base.get_input_embeddings().weight and HEAD in tensors:
        # transformers does not tie weights that a checkpoint stores twice with different values
        embedding, separate = (_values(tensors[name], dtype) for name in (EMBEDDING, HEAD))
        if not torch.equal(embedding, separate):
            head.weight = torch.nn.Parameter(head.weight.data)
    _make_unread(model, tensors)
    return model.eval()


def _add_own_parts(model: VicoModel, names: Mapping[str, object]) -> None:
    """Add connector and router if the files have tensors of them."""
    prefixes = {name.split(".", 1)[0] for name in names}
    if "compressed_connector" in prefixes:
        model.add_compressed_connector(0)
    if "router" in prefixes:
        model.add_router(0)


def _make_unread(model: VicoModel, tensors: Mapping[str, StoredTensor]) -> None:
    """Replace every parameter by an unread one; tied parameters stay one object."""
    replaced: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for prefix, part in model.named_modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in replaced:
                in_files = f"{prefix}.{name}".removeprefix("base.")
                read = partial(_read_parameter, in_files, parameter.data, tensors)
                replaced[parameter] = unread(parameter, read)
            setattr(part, name, replaced[parameter])


def _read_parameter(name: str, empty: torch.Tensor, tensors: Mapping[str, StoredTensor]) -> torch.Tensor:
    """Return the values of a parameter in the dtype of `empty`; experts, which files keep apart, are fused
    in it."""
    values = torch.empty_like(empty, device="cpu")
    for stored_name, view in unfused_experts({name: values}).items():
        view.copy_(_values(tensors[stored_name], empty.dtype))
    return values


def _values(stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    if stored.dtype not in _DTYPES:
        raise UserError(
            f"{stored.path}: weights of dtype {stored.dtype} are not supported, only {', '.join(_DTYPES)} are"
        )
    content = torch.empty(stored.num_bytes, dtype=torch.uint8)
    read_into(stored, content.numpy().data)
    return content.view(_DTYPES[stored.dtype]).reshape(stored.shape).to(dtype)


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the folder's safetensors files; raise UserError if a file is cut short."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
    return tensors


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(pieces))


def _base_model(
    config: InternVLConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> InternVLForConditionalGeneration:
    transformers_logging.disable_progress_bar()  # one bar per load, rank and actor would fill the logs
    loaded: Any = InternVLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    base, report = loaded  # output_loading_info returns a pair, which the declared return type omits
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    _set_norm_epsilon(base)
    return base


def _set_norm_epsilon(base: InternVLForConditionalGeneration) -> None:
    """Set the published epsilon of the vision tower's q/k norm; transformers has a fixed one."""
    epsilon = getattr(base.config.vision_config, "qk_norm_eps", None)
    if epsilon is not None:
        for layer in base.model.vision_tower.encoder.layer:
            layer.attention.q_norm.variance_epsilon = layer.attention.k_norm.variance_epsilon = epsilon
