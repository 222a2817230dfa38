"""Digests of the inputs from outside a pipeline: records, repaired rows, models, tokenizers."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data_prep.records.identity import records_fingerprint
from pipeline.config.inputs import Inputs
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.fingerprints import digest
from vico.errors import UserError

_MODEL_SUFFIXES_UNREAD = (".md", ".py", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf")
_MODEL_NAMES_UNREAD = ("LICENSE", "NOTICE", "README")
"""Files that no loader of the project reads: text and pictures about the model, and code, which never runs.
"""


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that loaders read, sorted by name.

    These are files directly in the folder (links are followed), without hidden files, text about the model,
    pictures and code, and all weights that an index names.
    """
    from vico.model_files import weight_files

    read = {
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix.lower() not in _MODEL_SUFFIXES_UNREAD
        and path.stem.upper() not in _MODEL_NAMES_UNREAD
    }
    return sorted({*read, *weight_files(folder)})


def model_fingerprint(folder: Path, cache: DigestCache) -> str:
    """Return a digest of the names and contents of the model's files; the folder's path does not enter."""
    from vico.model_files import check_model_folder

    check_model_folder(folder, "inputs.model")
    return digest({path.name: _input_sha256(path, cache) for path in model_files(folder)})


def tokenizer_fingerprint(folder: Path, cache: DigestCache) -> str:
    """Return a digest of what decides a sample's tokens and tiles: tokenizer files, prompt template, sizes
    and limits of the tiling."""
    from vico.model_files import check_weights_folder, tokenizer_files
    from vico.settings import load_settings
    from vico.special_tokens import TEMPLATE

    check_weights_folder(folder, "inputs.model")
    settings = asdict(load_settings(folder))
    names = ("tile_size", "tokens_full", "image_token_id", "min_tiles", "max_tiles", "use_thumbnail")
    return digest(
        {
            "files": {path.name: _input_sha256(path, cache) for path in tokenizer_files(folder)},
            "settings": {name: settings[name] for name in names},
            "template": TEMPLATE,
        }
    )


def repaired_fingerprint(files: Sequence[Path], cache: DigestCache) -> str | None:
    """Return a digest of the files of repaired rows, in their order; None if there are none."""
    for path in files:
        if not path.is_file():
            raise UserError(
                f"inputs.repaired={path} is not a file; give rows as `vico data retry` takes them"
            )
    return digest([cache.sha256(path) for path in files]) if files else None


def _input_sha256(path: Path, cache: DigestCache) -> str:
    try:
        return cache.sha256(path)
    except OSError as error:
        raise UserError(
            f"inputs.model: {path} cannot be read ({error.strerror}); fix the file or its permissions"
        ) from error


def source_fingerprint(name: str, inputs: Inputs, cache: DigestCache) -> str | None:
    """Return the digest of the input with this name, or None if the pipeline does not have it."""
    if name == "records":
        return records_fingerprint(inputs.records, cache.sha256)
    if name == "heldout":
        return None if inputs.heldout is None else records_fingerprint(inputs.heldout, cache.sha256)
    if name == "repaired":
        return repaired_fingerprint(inputs.repaired, cache)
    if name == "tokenizer":
        return tokenizer_fingerprint(inputs.model_folder, cache)
    return model_fingerprint(inputs.model_folder, cache)
