"""The sizes and limits of a model that pictures and prompts depend on, read without torch or transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vico.errors import UserError, one_line
from vico.memory.config_numbers import is_whole, tile_side
from vico.model_files import check_weights_folder, model_config, raw_config, read_json
from vico.published_config import is_published
from vico.tiling import IMAGENET_MEAN, IMAGENET_STD, Tiling


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of one model and limits of its tiling.

    `tile_size` is in pixels. A tile has `vision_tokens` in the vision tower, `tokens_full` (1/4 of them) at
    the full rate and `tokens_compressed` (1/16) at the compressed rate. `image_token_id` is -1 for a
    published folder without a tokenizer.
    """

    tile_size: int
    tokens_full: int
    tokens_compressed: int
    vision_tokens: int
    image_token_id: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    vocab_size: int

    def tiling(self, max_tiles: int | None = None) -> Tiling:
        """Return the model's tiling, with at most `max_tiles` tiles if that is lower than its own limit."""
        limit = self.max_tiles if max_tiles is None else min(max_tiles, self.max_tiles)
        return _tiling(self.tile_size, max(limit, self.min_tiles), self.min_tiles, self.use_thumbnail)


_tiling = lru_cache(maxsize=64)(Tiling)  # every row asks for one


def load_settings(path: str | Path) -> ModelSettings:
    """Return the settings of the model folder at `path`; raise UserError naming file and field at fault.

    A folder in the published layout without a tokenizer opens, but encodes no text.
    """
    folder = check_weights_folder(path)
    config_path = folder / "config.json"
    config, written = model_config(folder), raw_config(folder)
    vision = config["vision_config"]
    tile_size, patch_size = tile_side(vision["image_size"]), tile_side(vision["patch_size"])
    image_token_id = config.get("image_token_id", -1 if is_published(written) else None)
    if not is_whole(image_token_id):
        raise UserError(
            f"{config_path}, or the tokenizer beside it: image_token_id={image_token_id!r} is not a whole "
            "number; copy the model folder again"
        )
    side, shuffle = tile_size // patch_size, round(1 / config.get("downsample_ratio", 0.5))
    try:
        min_tiles, max_tiles = _tile_limits(folder, written)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{folder}: config.json or the processor's config beside it has a number in another form "
            f"({one_line(error)}); copy the model folder again"
        ) from error
    return ModelSettings(
        tile_size=tile_size,
        tokens_full=(side // shuffle) ** 2,
        tokens_compressed=(side // shuffle**2) ** 2,
        vision_tokens=side * side,
        image_token_id=image_token_id,
        min_tiles=min_tiles,
        max_tiles=max_tiles,
        use_thumbnail=bool(written.get("use_thumbnail", True)),
        vocab_size=config["text_config"]["vocab_size"],
    )


def _tile_limits(folder: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return (fewest, most) tiles per picture from the image processor; 1 and 12, InternVL's, without it."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            processor = read_json(path)
            processor = processor.get("image_processor", processor)
            _check_normalisation(path, processor)
            if "max_patches" in processor:
                return _limits(path, processor, "min_patches", "max_patches")
    return _limits(folder / "config.json", config, "min_dynamic_patch", "max_dynamic_patch")


def _limits(path: Path, config: Mapping[str, Any], fewest: str, most: str) -> tuple[int, int]:
    limits = (config.get(fewest, 1), config.get(most, 12))
    if not all(map(is_whole, limits)) or not 1 <= limits[0] <= limits[1]:
        raise UserError(
            f"{path}: {fewest}={limits[0]!r} and {most}={limits[1]!r} are not numbers of tiles, at least 1 "
            "and in this order; copy the model folder again"
        )
    return limits


def _check_normalisation(path: Path, processor: Mapping[str, Any]) -> None:
    """Raise UserError unless tiles are normalised with ImageNet's constants and resized bicubically."""
    for field, supported in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        values = processor.get(field)
        if values is not None and any(abs(a - b) > 1e-4 for a, b in zip(values, supported, strict=True)):
            raise UserError(
                f"{path}: {field}={values} is not supported, only ImageNet's {list(supported)} is"
            )
    if processor.get("resample", 3) != 3:
        raise UserError(f"{path}: resample={processor['resample']} is not supported, only 3 (bicubic) is")
