"""The files of a model folder, read without torch or transformers: which must exist, and config.json."""

import os
import re
from pathlib import Path
from typing import Any

from vico.bounded_text import bounded_json
from vico.errors import UserError, one_line
from vico.memory.config_numbers import HUGGING_FACE, check_numbers, check_parts
from vico.published_config import LANGUAGE_MODELS, hf_config, is_published
from vico.special_tokens import IMAGE_TOKEN

_WEIGHT_NAME = re.compile(r"[^/\\.][^/\\]*\.safetensors")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_BYTES = dict.fromkeys(
    ("tokenizer.json", "vocab.json", "added_tokens.json", "model.safetensors.index.json"), 2**28
)


def check_model_folder(path: str | Path, field: str = "model") -> Path:
    """Return the folder as a Path; raise UserError if config, weights or tokenizer are missing.

    `field` is what the user gave the path as, for the message.
    """
    folder = check_weights_folder(path, field)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{field}={folder} has no tokenizer.json; copy the tokenizer's files there")
    return folder


def check_weights_folder(path: str | Path, field: str = "model") -> Path:
    """Return the folder as a Path; raise UserError if config or weights are missing. `field` as in
    `check_model_folder`."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{field}={folder} is not a folder; give the folder of an InternVL checkpoint")
    if not (folder / "config.json").is_file():
        raise UserError(f"{field}={folder} has no config.json; give an InternVL checkpoint's folder")
    refuse_outside_links(folder)
    if not weight_files(folder):
        raise UserError(f"{field}={folder} has no model.safetensors (or index); copy the weights there")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, sorted by name; empty if there are none.

    Raises UserError if the weights' index names a file that is missing or not in the folder: its content
    would not enter the model's fingerprint.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _indexed_names(index)
        for name in names:
            refuse_outside_link(folder / name)
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder / name} is named in {index.name} but missing; copy the weights again"
                )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    refuse_outside_link(single)
    return [single] if single.is_file() else []


def _indexed_names(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else [names]
    for name in names:
        if not isinstance(name, str) or not _WEIGHT_NAME.fullmatch(name):
            raise UserError(
                f"{index}: weight_map names {str(name)[:60]!r}, which is not a *.safetensors file in this "
                "folder; copy the weights into the folder and name them without a path"
            )
    return sorted(set(names))


def refuse_outside_links(folder: Path) -> None:
    """Raise UserError if a file in a model folder is a link out of it, except into the `blobs` of its own
    Hugging Face cache."""
    for path in folder.iterdir():
        refuse_outside_link(path)


def refuse_outside_link(path: Path, folder: Path | None = None) -> None:
    """Raise UserError if `path` is a link out of a model folder (None: the folder it is in), as
    `refuse_outside_links` says."""
    if not path.is_symlink():
        return
    folder, target = Path(os.path.realpath(folder or path.parent)), Path(os.path.realpath(path))
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
        raise UserError(
            f"{path} is a link to {target}, outside the folder {folder}; copy the file into the folder"
        )


def tokenizer_files(path: str | Path) -> list[Path]:
    """Return the files that decide how text becomes tokens, sorted by name.

    Raises UserError if one is a link out of the folder, is beyond the limits of a JSON file, or names other
    files.
    """
    paths = sorted(Path(path) / name for name in _TOKENIZER_FILES if (Path(path) / name).is_file())
    for file in paths:
        refuse_outside_link(file)
        if file.suffix == ".json" and "fast_tokenizer_files" in read_json(file):
            raise UserError(
                f"{file}: fast_tokenizer_files names other files than tokenizer.json; remove that entry"
            )
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder; raise UserError if it is not valid JSON, not an
    object, or beyond the limits of size, depth and numbers."""
    max_bytes = _MAX_BYTES.get(path.name, _MAX_CONFIG_BYTES)
    remedy = "copy the model folder again"
    if path.stat().st_size > max_bytes:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than {max_bytes}; {remedy}")
    try:
        content = bounded_json(path.read_text(encoding="utf-8"), max_bytes)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} instead of an object; {remedy}")
    return content


def raw_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json as written, in whichever layout."""
    return read_json(folder / "config.json")


def model_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json in Hugging Face form, converted if it has the published layout.

    Raises UserError for a model that this project does not support.
    """
    path = folder / "config.json"
    config = read_json(path)
    try:
        return _hf_form(config, folder, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(
            f"{path}, or the tokenizer beside it, lacks a field or has it in another form "
            f"({type(error).__name__}: {one_line(error)}); copy the model folder again"
        ) from error


def _hf_form(config: dict[str, Any], folder: Path, path: Path) -> dict[str, Any]:
    if is_published(config):
        return hf_config(config, token_id(folder, IMAGE_TOKEN), str(path))
    if config.get("model_type") != "internvl":
        raise UserError(
            f"{path}: model_type={config.get('model_type')!r} is neither 'internvl' (Hugging Face layout) "
            "nor a published InternVLChatModel config with llm_config; give an InternVL model"
        )
    check_parts(config, HUGGING_FACE, str(path))
    text = config["text_config"]
    if text.setdefault("model_type", "qwen2") not in LANGUAGE_MODELS.values():
        raise UserError(
            f"{path}: text_config.model_type={text['model_type']!r} is not supported; give a model with one "
            f"of {', '.join(LANGUAGE_MODELS.values())}"
        )
    check_numbers(config, HUGGING_FACE, text["model_type"], str(path))
    # transformers 4 took this from the text config; transformers 5 takes a missing key for True
    config.setdefault("tie_word_embeddings", bool(text.get("tie_word_embeddings", False)))
    return config


def token_id(folder: Path, token: str) -> int | None:
    """Return the id of an added token in the tokenizer's files, or None if they do not have it."""
    path = folder / "tokenizer.json"
    if path.is_file():
        for added in read_json(path).get("added_tokens", []):
            if added["content"] == token:
                return int(added["id"])
    path = folder / "added_tokens.json"
    return read_json(path).get(token) if path.is_file() else None


def stored_threshold(folder: Path) -> float:
    """Return the calibrated threshold on P(compress) from config.json; raise UserError if it has none."""
    threshold = model_config(folder).get("vico", {}).get("absolute_threshold")
    if threshold is None:
        raise UserError(
            f"{folder}/config.json has no vico.absolute_threshold or flash_absolute_threshold; give "
            "--threshold, or a folder that the export stage wrote"
        )
    return float(threshold)


def sequence_limit(folder: Path) -> int | None:
    """Return the most tokens of a sequence if longer ones change the model's rotary frequencies, else None.

    With `dynamic` and `longrope` scaling they depend on the longest sequence of a batch. Sequences that are
    packed together would then depend on each other.
    """
    text = model_config(folder)["text_config"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in ("dynamic", "longrope"):
        return None
    limits = (text.get("max_position_embeddings"), rope.get("original_max_position_embeddings"))
    return min((int(limit) for limit in limits if limit), default=None)


def total_tokens_limit(folder: Path) -> int:
    """Return how many tokens a model takes in prompt and answer together, by its config.json."""
    return int(model_config(folder)["text_config"].get("max_position_embeddings", 32768))
