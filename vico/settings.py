"""What a model folder says about pictures and tokens, read without torch or transformers: planning stays
light."""

import json
from dataclasses import dataclass
from pathlib import Path

from vico.errors import UserError
from vico.published_config import LANGUAGE_MODELS, hf_config, is_published
from vico.tiling import IMAGENET_MEAN, IMAGENET_STD, Tiling

IMAGE_START, IMAGE_END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_MARK = "<image>"  # in the text of a conversation: a picture
TEMPLATE = "chatml-1"  # moves the tokenizer's fingerprint when vico/prompt.py changes what it writes
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of one model: `tile_size` in pixels, tokens a tile at both rates, ids and limits of the tiling.

    `tokens_full` is the count at rate 1/4 of the vision tokens, `tokens_compressed` at rate 1/16.
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
        """The tiling of this model, with at most `max_tiles` tiles where that is fewer than the model's own
        limit."""
        limit = self.max_tiles if max_tiles is None else min(max_tiles, self.max_tiles)
        return Tiling(self.tile_size, max(limit, self.min_tiles), self.min_tiles, self.use_thumbnail)


def _pair(value: int | list[int], path: Path, field: str) -> int:
    sides = list(value) if isinstance(value, list) else [value, value]
    if len(set(sides)) != 1:
        raise UserError(f"{path}: {field}={value} is not square; only square tiles and patches are supported")
    return int(sides[0])


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the model folder again") from error


def check_model_folder(path: str | Path) -> Path:
    """The folder as a Path, after a look at the files that a pipeline needs; UserError names the first that
    is missing.
    """
    folder = _weights_folder(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"inputs.model={folder} has no tokenizer.json; copy the tokenizer's files there")
    return folder


def _weights_folder(path: str | Path) -> Path:
    """The folder as a Path, if it holds a config and weights."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"inputs.model={folder} is not a folder; give the folder of an InternVL checkpoint")
    if not (folder / "config.json").is_file():
        raise UserError(f"inputs.model={folder} has no config.json; give an InternVL checkpoint's folder")
    if not weight_files(folder):
        raise UserError(f"inputs.model={folder} has no model.safetensors (or index); copy the weights there")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of the index where there is one; empty if there
    are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(_json(index)["weight_map"].values()))
        for name in files:
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder / name} is named in {index.name} but missing; copy the weights again"
                )
        return [folder / name for name in files]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def tokenizer_files(path: str | Path) -> list[Path]:
    """The files that decide how text becomes tokens, sorted by name."""
    return sorted(Path(path) / name for name in _TOKENIZER_FILES if (Path(path) / name).is_file())


def written_config(folder: Path) -> dict:
    """The folder's config.json as it stands there."""
    return _json(folder / "config.json")


def model_config(folder: Path) -> dict:
    """The folder's config.json in Hugging Face form, whichever layout it is written in."""
    path = folder / "config.json"
    config = _json(path)
    if is_published(config):
        return hf_config(config, _image_token_id(folder), str(path))
    if config.get("model_type") != "internvl":
        raise UserError(
            f"{path}: model_type={config.get('model_type')!r} is neither 'internvl' (Hugging Face layout) "
            "nor a published InternVLChatModel config with llm_config; give an InternVL model"
        )
    text = config.get("text_config", {})
    if text.setdefault("model_type", "qwen2") not in LANGUAGE_MODELS.values():
        raise UserError(
            f"{path}: text_config.model_type={text['model_type']!r} is none of "
            f"{', '.join(LANGUAGE_MODELS.values())}; this language model is not supported"
        )
    # transformers 4 went by the text config, and 5 takes a missing key for True
    config.setdefault("tie_word_embeddings", bool(text.get("tie_word_embeddings", False)))
    return config


def _image_token_id(folder: Path) -> int | None:
    """The id of the image token by the tokenizer's own files; None without a tokenizer."""
    path = folder / "tokenizer.json"
    if path.is_file():
        for token in _json(path).get("added_tokens", []):
            if token["content"] == IMAGE_TOKEN:
                return int(token["id"])
    path = folder / "added_tokens.json"
    return _json(path).get(IMAGE_TOKEN) if path.is_file() else None


def load_settings(path: str | Path) -> ModelSettings:
    """Settings of the model folder at `path`; UserError names file and field where something is missing.

    A folder without a tokenizer in the published layout gives `image_token_id` -1: it opens, but takes no
    text.
    """
    folder = _weights_folder(path)
    config_path = folder / "config.json"
    config, written = model_config(folder), _json(config_path)
    try:
        vision, text = config["vision_config"], config["text_config"]
        tile_size = _pair(vision["image_size"], config_path, "vision_config.image_size")
        patch = _pair(vision["patch_size"], config_path, "vision_config.patch_size")
        ratio = float(config.get("downsample_ratio", 0.5))
        vocab_size = int(text["vocab_size"])
        image_token_id = int(config["image_token_id"]) if not is_published(written) else -1
    except KeyError as error:
        raise UserError(
            f"{config_path} has no field {error}; this is not an InternVL config in HF layout"
        ) from error
    image_token_id = config.get("image_token_id", image_token_id)
    side = tile_size // patch
    shuffle = round(1 / ratio)
    if side % (shuffle * shuffle):
        raise UserError(
            f"{config_path}: image_size={tile_size} and patch_size={patch} give {side} patches a side, no "
            f"multiple of {shuffle**2}, which the compressed rate needs at downsample_ratio={ratio}"
        )
    limits = _tile_limits(folder, written)
    return ModelSettings(
        tile_size=tile_size,
        tokens_full=(side // shuffle) ** 2,
        tokens_compressed=(side // shuffle**2) ** 2,
        vision_tokens=side * side,
        image_token_id=image_token_id,
        min_tiles=limits[0],
        max_tiles=limits[1],
        use_thumbnail=bool(written.get("use_thumbnail", True)),
        vocab_size=vocab_size,
    )


def _tile_limits(folder: Path, config: dict) -> tuple[int, int]:
    """(fewest, most) tiles a picture from the image processor's settings; InternVL's own 1 and 12 without the
    file."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            found = _json(path)
            found = found.get("image_processor", found)
            _check_normalisation(path, found)
            if "max_patches" in found:
                return int(found.get("min_patches", 1)), int(found["max_patches"])
    return int(config.get("min_dynamic_patch", 1)), int(config.get("max_dynamic_patch", 12))


def _check_normalisation(path: Path, processor: dict) -> None:
    """Tiles are normalised the ImageNet way and resized bicubically; a model that wants otherwise is
    refused.
    """
    for field, wanted in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        given = processor.get(field)
        if given is not None and any(abs(a - b) > 1e-4 for a, b in zip(given, wanted, strict=True)):
            raise UserError(f"{path}: {field}={given} is not supported, only ImageNet's {list(wanted)} is")
    if processor.get("resample", 3) != 3:
        raise UserError(f"{path}: resample={processor['resample']} is not supported, only 3 (bicubic) is")


def own_threshold(model: Path) -> float:
    """The calibrated threshold in a model folder's config.json."""
    threshold = model_config(model).get("vico", {}).get("absolute_threshold")
    if threshold is None:
        raise UserError(
            f"{model}/config.json has no vico.absolute_threshold or flash_absolute_threshold; give "
            "--threshold, or a folder that the export stage wrote"
        )
    return float(threshold)
