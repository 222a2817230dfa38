"""Write a model folder in a layout from a folder in any layout: names, config and files beside the weights.

The export stage and `vico export` call this. Weights are copied range by range
(`vico/checkpoints/tensor_files.py`); Python files of a checkpoint are copied, never run. config.json is
written last: a folder without it opens nowhere.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vico.checkpoints.expected_tensors import EMBEDDING, HEAD, OWN_PARTS, OWN_PREFIXES, checked_tensors
from vico.checkpoints.internlm2 import HEAD as INTERNLM2_HEAD
from vico.checkpoints.internlm2 import internlm2_tensors
from vico.checkpoints.layouts import parts_by_published_name
from vico.checkpoints.remote_code import write_remote_code
from vico.checkpoints.tensor_files import SHARD_BYTES, StoredTensor, stored_tensors, write_tensor_files
from vico.errors import UserError
from vico.model_files import model_config, raw_config, read_json, token_id
from vico.published_config import INTERNLM2, is_published, language_architecture, published_config
from vico.settings import ModelSettings, load_settings
from vico.special_tokens import TURN_END
from vico.tiling import IMAGENET_MEAN, IMAGENET_STD

TEXT_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt"})
_PUBLISHED_HEAD = "language_model.lm_head.weight"
_PUBLISHED_HEADS = {_PUBLISHED_HEAD, INTERNLM2_HEAD}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_hf_folder(
    source: Path,
    folder: Path,
    *,
    router_file: Path | None = None,
    absolute_threshold: float | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write Hugging Face's layout, with connector and router if the source has them.

    `router_file` holds a router (keys `router.*`) trained for the source. Plain transformers opens the
    folder at the full rate; with our Python files, which a folder with a threshold gets, it routes. The
    threshold is stored in config.json under `vico`.
    """
    tensors = checked_tensors(source, router_file)
    config = model_config(source)
    config["dtype"] = _dtype(tensors)
    own = {part: any(name.startswith(f"{part}.") for name in tensors) for part in OWN_PARTS}
    threshold = {} if absolute_threshold is None else {"absolute_threshold": absolute_threshold}
    config["vico"] = {**config.get("vico", {}), **own, **threshold}
    write_tensor_files(folder, {name: (tensor,) for name, tensor in tensors.items()}, shard_bytes)
    copy_files(source, folder, TEXT_SUFFIXES)
    _write_generation_config(folder, config)
    settings = load_settings(source)
    _write_image_processor(folder, settings)
    if all(own.values()) and "absolute_threshold" in config["vico"]:
        write_remote_code(folder, config, settings)
    write_config(folder, config)


def _write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Let transformers end an answer at its end of turn, besides the tokens that the source names.

    Pretrained checkpoints name only the end of a text, and InternVL's own code gives the end of turn itself.
    """
    path = folder / "generation_config.json"
    content = read_json(path) if path.is_file() else {}
    named = content.get("eos_token_id", config["text_config"].get("eos_token_id"))
    ends = [token_id(folder, TURN_END), *(named if isinstance(named, list) else [named])]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if ends:
        content["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_image_processor(folder: Path, settings: ModelSettings) -> None:
    """Write image settings for transformers, unless the source already had those of this processor."""
    path = folder / "preprocessor_config.json"
    if (folder / "processor_config.json").is_file() or (path.is_file() and "GotOcr2" in path.read_text()):
        return
    processor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "min_patches": settings.min_tiles,
        "max_patches": settings.max_tiles,
        "resample": 3,
        "size": {"height": settings.tile_size, "width": settings.tile_size},
    }
    path.write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def write_published_folder(
    source: Path,
    folder: Path,
    *,
    base: Path | None = None,
    absolute_threshold: float | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the published layout: Flash if the source has connector and router, custom if it has neither.

    `base` is the checkpoint that the source was trained from. If it has the published layout, its config,
    chat template and Python files are copied, and the language model gets its tensor names. A Flash folder
    needs the router's threshold. Raises UserError without it, or if the source has only one of connector and
    router.
    """
    tensors = checked_tensors(source)
    absolute_threshold = _flash_threshold(source, tensors, absolute_threshold)
    if base is not None and not is_published(raw_config(base)):
        base = None
    settings = load_settings(source)
    tiling = {
        "min_dynamic_patch": settings.min_tiles,
        "max_dynamic_patch": settings.max_tiles,
        "use_thumbnail": settings.use_thumbnail,
    }
    base_config = None if base is None else raw_config(base)
    source_config = model_config(source)
    config = published_config(source_config, tiling, _dtype(tensors), base_config, absolute_threshold)
    published = {
        name: tuple(tensors[part] for part in parts)
        for name, parts in parts_by_published_name(tensors).items()
    }
    if base is not None and HEAD not in tensors and _PUBLISHED_HEADS & stored_tensors(base).keys():
        published[_PUBLISHED_HEAD] = (tensors[EMBEDDING],)  # the base stores its tied head too
    if language_architecture(config) == INTERNLM2:
        published = internlm2_tensors(published, source_config["text_config"])
    write_tensor_files(folder, published, shard_bytes)
    copy_files(source, folder, TEXT_SUFFIXES)
    if base is not None:
        copy_files(base, folder, TEXT_SUFFIXES | {".py"})
    write_config(folder, config)


def _flash_threshold(source: Path, tensors: Collection[str], threshold: float | None) -> float | None:
    """Return the threshold of a Flash folder or None for a custom one; raise UserError if half is missing."""
    present = [prefix for prefix in OWN_PREFIXES if any(name.startswith(prefix) for name in tensors)]
    if not present:
        return None
    if len(present) < len(OWN_PREFIXES):
        raise UserError(
            f"{source} holds {present[0]}* but not all of {', '.join(f'{p}*' for p in OWN_PREFIXES)}; "
            "the Flash layout needs connector and router"
        )
    if threshold is None:
        threshold = model_config(source).get("vico", {}).get("absolute_threshold")
    if threshold is None:
        raise UserError(
            f"{source}/config.json has no vico.absolute_threshold; "
            "the Flash layout needs the router's threshold"
        )
    return threshold


def copy_files(source: Path, folder: Path, suffixes: Collection[str]) -> None:
    """Copy the source's top-level files with these suffixes, except config.json and the weights' index."""
    for file in sorted(source.iterdir()):
        matches = file.suffix in suffixes and file.name != "config.json" and "safetensors" not in file.name
        if matches and file.is_file():
            shutil.copyfile(file, folder / file.name)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _dtype(tensors: Mapping[str, StoredTensor]) -> str:
    stored = tensors[EMBEDDING].dtype
    if stored not in _DTYPES:
        raise UserError(f"weights of dtype {stored} are not supported, only {', '.join(_DTYPES)} are")
    return _DTYPES[stored]
