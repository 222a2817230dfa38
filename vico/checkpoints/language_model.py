"""The language model of a VicoModel as a folder of its own, in the plain layout that text engines open."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vico.checkpoints.expected_tensors import EMBEDDING, HEAD, checked_tensors
from vico.checkpoints.tensor_files import SHARD_BYTES, StoredTensor, write_tensor_files
from vico.checkpoints.write import TEXT_SUFFIXES
from vico.errors import UserError
from vico.model_files import model_config
from vico.published_config import LANGUAGE_MODELS

_PREFIX = "model.language_model."
_SOURCE_FILE = "vico_source.json"
"""What the folder was written from; written last, so a folder without it is not whole."""
_SKIPPED = ("config.json", "preprocessor_config.json", "processor_config.json")


def language_model_folder(model: Path, folder: Path) -> Path:
    """Return `folder` with the language model of `model`; write it unless it is there already.

    The tokenizer's files are hard links where the file system allows it. Raises UserError if the folder
    cannot be written, or holds something else.
    """
    source = _source(model)
    record = folder / _SOURCE_FILE
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == source:
        return folder
    if folder.exists() and not record.is_file():
        raise UserError(f"{folder} exists and was not written by vico; move it away, or give another folder")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write(model, partial)
        (partial / _SOURCE_FILE).write_text(json.dumps(source), encoding="utf-8")
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == source:
            return folder  # another process has written it meanwhile
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} is not writable ({error}); give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _source(model: Path) -> dict[str, Any]:
    """Return what tells another model, or another state of it, from this one."""
    files = sorted(file for file in model.resolve().iterdir() if file.suffix in (".safetensors", ".json"))
    return {
        "model": str(model.resolve()),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }


def _write(model: Path, folder: Path) -> None:
    tensors: Mapping[str, StoredTensor] = checked_tensors(model)
    written = {
        f"model.{name.removeprefix(_PREFIX)}": (tensor,)
        for name, tensor in tensors.items()
        if name.startswith(_PREFIX)
    }
    config = model_config(model)
    text = dict(config["text_config"])
    is_tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    if not is_tied:
        written[HEAD] = (tensors.get(HEAD, tensors[EMBEDDING]),)
    write_tensor_files(folder, written, SHARD_BYTES)
    architectures = {model_type: name for name, model_type in LANGUAGE_MODELS.items()}
    text |= {
        "architectures": [architectures[text["model_type"]]],
        "tie_word_embeddings": is_tied,
        "dtype": config.get("dtype", "float32"),
    }
    (folder / "config.json").write_text(json.dumps(text, indent=2), encoding="utf-8")
    for file in sorted(model.resolve().iterdir()):
        is_text = file.suffix in TEXT_SUFFIXES and "safetensors" not in file.name
        if is_text and file.is_file() and file.name not in _SKIPPED:
            _link(file.resolve(), folder / file.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
