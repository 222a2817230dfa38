"""Model folders for tests of layouts: with a router, written in a layout, changed in one respect."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from vico.checkpoints import load_model
from vico.checkpoints.load import save_model

THRESHOLD = 0.375


def routed_model(base: Path, folder: Path) -> Path:
    """A policy with connector and router, both random, and a threshold, as the export stage leaves it."""
    model = load_model(base)
    model.add_compressed_connector(1)
    model.add_router(2)
    save_model(model.state_dict(), base, folder, {"absolute_threshold": THRESHOLD})
    return folder


def written(write, source: Path, folder: Path, **options) -> Path:
    folder.mkdir()
    write(source, folder, **options)
    return folder


def changed_copy(folder: Path, copy: Path, change) -> Path:
    """The model folder with `change(config, tensors)` applied."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    tensors = load_file(copy / "model.safetensors")
    change(config, tensors)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "model.safetensors")
    return copy
