"""The labels of the label stage, looked up by sample, and the targets that a router learns from them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.outputs import LABELS_FILE
from vico.errors import UserError
from vico.objectives.router import IGNORED, soft_targets

# T tiles of a sample


class TileLabels:
    """Labels and targets by sample and tile, in arrays over all tiles and one span per sample."""

    def __init__(self, label_folder: Path, soft_spread: float | None = None):
        """`soft_spread` None: the targets are the labels. Raises UserError for ratios that are not finite."""
        columns = ["key", "split", "image", "tile", "label"]
        if soft_spread is not None:
            columns += ["ratio", "tau"]
        path = label_folder / LABELS_FILE
        table = pq.read_table(path, columns=columns).sort_by("key")
        self._image, self._tile, self._label = (
            table[name].to_numpy().astype(np.int16) for name in ("image", "tile", "label")
        )
        self._target = self._label.astype(np.float32)
        if soft_spread is not None:
            ratio, tau = table["ratio"].to_numpy(), table["tau"].to_numpy()
            if not (np.isfinite(ratio) & (ratio > 0) & np.isfinite(tau) & (tau > 0)).all():
                raise UserError(
                    f"{path}: router.targets=soft needs ratios and taus above 0; set label.floor above 0"
                )
            self._target = soft_targets(ratio, tau, soft_spread).astype(np.float32)
        counts = pc.value_counts(table["key"])  # in the order of the sorted keys
        self.keys: pa.Array = counts.field("values")
        ends = np.cumsum(counts.field("counts").to_numpy())
        self._spans: dict[str, tuple[int, int]] = {
            key: (end - count, end)
            for key, count, end in zip(
                self.keys.to_pylist(), counts.field("counts").to_pylist(), ends.tolist(), strict=True
            )
        }
        is_train = pc.equal(table["split"], "train").to_numpy()
        self._train_counts = np.bincount(self._label[is_train], minlength=2)[:2]

    def of(self, key: str, tiles_per_image: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return (labels int64 [T], targets float32 [T]) of a sample's tiles in prompt order.

        A tile without a label has -100 and target 0.
        """
        starts = np.cumsum([0, *tiles_per_image])
        labels = np.full(starts[-1], IGNORED, np.int64)
        targets = np.zeros(starts[-1], np.float32)
        first, end = self._spans.get(key, (0, 0))
        positions = starts[self._image[first:end]] + self._tile[first:end]
        labels[positions] = self._label[first:end]
        targets[positions] = self._target[first:end]
        return labels, targets

    def check_both_labels(self) -> None:
        """Raise UserError if all train tiles have the same label, from which no router can learn."""
        num_compress, num_keep = self._train_counts.tolist()
        if not num_compress or not num_keep:
            raise UserError(
                f"all {num_compress + num_keep} labels of train tiles are "
                f"{'keep' if num_keep else 'compress'}; a router needs both: change label.percentile, or "
                "give more records"
            )

    def totals(self, keys: Sequence[str], repeat_S: np.ndarray) -> tuple[float, float]:
        """Return the totals of (compress, keep) over the labelled tiles of samples, each `repeat_S` (float
        [S]) times; a soft target counts in part for both. Samples may have no labels."""
        spans = np.array([self._spans.get(key, (0, 0)) for key in keys], np.int64).reshape(-1, 2)
        keep_before = np.concatenate([[0.0], np.cumsum(self._target, dtype=np.float64)])
        keep = float(repeat_S @ (keep_before[spans[:, 1]] - keep_before[spans[:, 0]]))
        return float(repeat_S @ (spans[:, 1] - spans[:, 0])) - keep, keep
