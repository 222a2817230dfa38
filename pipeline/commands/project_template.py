"""`vico init`: the text of a first pipeline file, with comments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from cluster.settings.yaml_files import yaml_text

META_NAME = "meta.json"


@dataclass(frozen=True)
class Budget:
    """Sizes of the updates of both trainings, and the learning rate of consistency training."""

    packs_per_step: int = 8
    router_packs_per_step: int = 8
    learning_rate: float = 2e-5
    pack: Mapping[str, int] = field(default_factory=dict)
    """Limits of a pack of consistency training; empty: the defaults."""
    in_bfloat16: bool = False
    """Whether every stage computes in bfloat16, as a model of a published size does on GPUs."""


Records: TypeAlias = Mapping[str, object] | Sequence[Mapping[str, object]]
"""The value of `inputs.records`: a source, or a list of sources."""
_PIPELINE = """\
# A pipeline of vico. `vico plan {name}` shows what would run, `vico run {name}` runs or resumes it.
# A key that is left out has its default.
seed: 0
{experiment}

inputs:
  # Records: demo | internvl | llava | sharegpt | parquet | webdataset, local or s3://, gs://, hf://.
  {records}
  # Records only for testing; training rows that share a picture with them are quarantined.
  # heldout: {{format: internvl, path: heldout/meta.json}}
  {model}   # an InternVL model: a folder, or owner/name on the Hub

shard:
  samples_per_shard: 1000
  calib_share: 0.1      # for validation and the threshold
  test_share: 0.1       # every reported number is measured on these samples
  {max_tiles:<20}  # per row, thumbnails not counted; the model's own limit holds, too
  max_tokens: 8192      # per row, text and all tiles at the full rate; longer rows are quarantined

{training}"""
_HALF_ON_CUDA = "  # on CUDA add dtype: bfloat16, here and in the other stages"
_TRAINING = """\
consistency:
  epochs: 1
  {packs:<19}   # at least resources.workers of the site
{pack}  optimizer: {{learning_rate: {rate}{dtype}}}{dtype_comment}

ratio:
  max_test_samples: 2000    # of train up to 20,000; of test as many as evaluate.max_samples
{dtype_of_ratio}
router:
  epochs: 1
  {router_packs:<19}   # at least resources.workers of the site
{router_dtype}{evaluate}"""
DEMO_TRAINING = """\
# For a model of 4M parameters on CPUs: trained as in configs/quickstart.yaml, with more epochs. Labels,
# targets and threshold are the defaults.
consistency:
  epochs: 3
  packs_per_step: 4     # at least resources.workers of the site
  reference_tokens_per_pack: 1024
  tiles_per_pack: 32
  train_vision: false   # policy and reference share one pass through the vision tower
  optimizer: {learning_rate: 5.0e-5}
  connector_lr_scale: 60.0
  validate_every_steps: 50

router:
  epochs: 3
  packs_per_step: 2     # at least resources.workers of the site
  tiles_per_pack: 32
  token_dropout: 0.25
  optimizer: {learning_rate: 1.0e-3}
  validate_every_steps: 25

evaluate:
  max_new_tokens: 24
"""
"""The later blocks of the pipeline file for the demo model."""


def pipeline_text(name: str, records: Records, model: str, max_tiles: int, training: str) -> str:
    """Return the text of a pipeline file with comments; `name` is its path, `training` its later blocks."""
    return _PIPELINE.format(
        name=name,
        experiment=_yaml_line("experiment", Path(name).stem),
        records=_yaml_line("records", records),
        model=_yaml_line("model", model),
        max_tiles=f"max_tiles: {max_tiles}",
        training=training,
    )


def training_blocks(budget: Budget) -> str:
    """Return the blocks of the trainings for any model but the demo's."""
    half = budget.in_bfloat16
    return _TRAINING.format(
        packs=_yaml_line("packs_per_step", budget.packs_per_step),
        pack="".join(f"  {_yaml_line(key, value)}\n" for key, value in budget.pack.items()),
        rate=f"{budget.learning_rate:.1e}".replace("e-0", "e-"),
        dtype=", dtype: bfloat16" if half else "",
        dtype_comment="" if half else _HALF_ON_CUDA,
        dtype_of_ratio="  dtype: bfloat16\n" if half else "",
        router_packs=_yaml_line("packs_per_step", budget.router_packs_per_step),
        router_dtype="  optimizer: {dtype: bfloat16}\n" if half else "",
        evaluate="\nevaluate: {dtype: bfloat16}\n" if half else "",
    )


def _yaml_line(key: str, value: object) -> str:
    """Return `key: value` as one line of YAML, with quotes where the value needs them."""
    flow = isinstance(value, dict | list)
    dumped = yaml_text(value, flow=flow, width=1e9)
    return f"{key}: {dumped.removesuffix(chr(10)).removesuffix('...').strip()}"
