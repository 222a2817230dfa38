"""Decoded batches that a training needs again and again: those of validations."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch

BatchT = TypeVar("BatchT")
_LIMIT_BYTES = 2 * 2**30


class KeptBatches(Generic[BatchT]):
    """Keeps batches in host memory up to a limit; those beyond it are decoded each time."""

    def __init__(self, limit_bytes: int = _LIMIT_BYTES):
        self._left, self._batches = limit_bytes, dict[Any, BatchT]()

    def get(self, key: Any, decode: Callable[[], BatchT]) -> BatchT:
        """Return the batch of a key, from memory or decoded. Nobody may change its tensors."""
        if key in self._batches:
            return self._batches[key]
        batch = decode()
        size = tensor_bytes(batch)
        if size <= self._left:
            self._left -= size
            self._batches[key] = batch
        return batch


def tensor_bytes(value: Any) -> int:
    """Return the bytes of the tensors in a dataclass, also of nested ones."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if is_dataclass(value):
        return sum(tensor_bytes(getattr(value, field.name)) for field in fields(value))
    return 0
