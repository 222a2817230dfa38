"""Digests of what a pipeline reads from outside: models, tokenizers, repaired rows, records."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data_prep.records.config import records_fingerprint
from pipeline.config.pipeline_file import Inputs
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.fingerprints import digest
from vico.errors import UserError

_MODEL_SUFFIXES_UNREAD = (".md", ".py", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf")
_MODEL_NAMES_UNREAD = ("LICENSE", "NOTICE", "README")
"""No loader of ours reads these: text and pictures about the model, and code, which is never run from
there."""


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that loaders read, sorted by name: those of the folder itself (links
    followed), but no hidden ones, text about the model, pictures or code."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix.lower() not in _MODEL_SUFFIXES_UNREAD
        and path.stem.upper() not in _MODEL_NAMES_UNREAD
    )


def model_fingerprint(folder: Path, cache: DigestCache) -> str:
    """Digest of the model's files by name and content; where the folder lies does not enter."""
    from vico.settings import check_model_folder

    check_model_folder(folder)
    return digest({path.name: _input_sha256(path, cache) for path in model_files(folder)})


def tokenizer_fingerprint(folder: Path, cache: DigestCache) -> str:
    """Digest of what decides a sample's tokens and tiles: tokenizer files, template, sizes and limits of
    the tiling."""
    from vico.settings import TEMPLATE, load_settings, tokenizer_files

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
    """The digest of files of repaired rows in their order, None where there are none."""
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
            f"inputs.model: {path} cannot be read ({error.strerror}); mend the file or its rights"
        ) from error


def source_fingerprint(name: str, inputs: Inputs, cache: DigestCache) -> str | None:
    """The digest of one input from outside the pipeline, None for one that it does not have."""
    if name == "records":
        return records_fingerprint(inputs.records, cache.sha256)
    if name == "heldout":
        return None if inputs.heldout is None else records_fingerprint(inputs.heldout, cache.sha256)
    if name == "repaired":
        return repaired_fingerprint(inputs.repaired, cache)
    if name == "tokenizer":
        return tokenizer_fingerprint(inputs.model_folder, cache)
    return model_fingerprint(inputs.model_folder, cache)
