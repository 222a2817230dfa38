"""Names of the files and folders that stages publish, and the files that later stages need from each stage.

Those of the shard stage are in `data_prep/shards/names.py`, because its readers know no stages.
"""

from data_prep.shards.names import INDEX_FILE, MANIFEST_FILE

METRICS_FILE = "metrics.json"
"""The metrics of a finished stage (ratio, label, router, rates, evaluate)."""
FIGURES_FOLDER = "figures"
"""The plots of a stage, as PNG (label, router, evaluate)."""

POLICY_FOLDER = "policy"
CURVE_FILE = "curve.parquet"
"""The metrics of each training step (consistency, router)."""
RATIOS_FILE = "ratios.parquet"
LABELS_FILE = "labels.parquet"
ROUTER_FILE = "router.safetensors"
SCORES_FILE = "scores.parquet"
"""The router's probability to compress, one row per tile (router: calib and test tiles with labels, and blank
tiles; evaluate: test tiles that the router stage did not score)."""
CALIB_SCORES_FILE = "calib_scores.parquet"
"""The same for calib tiles that the router stage did not score (evaluate, for a wanted quality)."""
BLANK_SPLIT = "blank"
"""The split of the router stage's synthesised calibration tiles in its scores."""
TILES_FILE, PREDICTIONS_FILE, TABLE_FILE = "tiles.parquet", "predictions.parquet", "table.md"
QUESTION_RATIOS_FILE = "question_ratios.parquet"
"""Loss ratios of test tiles over the earlier questions of their records (evaluate)."""
MODEL_FOLDER = "model"

_NEEDED = {
    "shard": (MANIFEST_FILE, INDEX_FILE),
    "consistency": (f"{POLICY_FOLDER}/config.json",),
    "ratio": (RATIOS_FILE,),
    "label": (LABELS_FILE,),
    "router": (ROUTER_FILE, METRICS_FILE),
    "evaluate": (METRICS_FILE,),
}
KERNELS_FILE = "kernels.txt"
"""In an attempt's folder: what computed on rank 0 of a training, in words."""
NEEDED = {
    **_NEEDED,
    **{f"joint_{stage}": _NEEDED[stage] for stage in ("consistency", "ratio", "label", "router")},
    "joint_rates": (METRICS_FILE,),
}
"""Stage -> files of its output that later stages read."""


def part_name(number: int) -> str:
    """Return the name of one part: a shard (ratio, rates) or a block of samples (evaluate)."""
    return f"parts/{number:05d}.parquet"


def block_part(split: str, number: int) -> str:
    """Return the name of the part with the answers to one block of a split's samples (evaluate)."""
    return part_name(number) if split == "test" else f"parts/{split}-{number:05d}.parquet"
