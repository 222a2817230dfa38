"""`vico init`: the text of a first pipeline file, with comments."""

from pathlib import Path

from vico.errors import UserError

META_NAME = "meta.json"
_PIPELINE = """\
# A pipeline of vico. `vico plan {name}` shows what would run, `vico run {name}` runs or resumes it.
# A key that is left out has its default.
seed: 0
experiment: {experiment}

inputs:
  # Records: demo | internvl | llava | sharegpt | parquet | webdataset, local or s3://, gs://, hf://.
  records: {records}
  # Records only for testing; training rows that share a picture with them are quarantined.
  # heldout: {{format: internvl, path: heldout/meta.json}}
  model: {model}   # an InternVL model: a folder, or owner/name on the Hub

shard:
  samples_per_shard: 1000
  calib_share: 0.1      # for validation and the threshold
  test_share: 0.1       # every reported number is measured on these samples
  max_tiles: 12         # per row, thumbnails not counted
  max_tokens: 8192      # per row, text and all tiles at the full rate; longer rows are quarantined

consistency:
  epochs: 1
  packs_per_step: 8     # at least resources.workers of the site
  optimizer: {{learning_rate: 2.0e-5}}  # on CUDA add dtype: bfloat16, here and in the other stages

router:
  epochs: 1
  packs_per_step: 8     # at least resources.workers of the site
"""


def write_pipeline(path: Path, records: str, model: str) -> None:
    """Write a pipeline file with comments. Raises UserError if the path exists."""
    refuse_existing(path)
    text = _PIPELINE.format(name=path, experiment=path.stem, records=records, model=model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def refuse_existing(path: Path) -> None:
    """Raise UserError if the path exists."""
    if path.exists():
        raise UserError(f"{path} exists; move it away or give another name")
