"""Model folders written in a layout, from a folder in any other: names, config and files beside the weights.

`vico export` calls this. Weights are copied range by range (`vico/checkpoints/tensor_files.py`), code of a checkpoint is
copied as files and never run. config.json is written last: a folder without it opens nowhere.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from vico.checkpoints.expected_tensors import HEAD, OWN_PARTS
from vico.checkpoints.layouts import published_plan
from vico.checkpoints.load import OWN_PREFIXES, checked_tensors
from vico.checkpoints.tensor_files import SHARD_BYTES, StoredTensor, stored_tensors, write_tensor_files
from vico.errors import UserError
from vico.published_config import is_published, published_config
from vico.settings import ModelSettings, load_settings, model_config, written_config
from vico.tiling import IMAGENET_MEAN, IMAGENET_STD

_EMBEDDING = "model.language_model.embed_tokens.weight"
_PUBLISHED_HEAD = "language_model.lm_head.weight"
_TEXT_FILES = frozenset({".json", ".jinja", ".model", ".txt"})
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_hf_folder(
    source: Path,
    folder: Path,
    *,
    router_file: Path | None = None,
    absolute_threshold: float | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes Hugging Face's layout, connector and router beside it where the source has them.

    `router_file` holds a router (keys `router.*`) trained for the source. Plain transformers opens the folder
    at the full rate. The threshold stands in config.json under `vico`.
    """
    tensors = checked_tensors(source, router_file)
    config = model_config(source)
    config["dtype"] = _dtype(tensors)
    own = {part: any(name.startswith(f"{part}.") for name in tensors) for part in OWN_PARTS}
    threshold = {} if absolute_threshold is None else {"absolute_threshold": absolute_threshold}
    config["vico"] = {**config.get("vico", {}), **own, **threshold}
    write_tensor_files(folder, {name: (one,) for name, one in tensors.items()}, shard_bytes)
    copy_files(source, folder, _TEXT_FILES)
    _write_image_processor(folder, load_settings(source))
    _write_config(folder, config)


def _write_image_processor(folder: Path, settings: ModelSettings) -> None:
    """Image settings that transformers reads, where what a published base brought is another processor's."""
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
    """Writes the published layout: Flash where the source has connector and router, custom where it has
    neither.

    `base` is the checkpoint that the source was trained from: if it is of the published layout, its config,
    chat template and Python files are taken over. A Flash folder needs the router's threshold.
    """
    tensors = checked_tensors(source)
    absolute_threshold = _flash_threshold(source, tensors, absolute_threshold)
    base_config = None
    if base is not None and is_published(written_config(base)):
        base_config = written_config(base)
    settings = load_settings(source)
    config = published_config(
        model_config(source),
        {
            "min_dynamic_patch": settings.min_tiles,
            "max_dynamic_patch": settings.max_tiles,
            "use_thumbnail": settings.use_thumbnail,
        },
        _dtype(tensors),
        base_config,
        absolute_threshold,
    )
    plan = {name: tuple(tensors[part] for part in parts) for name, parts in published_plan(tensors).items()}
    if base_config is not None and HEAD not in tensors and _PUBLISHED_HEAD in stored_tensors(base):
        plan[_PUBLISHED_HEAD] = (tensors[_EMBEDDING],)  # a tied head that the base stores all the same
    write_tensor_files(folder, plan, shard_bytes)
    copy_files(source, folder, _TEXT_FILES)
    if base_config is not None:
        copy_files(base, folder, _TEXT_FILES | {".py"})
    _write_config(folder, config)


def _flash_threshold(source: Path, tensors: Collection[str], given: float | None) -> float | None:
    """The threshold of a Flash folder, None for a custom one; UserError for half of what Flash needs."""
    present = [prefix for prefix in OWN_PREFIXES if any(name.startswith(prefix) for name in tensors)]
    if not present:
        return None
    if len(present) < len(OWN_PREFIXES):
        raise UserError(
            f"{source} holds {present[0]}* but not all of {', '.join(f'{p}*' for p in OWN_PREFIXES)}; "
            "the Flash layout needs connector and router"
        )
    threshold = model_config(source).get("vico", {}).get("absolute_threshold") if given is None else given
    if threshold is None:
        raise UserError(
            f"{source}/config.json has no vico.absolute_threshold; "
            "the Flash layout needs the router's threshold"
        )
    return threshold


def copy_files(source: Path, folder: Path, suffixes: Collection[str]) -> None:
    """Copies the source's top-level files of these suffixes, but for config.json and the weights' index."""
    for file in sorted(source.iterdir()):
        named = file.suffix in suffixes and file.name != "config.json" and "safetensors" not in file.name
        if named and file.is_file():
            shutil.copyfile(file, folder / file.name)


def _dtype(tensors: dict[str, StoredTensor]) -> str:
    stored = tensors[_EMBEDDING].dtype
    if stored not in _DTYPES:
        raise UserError(f"weights of dtype {stored} are not supported, only {', '.join(_DTYPES)} are")
    return _DTYPES[stored]


def _write_config(folder: Path, config: dict) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
