"""Score the small InternVL at the full rate on demo records of groups that it was not trained on.

python examples/small_internvl/score.py WORK --questions 600   # the checkpoint; appends to WORK/curve.json
python examples/small_internvl/score.py models/small-internvl  # a model folder; prints the scores
"""

# B questions of equal length, L tokens, T tiles, V vocabulary

from __future__ import annotations

import argparse
import io
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from samples import HELD_OUT

from data_prep.demo.records import demo_record
from data_prep.shards.split import TEST, side
from vico.prompt import PromptFormat, load_prompt_format
from vico.special_tokens import IMAGE_MARK
from vico.tiling import num_tiles, pixel_values

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration

_LONGEST_ANSWER = 48
READ_KINDS = ("number", "word", "chart")


@dataclass
class HeldOutQuestion:
    """A question of the test side: prompt ids int64 [L], pixels float32 [T, 3, S, S] and the right answer."""

    kind: str
    task: str
    answer: str
    ids: np.ndarray
    pixels: np.ndarray


def held_out_questions(form: PromptFormat, count: int, seed: int = 1) -> Iterator[HeldOutQuestion]:
    """Yield the last question of the first `count` demo records on the test side, without the others."""
    tiling, line = form.settings.tiling(), 0
    while count:
        row, pictures = demo_record(seed, line)
        line += 1
        if side(HELD_OUT, "group", row["group"].encode()) != TEST:
            continue
        count -= 1
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
        tiles = [num_tiles(*image.size, tiling) for image in images]
        question, answer = (turn["value"] for turn in row["conversations"][-2:])
        mark = "" if IMAGE_MARK in question or not images else f"{IMAGE_MARK}\n"
        skeleton = form.encode(
            [{"from": "human", "value": mark + question}], tiles, add_generation_prompt=True
        )
        full = form.settings.tokens_full
        ids = np.repeat(skeleton.ids, np.where(skeleton.ids == form.settings.image_token_id, full, 1))
        size = form.settings.tile_size
        pixels = [pixel_values(image, tiling) for image in images] or [
            np.zeros((0, 3, size, size), np.float32)
        ]
        yield HeldOutQuestion(row["kind"], row["task"], answer, ids, np.concatenate(pixels))


@torch.no_grad()
def greedy_answers(
    model: InternVLForConditionalGeneration, batch: list[HeldOutQuestion], form: PromptFormat
) -> list[str]:
    """Return greedy answers to questions whose prompts have the same length."""
    inner, dtype = model.model, model.lm_head.weight.dtype
    ids_BL = torch.from_numpy(np.stack([question.ids for question in batch]))
    embeddings = inner.language_model.embed_tokens(ids_BL)
    pixels = torch.from_numpy(np.concatenate([question.pixels for question in batch])).to(dtype)
    if len(pixels):
        tokens = inner.get_image_features(pixels, return_dict=True).pooler_output.flatten(0, 1)
        mask = (ids_BL == form.settings.image_token_id)[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(mask, tokens)
    answers: list[list[int]] = [[] for _ in batch]
    open_turns, cache = set(range(len(batch))), None
    for _ in range(_LONGEST_ANSWER):
        out = inner.language_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        next_B = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
        for i in sorted(open_turns):
            if int(next_B[i]) == form.end_of_turn_id:
                open_turns.discard(i)
            else:
                answers[i].append(int(next_B[i]))
        if not open_turns:
            break
        embeddings, cache = inner.language_model.embed_tokens(next_B[:, None]), out.past_key_values
    return [form.tokenizer.decode(answer) for answer in answers]


def similarity(text: str, reference: str) -> float:
    """Return 1 - edit distance / longer length."""
    row = list(range(len(reference) + 1))
    for i, a in enumerate(text, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(reference, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return 1 - row[-1] / max(len(text), len(reference), 1)


def answered_questions(
    model: InternVLForConditionalGeneration, form: PromptFormat, count: int, seed: int = 1
) -> list[tuple[HeldOutQuestion, str]]:
    """Return the test questions, each with the model's answer."""
    by_length: dict[int, list[HeldOutQuestion]] = defaultdict(list)
    for question in held_out_questions(form, count, seed):
        by_length[len(question.ids)].append(question)
    results: list[tuple[HeldOutQuestion, str]] = []
    for questions in by_length.values():
        for i in range(0, len(questions), 32):
            batch = questions[i : i + 32]
            results += zip(batch, greedy_answers(model, batch, form), strict=True)
    return results


def scores(results: list[tuple[HeldOutQuestion, str]]) -> dict[str, Any]:
    """Return exact match by kind and task, its means for read and look, and the similarity of lines."""
    exact: dict[str, list[float]] = defaultdict(list)
    similarities: list[float] = []
    for question, answer in results:
        is_right = float(answer == question.answer)
        exact[f"{question.kind}/{question.task}"].append(is_right)
        if question.task == "transcribe":
            similarities.append(similarity(answer, question.answer))
        if question.task == "look":
            exact["look"].append(is_right)
        if question.task == "read" and question.kind in READ_KINDS:
            exact["read"].append(is_right)
    return {
        "num_questions": len(results),
        "exact_match": {name: round(float(np.mean(values)), 4) for name, values in sorted(exact.items())},
        "counts": {name: len(values) for name, values in sorted(exact.items())},
        "transcription_similarity": round(float(np.mean(similarities)), 4),
    }


def checkpoint_model(folder: Path) -> tuple[InternVLForConditionalGeneration, dict[str, Any]]:
    """Return the model of the last checkpoint of a working folder in float32, and the checkpoint."""
    from transformers import InternVLForConditionalGeneration

    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    model = InternVLForConditionalGeneration.from_pretrained(str(folder / "start"), dtype=torch.float32)
    prefix = "model."
    weights = {
        name.removeprefix(prefix): w for name, w in state["weights"].items() if name.startswith(prefix)
    }
    missing, surplus = model.load_state_dict(weights, strict=False)
    assert not surplus and set(missing) <= {"lm_head.weight"}, (missing, surplus)
    model.tie_weights()
    return model.eval(), state


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--questions", type=int, default=600)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--show", type=int, default=0, help="wrong answers to print")
    args = options.parse_args()
    torch.set_num_threads(1)
    row: dict[str, Any] = {"time": time.time()}
    is_checkpoint = (args.folder / "checkpoint.pt").exists()
    if is_checkpoint:
        model, state = checkpoint_model(args.folder)
        row.update(step=state["step"], training_seconds=round(state["seconds"]))
    else:
        from transformers import InternVLForConditionalGeneration

        model = InternVLForConditionalGeneration.from_pretrained(str(args.folder), dtype=torch.float32).eval()
    form = load_prompt_format(args.folder / "start" if is_checkpoint else args.folder)
    results = answered_questions(model, form, args.questions, args.seed)
    row.update(scores(results))
    wrong = [(question, answer) for question, answer in results if answer != question.answer]
    for question, answer in wrong[: args.show]:
        print(f"{question.kind}/{question.task}: {question.answer!r} read as {answer!r}")
    if is_checkpoint:
        curve = args.folder / "curve.json"
        rows = json.loads(curve.read_text()) if curve.exists() else []
        curve.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
