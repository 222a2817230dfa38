"""Write a checkpoint of the small InternVL as a model folder: bfloat16 weights, tokenizer, model card.

python examples/small_internvl/export.py WORK models/small-internvl
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from score import answered_questions, checkpoint_model, scores

from vico.prompt import load_prompt_format

_COPIED = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json")
_COPIED += ("tokenizer_config.json", "chat_template.jinja")

_CARD = """# small-internvl

An InternVL with {parameters:,} parameters (transformers' `InternVLForConditionalGeneration`:
InternViT and Qwen3) that reads numbers, words, bar charts and short lines in pictures, in tiles of
{tile_size} pixels with {tokens} tokens each. It has only the full connector; the compressed
connector and the router are what the pipeline trains. The model is made for the demo and the tests
of this repository and has no other use.

## Training

`examples/small_internvl/` has the programs: `make_model.py` (architecture, byte-level tokenizer),
`train.py` (SFT: {steps:,} steps of 32 pictures{earlier}, {hours:.1f} hours on one CPU core in
bfloat16) and `export.py` (this folder).

Data: demo records of `data_prep/demo/records.py`, with no limit on their number and up to four
questions per picture. They come from the {num_groups} groups that are on the train side of every
split with at most 15 % calib and 15 % test (split seed 0). Curriculum: sheets of letters for the
vision tower alone; then numbers, words, charts and random strings; then the whole mix of the demo.
A second loss, on the letters of each patch, teaches the vision tower to read; its head is not part
of the model. Training saw nothing of the test side: no picture, number, passage or table. Single
words come from one lexicon of 295 words that all sides share.

## Scores

Full rate, greedy decoding, the last question of {num_questions} test-side records without the other
questions (demo seed {seed}). Exact match; for transcribed lines similarity (1 - edit distance /
longer length).

| questions | number | exact match |
|---|---|---|
{table}

Transcribed lines: similarity {similarity:.3f}.

## Scores during training

{curve}

The sources and licences of photographs and fonts, which are not part of this folder, are in
`data_prep/demo/sources.py`.
"""


def score_table(row: dict[str, Any]) -> str:
    """Return Markdown rows: first the two means, then each kind and task."""
    names = {"read": "**numbers, words, bar values**", "look": "**nothing to read**"}
    lines = []
    for name in sorted(row["counts"], key=lambda name: (name not in names, name)):
        label = names.get(name, name.replace("/", ", "))
        lines.append(f"| {label} | {row['counts'][name]} | {row['exact_match'][name]:.3f} |")
    return "\n".join(lines)


def curve_table(path: Path) -> str:
    """Return a Markdown table of the scores during training, each from fewer questions."""
    if not path.exists():
        return "(none recorded)"
    lines = ["| step | numbers, words, bar values | nothing to read | line similarity |", "|---|---|---|---|"]
    for row in json.loads(path.read_text()):
        match = row["exact_match"]
        cells = (row["step"], match["read"], match["look"], row["transcription_similarity"])
        lines.append("| {} | {:.3f} | {:.3f} | {:.3f} |".format(*cells))
    return "\n".join(lines)


def export(work: Path, out: Path, questions: int, seed: int, earlier_steps: int = 0) -> dict[str, Any]:
    """Write the model folder `out` from the last checkpoint of `work`; return its scores."""
    from samples import training_groups

    torch.set_num_threads(1)
    model, state = checkpoint_model(work)
    out.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        shutil.copyfile(work / "start" / name, out / name)
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]  # tied to the embedding
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    form = load_prompt_format(out)
    row = scores(answered_questions(model, form, questions, seed))
    card = _CARD.format(
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        tile_size=form.settings.tile_size,
        tokens=form.settings.tokens_full,
        steps=state["step"],
        earlier=f" after {earlier_steps:,} of an earlier run" if earlier_steps else "",
        hours=state["seconds"] / 3600,
        num_groups=len(training_groups()),
        num_questions=row["num_questions"],
        seed=seed,
        table=score_table(row),
        similarity=row["transcription_similarity"],
        curve=curve_table(work / "curve.json"),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    return {"step": state["step"], **row}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("work", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--questions", type=int, default=1000)
    options.add_argument("--seed", type=int, default=2)
    options.add_argument("--earlier-steps", type=int, default=0, help="of the run that made start/")
    arguments = options.parse_args()
    result = export(
        arguments.work, arguments.out, arguments.questions, arguments.seed, arguments.earlier_steps
    )
    print(json.dumps(result, indent=1))
