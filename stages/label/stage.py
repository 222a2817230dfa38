"""The label stage: ratios -> tau -> keep or compress, for every tile. Cheap, so floor, percentile and window
are its config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.context import Context
from stages.outputs import LABELS_FILE
from stages.stage_config import StageConfig
from vico.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


CODE_VERSION = 1
INPUTS = ("ratio",)
NEEDS_RAY = False
NEAR_TAU = 0.05


class LabelConfig(StageConfig):
    """Config of the label stage."""

    seed: int | None = None
    floor: float = Field(1e-2, ge=0)
    """Added to both losses of a ratio, in nats per answer token."""
    percentile: float = Field(50.0, gt=0, lt=100)
    """tau is this percentile of the ratios in the window: about the share of tiles that the labels
    compress.
    """
    window_tiles: int = Field(10_000, ge=1)


Config = LabelConfig


def run(config: LabelConfig, context: Context) -> dict[str, float | int | str]:
    """Publishes `labels.parquet`, `metrics.json` and a figure of losses and ratios by kind of content."""
    import pyarrow.parquet as pq

    from stages.figures import publish_figure
    from stages.label.figure import losses_by_kind
    from stages.outputs import RATIOS_FILE

    path = context.inputs["ratio"] / RATIOS_FILE
    ratios = pq.read_table(path)
    labels, last_tau = labelled(ratios, config, config.floor, str(path))
    pq.write_table(labels, context.parts.partial(LABELS_FILE))
    context.parts.publish(LABELS_FILE, replace=True)
    metrics = {"last_tau": last_tau, **label_metrics(ratios, labels, config, str(path))}
    context.parts.write_json("metrics.json", metrics)
    publish_figure(context, "losses_by_kind", losses_by_kind(ratios, labels))
    context.log({name: value for name, value in metrics.items() if isinstance(value, float)}, 0)
    return {"tiles": len(labels), "share_compressed": metrics["share_compressed"]}


def labelled(ratios: pa.Table, config: LabelConfig, floor: float, path: str) -> tuple[pa.Table, float]:
    """The table of labels, in the order of the ratios, and the last tau of train.

    Train tiles are passed in an order drawn by seed, each against the percentile of the window that ends with
    it. Tiles of the other splits are held against the last tau of train: they move nothing. Raises UserError
    without train tiles and where a loss is not finite.
    """
    import numpy as np
    import pyarrow as pa

    from data_prep.draws import draw_order
    from vico.objectives.labels import loss_ratio, tile_labels, window_percentiles

    with np.errstate(invalid="ignore", divide="ignore"):  # floor 0 over a loss of 0 is caught below
        ratio = loss_ratio(ratios["loss_compressed"].to_numpy(), ratios["loss_full"].to_numpy(), floor)
    if not np.isfinite(ratio).all():
        first = int(np.flatnonzero(~np.isfinite(ratio))[0])
        raise UserError(
            f"{path}: tile {ratios['tile'][first]} of {ratios['key'][first]} has ratio {ratio[first]} with "
            f"label.floor={floor}; set a floor above 0, or look at the losses of the ratio stage"
        )
    train = np.flatnonzero(np.asarray(ratios["split"].to_pylist()) == "train")
    if not len(train):
        raise UserError(
            f"{path} has no tiles of the split train; lower shard.calib_share and shard.test_share"
        )
    order = train[draw_order("label order", config.seed, np.arange(len(train)))]
    taus = window_percentiles(ratio[order], config.percentile, config.window_tiles)
    tau = np.full(len(ratio), taus[-1])
    tau[order] = taus
    columns = {name: ratios[name] for name in ("key", "split", "image", "tile")}
    labels = pa.table({**columns, "ratio": ratio, "tau": tau, "label": tile_labels(ratio, tau)})
    return labels, float(taus[-1])


def label_metrics(ratios: pa.Table, labels: pa.Table, config: LabelConfig, path: str) -> dict:
    """Shares that say how firm the labels are and what they compress."""
    import numpy as np

    from vico.objectives.labels import COMPRESS, share_near_tau

    label = labels["label"].to_numpy()
    compressed = label == COMPRESS

    def changed(floor: float) -> float:
        others, _ = labelled(ratios, config, floor, path)
        return float(np.mean(others["label"].to_numpy() != label))

    return {
        "tiles": len(labels),
        "share_compressed": float(compressed.mean()),
        "share_near_tau": share_near_tau(labels["ratio"].to_numpy(), labels["tau"].to_numpy(), NEAR_TAU),
        "share_changed_at_third_floor": changed(config.floor / 3),
        "share_changed_at_triple_floor": changed(config.floor * 3),
        "share_compressed_by_split": _shares(labels["split"], compressed),
        "share_compressed_by_kind": _shares(ratios["kind"], compressed),
    }


def _shares(names: pa.ChunkedArray, compressed: np.ndarray) -> dict[str, float]:
    import pyarrow as pa

    table = pa.table({"name": names, "compressed": compressed})
    shares = table.group_by("name").aggregate([("compressed", "mean")])
    columns = (shares[column].to_pylist() for column in ("name", "compressed_mean"))
    return dict(sorted(zip(*columns, strict=True)))
