"""Whether two machines have the same model in a folder, without reading all of its weights."""

import hashlib
from pathlib import Path

from vico.checkpoints.tensor_files import stored_tensors

_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_TENSOR_BYTES = 4096
"""How much of each tensor is read: a training changes all elements of the tensors that it trains."""


def model_digest(folder: Path) -> str:
    """Return a digest of the model's texts, and of the name, shape, dtype and first elements of each tensor.

    Raises UserError for weights that are missing or cut short.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file()):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for name, tensor in sorted(stored_tensors(folder).items()):
        [(start, num_bytes)] = tensor.spans
        with tensor.path.open("rb") as file:
            file.seek(start)
            content = file.read(min(num_bytes, _TENSOR_BYTES))
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + content)
    return digest.hexdigest()
