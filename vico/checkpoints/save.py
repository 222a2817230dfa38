"""Write a model in memory as a folder in Hugging Face layout, with connector and router in the same file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vico.checkpoints.expected_tensors import EMBEDDING, HEAD, OWN_PARTS, unfused_experts
from vico.checkpoints.write import TEXT_SUFFIXES, copy_files, write_config
from vico.model_files import model_config


def save_model(
    state: Mapping[str, torch.Tensor],
    source: str | Path,
    folder: str | Path,
    vico_settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder from a VicoModel state dict; config and tokenizer files come from `source`.

    `vico_settings` are added to config.json under `vico` (for example the router's threshold). The weights
    of a tied head are stored once.
    """
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    copy_files(source, folder, TEXT_SUFFIXES)
    config = model_config(source)
    own = {part: any(key.startswith(f"{part}.") for key in state) for part in OWN_PARTS}
    config["vico"] = {**config.get("vico", {}), **own, **(vico_settings or {})}
    write_config(folder, config)
    tensors = unfused_experts({key.removeprefix("base."): tensor for key, tensor in state.items()})
    if HEAD in tensors and tensors[HEAD].data_ptr() == tensors[EMBEDDING].data_ptr():
        del tensors[HEAD]
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
