"""`vico init`: a commented pipeline file, and a meta file for a folder of records."""

from pathlib import Path

from vico.errors import UserError

META_NAME = "meta.json"
_PIPELINE = """\
# A pipeline of vico. `vico plan {name}` says what would run, `vico run {name}` runs it or goes on with it.
# A key that is left out takes its default.
seed: 0
experiment: {experiment}

inputs:
  # Records: demo | internvl | llava | sharegpt | parquet | webdataset, on this machine or s3://, gs://, hf://.
  records: {records}
  # Records that are only for testing; training rows with one of their pictures are quarantined.
  # heldout: {{format: internvl, path: heldout/meta.json}}
  model: {model}   # folder of an InternVL model in Hugging Face or InternVL layout

shard:
  samples_per_shard: 1000
  calib_share: 0.1      # for early stop and the threshold
  test_share: 0.1       # every reported number is of these samples
  max_tiles: 12         # of a row, thumbnails not counted
  max_tokens: 8192      # of a row, text and all tiles at the full rate; longer ones are quarantined

consistency:
  epochs: 1
  packs_per_step: 8     # at least as many as there are workers
  optimizer: {{learning_rate: 2.0e-5}}  # on CUDA add dtype: bfloat16, here and in the other stages

router:
  epochs: 1
  packs_per_step: 8     # at least as many as there are workers
"""


def write_pipeline(path: Path, records: str, model: str) -> None:
    """A pipeline file with comments; UserError when the path is taken."""
    refuse_taken(path)
    text = _PIPELINE.format(name=path, experiment=path.stem, records=records, model=model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def refuse_taken(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists; move it away or give another name")
