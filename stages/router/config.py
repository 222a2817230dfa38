"""The config of the router stage."""

from typing import Literal

from pydantic import Field

from stages.stage_config import StageConfig
from stages.training.optimizer import OptimizerConfig


class RouterConfig(StageConfig):
    """Training of the router on the labels of tiles, and calibration of its threshold."""

    seed: int = Field(ge=0)
    """Seed of the routers' initial weights, the order of the samples, blank tiles and dropout. A pipeline
    file may leave it out; the stage then uses the pipeline's seed."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate schedule."""
    tiles_per_pack: int = Field(64, gt=0)
    """Most labelled tiles in a pack, the part of a batch that one device processes at a time."""
    packs_per_step: int = Field(4, gt=0)
    """Packs per update, over all workers. There can be at most this many workers."""
    window_samples: int = Field(4096, gt=0)
    """Samples are shuffled, packed and balanced within windows of this many."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the labelled train samples; fractions are possible."""
    max_steps: int = Field(0, ge=0)
    """Most updates. 0: only `epochs` and `patience` limit them."""
    candidates: int = Field(3, ge=1)
    """Number of routers that train side by side, from different initial weights. The one with the highest AUC
    on calibration tiles is published."""
    targets: Literal["hard", "soft"] = "hard"
    """What a router learns. `hard`: the label, as published. `soft`: the probability that the tile's ratio
    exceeds tau, which is logistic in log(ratio / tau)."""
    soft_spread: float = Field(0.5, gt=0)
    """Scale of the logistic function of `targets: soft`, in nats of the ratio; smaller values are nearer to
    the labels."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the two labels in the loss. `balanced`: both labels have the same total weight. `none`:
    every tile has the same weight."""
    token_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a tile's vision tokens that are left out in a training step, drawn for each tile. The label
    stays true: what a tile shows hardly depends on single tokens."""
    blank_share: float = Field(0.1, ge=0, le=1)
    """Number of synthesised blank tiles (uniform shades, margins, empty paper; label compress) that are added
    to the tiles of a pack, as a share of them."""
    validate_every_steps: int = Field(100, gt=0)
    """Updates from one validation on calibration tiles to the next."""
    validation_packs: int = Field(64, gt=0)
    """Packs of calibration tiles in a validation, evenly spread over the split. Threshold and scores use all
    tiles."""
    patience: int = Field(8, ge=0)
    """Validations in a row without a new best AUC of any candidate after which the training stops. 0: it
    never stops early."""
    compress_share: float | None = Field(None, ge=0, le=1)
    """Share of calibration tiles that the calibrated threshold compresses. null: the share that their labels
    compress."""
    share_tolerance: float = Field(0.02, ge=0, le=0.5)
    """How far the threshold's share of calibration tiles may be from `compress_share`. Within it, the
    threshold is placed in the widest gap between scores that compresses the most blank tiles."""
