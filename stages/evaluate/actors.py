"""What the actors of the evaluate stage do: router scores of test tiles, and answers of a block of samples at
many rates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stages.evaluate.scores import rate_text
from stages.inference import InferenceSettings, opened_models, opened_policy, opened_reader
from stages.parts import Parts
from vico.inference.generation import Answer, greedy_answers
from vico.inference.scoring import exact_match, similarity
from vico.inference.tile_losses import EncodedTiles, RatedSample, encoded_tiles, rate_losses
from vico.packing import EncodedSample
from vico.prompt import IMAGE_MARK, PromptFormat, Skeleton

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("model", pa.string()),
        ("rates", pa.string()),
        ("prediction", pa.string()),
        ("exact_match", pa.bool_()),
        ("similarity", pa.float64()),
        ("kl", pa.float64()),
        ("truncated", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Block:
    """Some test samples (rows of the index) with the distinct rate vectors that any point asks for, bool [T]
    each.
    """

    number: int
    rows: tuple[int, ...]
    rates: tuple[tuple[np.ndarray, ...], ...]


@dataclass(frozen=True)
class Question:
    """What a sample asks: the prompt up to its last answer, and that answer. Earlier answers stand in the
    prompt.
    """

    text: str
    answer: str
    prompt: Skeleton


def last_question(
    turns: Sequence[dict], tiles_per_image: Sequence[int], prompt_format: PromptFormat
) -> Question:
    """The last question of a conversation that has an answer, with all before it as its history."""
    last = max(n for n, turn in enumerate(turns) if turn["from"] == "gpt")
    history = turns[:last]
    asked = [turn["value"] for turn in history if turn["from"] == "human"]
    # as encode counts them: a system turn may show pictures too
    num_images = sum(turn["value"].count(IMAGE_MARK) for turn in history if turn["from"] != "gpt")
    prompt = prompt_format.encode(history, tiles_per_image[:num_images], add_generation_prompt=True)
    text = asked[-1].replace(IMAGE_MARK, "").strip() if asked else ""
    return Question(text, turns[last]["value"], prompt)


def part_name(block: int) -> str:
    return f"parts/{block:05d}.parquet"


class TileScorer:
    """The policy's vision tower with the router."""

    def __init__(self, settings: InferenceSettings, router_file: Path):
        self.settings, self.reader = settings, opened_reader(settings)
        self.policy = opened_policy(settings, router_file)

    @torch.no_grad()
    def scores(self, rows: Sequence[int]) -> list[np.ndarray]:
        """P(compress) of the tiles of each row, float32 [T]."""
        found = []
        for row in rows:
            pixels = torch.from_numpy(self.reader.sample(row).pixels).to(self.settings.device)
            batches = pixels.split(self.settings.batch_tiles) if len(pixels) else []
            scores = [
                self.policy.router.compress_probability(self.policy.vision_features(batch)).cpu().numpy()
                for batch in batches
            ]
            found.append(np.concatenate([np.zeros(0, np.float32), *scores]))
        return found


class Answerer:
    """A policy and its reference; `write_part` answers one block."""

    def __init__(self, settings: InferenceSettings, max_new_tokens: int, parts: Parts):
        self.settings, self.max_new_tokens, self.parts = settings, max_new_tokens, parts
        self.reader = opened_reader(settings)
        self.policy, self.reference = opened_models(settings, self.reader)

    def write_part(self, block: Block) -> int:
        """Publishes the scored answers of a block; the number of samples."""
        name = part_name(block.number)
        if not self.parts.done(name):  # done: by a worker that died before it could say so
            rows = list(self._entries(block))
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), self.parts.partial(name))
            self.parts.publish(name)
        return len(block.rows)

    def _entries(self, block: Block) -> Iterator[dict]:
        samples = [self.reader.sample(row) for row in block.rows]
        questions = [self._question(sample) for sample in samples]
        first_tiles = np.cumsum([0, *(len(sample.pixels) for sample in samples)])
        pixels = np.concatenate([sample.pixels for sample in samples])
        policy, reference = (
            encoded_tiles(model, pixels, self.settings.batch_tiles) for model in (self.policy, self.reference)
        )
        full = [(np.zeros(len(sample.pixels), bool),) for sample in samples]
        losses = rate_losses(
            policy,
            reference,
            [
                RatedSample(sample.skeleton, int(first), rates)
                for sample, first, rates in zip(samples, first_tiles, block.rates, strict=False)
            ],
            row_tokens=self.settings.row_tokens,
            kl_chunk_rows=self.settings.kl_chunk_rows,
        )
        asked = (
            ("reference", reference, full, [np.zeros(1)] * len(samples)),
            ("policy", policy, block.rates, losses),
        )
        for model, tiles, rates, kl in asked:
            answers = iter(self._answers(tiles, questions, first_tiles, rates))
            for s, question in enumerate(questions):
                known = self._known(block.rows[s], question)
                for flags, loss in zip(rates[s], kl[s], strict=True):
                    scored = self._scored(question, next(answers))
                    yield {**known, "model": model, "rates": rate_text(flags), "kl": float(loss), **scored}

    def _question(self, sample: EncodedSample) -> Question:
        turns = self.reader.record(sample.row)["conversations"]
        return last_question(turns, sample.tiles_per_image, self.reader.prompt_format)

    def _answers(self, tiles: EncodedTiles, questions, first_tiles, rates) -> list[Answer]:
        prompts = [
            (question.prompt, flags[: question.prompt.num_tiles], int(first))
            for question, first, vectors in zip(questions, first_tiles, rates, strict=False)
            for flags in vectors
        ]
        return greedy_answers(
            tiles,
            prompts,
            end_of_turn_id=self.reader.prompt_format.end_of_turn_id,
            max_new_tokens=self.max_new_tokens,
            batch_tokens=self.settings.generation_tokens,
        )

    def _known(self, row: int, question: Question) -> dict:
        entry = self.reader.index.row(row)
        return {
            "key": entry["key"],
            "kind": entry["kind"],
            "question": question.text,
            "answer": question.answer,
        }

    def _scored(self, question: Question, answer: Answer) -> dict:
        prediction = self.reader.prompt_format.tokenizer.decode(answer.ids, skip_special_tokens=False)
        return {
            "prediction": prediction,
            "exact_match": exact_match(prediction, question.answer),
            "similarity": similarity(prediction, question.answer),
            "truncated": answer.truncated,
        }
