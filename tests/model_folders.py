"""Model folders for tests of layouts: with a router, written in a layout, or changed in one way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vico.checkpoints import load_model
from vico.checkpoints.save import save_model

THRESHOLD = 0.375
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def routed_model(base: Path, folder: Path) -> Path:
    """Write a policy with random connector and router and a threshold, as an export does; return `folder`."""
    model = load_model(base)
    model.add_compressed_connector(1)
    model.add_router(2)
    save_model(model.state_dict(), base, folder, {"absolute_threshold": THRESHOLD})
    return folder


def written_folder(write: Callable[..., None], source: Path, folder: Path, **options: Any) -> Path:
    """Write `source` to the new `folder` with a writer of a layout; return `folder`."""
    folder.mkdir()
    write(source, folder, **options)
    return folder


def changed_copy(folder: Path, copy: Path, change: Change) -> Path:
    """Copy the model folder with `change(config, tensors)` applied; return `copy`."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    tensors = load_file(copy / "model.safetensors")
    change(config, tensors)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "model.safetensors")
    return copy
