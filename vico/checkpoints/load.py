"""Opening and writing model folders: Hugging Face layout, plus this project's connector and router in the
same file."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from vico.checkpoints.expected_tensors import OWN_PARTS, check_shapes, tensors_of_files
from vico.checkpoints.hub import model_folder
from vico.checkpoints.layouts import tensors_in_our_layout
from vico.checkpoints.tensor_files import StoredTensor, stored_tensors, tensors_of_file
from vico.errors import UserError
from vico.model.internvl import VicoModel
from vico.published_config import is_published
from vico.settings import load_settings, model_config, weight_files, written_config

OWN_PREFIXES = tuple(f"{part}." for part in OWN_PARTS)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's safetensors files; UserError names a file that is cut short."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
    return tensors


def checked_tensors(folder: Path, added: Path | None = None) -> dict[str, StoredTensor]:
    """The tensors of a folder's files under our names, none read; UserError where they are not those of its
    config.json. `added` is a file of tensors under our names that take the place of the folder's.
    """
    tensors = tensors_in_our_layout(stored_tensors(folder))
    if added is not None:
        tensors |= tensors_of_file(added)
    written = written_config(folder)
    own = sorted(name for name in tensors if name.startswith(OWN_PREFIXES))
    if own and is_published(written) and "flash_mode" not in written:
        raise UserError(
            f"{folder}: the weights hold {len(own)} tensors of connector and router, but config.json has no "
            "flash_mode; set flash_mode to true (or false for a model that never compresses)"
        )
    check_shapes({name: one.shape for name, one in tensors.items()}, model_config(folder), str(folder))
    return tensors


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> VicoModel:
    """The model of a folder, or of a Hub id (`owner/name`, fetched once), in any layout of `vico/checkpoints/layouts.py`,
    in eval mode, with connector and router where the files have them.

    Raises UserError for missing, surplus and wrongly shaped tensors (the first five and their count) and for
    damaged files, before any weight is read.
    """
    folder = model_folder(path)
    settings = load_settings(folder)
    checked_tensors(folder)
    config = InternVLConfig(**model_config(folder))
    tensors = tensors_in_our_layout(read_tensors(folder))
    own = {key: tensors.pop(key).to(dtype) for key in list(tensors) if key.startswith(OWN_PREFIXES)}
    transformers_logging.disable_progress_bar()  # a bar a load, on every rank and actor, is noise in logs
    base, report = InternVLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    _set_qk_norm_epsilon(base)
    model = VicoModel(base, settings)
    prefixes = {key.split(".", 1)[0] for key in own}
    if "compressed_connector" in prefixes:
        model.add_compressed_connector(0)
    if "router" in prefixes:
        model.add_router(0)
    model.load_state_dict(own, strict=False)
    return model.to(device).eval()


def _set_qk_norm_epsilon(base: InternVLForConditionalGeneration) -> None:
    """The vision tower's q/k norm as published, where its epsilon is not the one transformers fixes."""
    epsilon = getattr(base.config.vision_config, "qk_norm_eps", None)
    if epsilon is not None:
        for layer in base.model.vision_tower.encoder.layer:
            layer.attention.q_norm.variance_epsilon = layer.attention.k_norm.variance_epsilon = epsilon


def model_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VicoModel state dict under the keys of the file: `base.` dropped, experts single, contiguous."""
    tensors = tensors_of_files({key.removeprefix("base."): tensor for key, tensor in state.items()})
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def save_model(
    state: dict[str, torch.Tensor], source: str | Path, folder: str | Path, vico_settings: dict | None = None
) -> None:
    """Writes a model folder: tensors of a VicoModel state dict, everything else (config, tokenizer) from
    `source`.

    `vico_settings` stands in config.json under `vico` (for example the router's threshold). Tied heads are
    not stored twice.
    """
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix in {".json", ".txt", ".model", ".jinja"}
            and "safetensors" not in file.name
        ):
            shutil.copyfile(file, folder / file.name)
    config = model_config(source)
    own = {"compressed_connector": any(key.startswith("compressed_connector.") for key in state)}
    own["router"] = any(key.startswith("router.") for key in state)
    config["vico"] = {**config.get("vico", {}), **own, **(vico_settings or {})}
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    tensors = model_tensors(state)
    head, embedding = "lm_head.weight", "model.language_model.embed_tokens.weight"
    if head in tensors and tensors[head].data_ptr() == tensors[embedding].data_ptr():
        del tensors[head]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
