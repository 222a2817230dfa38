"""Names of the files and folders that stages publish, and what a later stage needs of each."""

from __future__ import annotations

NEEDED = {
    "shard": ("manifest.json", "index.parquet"),
    "consistency": ("policy/config.json",),
    "ratio": ("ratios.parquet",),
    "label": ("labels.parquet",),
    "router": ("router.safetensors", "metrics.json"),
    "evaluate": ("metrics.json",),
}
"""What later stages read of each stage's output."""
SCORES_FILE, TILES_FILE = "scores.parquet", "tiles.parquet"
PREDICTIONS_FILE, METRICS_FILE, TABLE_FILE = "predictions.parquet", "metrics.json", "table.md"
MODEL_FOLDER = "model"
POLICY_FOLDER = "policy"
ROUTER_FILE = "router.safetensors"
LABELS_FILE = "labels.parquet"
RATIOS_FILE = "ratios.parquet"
