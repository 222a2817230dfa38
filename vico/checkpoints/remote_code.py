"""The Python files beside an exported model, with which plain transformers opens it and routes."""

import json
import shutil
from pathlib import Path
from typing import Any

import vico
from vico.settings import ModelSettings

_CODE = (
    "model/modeling_vico.py",
    "model/connectors.py",
    "model/router.py",
    "processing_vico.py",
    "tiling.py",
)
_MODEL = {"AutoModelForImageTextToText": "modeling_vico.VicoForConditionalGeneration"}
_PROCESSOR = {"AutoProcessor": "processing_vico.VicoProcessor"}


def write_remote_code(folder: Path, config: dict[str, Any], settings: ModelSettings) -> None:
    """Copy the code into a folder in Hugging Face layout, and name it in `config` and processor_config.json.

    Without `trust_remote_code`, transformers ignores it and opens the folder at the full rate.
    """
    package = Path(vico.__path__[0])
    for name in _CODE:
        shutil.copyfile(package / name, folder / Path(name).name)
    config["auto_map"] = {**_MODEL, **_PROCESSOR}
    path = folder / "processor_config.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    processor = {
        "processor_class": "InternVLProcessor",  # what opens the folder without our code
        "image_seq_length": settings.tokens_full,
        **written,
        "auto_map": _PROCESSOR,
        "image_settings": {
            "tile_size": settings.tile_size,
            "tokens_full": settings.tokens_full,
            "min_tiles": settings.min_tiles,
            "max_tiles": settings.max_tiles,
            "use_thumbnail": settings.use_thumbnail,
        },
    }
    path.write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
