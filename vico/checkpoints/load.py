"""Open a model folder in any layout: base model, compressed connector and router from the same files."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from vico.checkpoints.expected_tensors import OWN_PREFIXES, checked_tensors
from vico.checkpoints.hub import model_folder
from vico.checkpoints.layouts import tensors_in_our_layout
from vico.errors import UserError
from vico.model.internvl import VicoModel
from vico.model_files import model_config, weight_files
from vico.settings import load_settings


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> VicoModel:
    """Return the model of a folder or Hub id, in eval mode, with connector and router if its files have them.

    A folder may have any layout of `vico/checkpoints/layouts.py`; a Hub id (`owner/name`) is fetched once.
    Raises UserError, before any weight is read, for missing, surplus or wrongly shaped tensors (naming the
    first five and their count) and for damaged files.
    """
    folder = model_folder(path)
    settings = load_settings(folder)
    checked_tensors(folder)
    config = InternVLConfig(**model_config(folder))
    tensors = tensors_in_our_layout(_read_tensors(folder))
    own = {key: tensors.pop(key).to(dtype) for key in list(tensors) if key.startswith(OWN_PREFIXES)}
    model = VicoModel(_base_model(config, tensors, dtype), settings)
    prefixes = {key.split(".", 1)[0] for key in own}
    if "compressed_connector" in prefixes:
        model.add_compressed_connector(0)
    if "router" in prefixes:
        model.add_router(0)
    model.load_state_dict(own, strict=False)
    return model.to(device).eval()


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


def _base_model(
    config: InternVLConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> InternVLForConditionalGeneration:
    transformers_logging.disable_progress_bar()  # one bar per load, rank and actor would fill the logs
    loaded: Any = InternVLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    base, report = loaded  # output_loading_info returns a pair, which the declared return type omits
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    epsilon = getattr(base.config.vision_config, "qk_norm_eps", None)
    if epsilon is not None:  # the published q/k norm; transformers has a fixed epsilon
        for layer in base.model.vision_tower.encoder.layer:
            layer.attention.q_norm.variance_epsilon = layer.attention.k_norm.variance_epsilon = epsilon
    return base
