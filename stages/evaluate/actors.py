"""The actors of the evaluate stage: they score test tiles, and answer samples at many rates."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stages.evaluate.blocks import Block
from stages.evaluate.questions import Question, last_question
from stages.evaluate.scores import rate_text
from stages.finite import check_finite
from stages.inference import InferenceSettings, load_models, load_policy, load_router, open_reader
from stages.outputs import block_part
from stages.parts import Parts
from vico.inference.branches import RatedSample
from vico.inference.generation import Answer, greedy_answers
from vico.inference.scoring import exact_match, similarity
from vico.inference.tile_losses import EncodedTiles, encoded_pair, encoded_tiles, rate_losses
from vico.packing import EncodedSample, TiledSequence

# T tiles of a sample
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
Rates = Sequence[np.ndarray]
"""Rate vectors of one sample: which of its tiles are compressed, bool [T] each."""


class AnswerRow(TypedDict):
    """One row of `predictions.parquet`, in the order of SCHEMA."""

    key: str
    kind: str
    question: str
    answer: str
    model: str
    rates: str
    prediction: str
    exact_match: bool
    similarity: float
    kl: float
    truncated: bool


class TileScorer:
    """The policy's vision tower with the router."""

    def __init__(self, settings: InferenceSettings, router_file: Path):
        self.settings, self.reader = settings, open_reader(settings)
        self.policy = load_policy(settings)
        self.router = load_router(self.policy, router_file)

    @torch.no_grad()
    def scores(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Return P(compress) of the tiles of each row, float32 [T]."""
        return [self._sample_scores(row) for row in rows]

    def _sample_scores(self, row: int) -> np.ndarray:
        pixels = torch.from_numpy(self.reader.sample(row).pixels).to(self.settings.device)
        batches = pixels.split(self.settings.batch_tiles) if len(pixels) else []
        scores = [
            self.router.compress_probability(self.policy.vision_features(batch)).cpu().numpy()
            for batch in batches
        ]
        p_compress = np.concatenate([np.zeros(0, np.float32), *scores])
        key, dtype = self.reader.index.row(row, ("key",))["key"], self.settings.dtype
        check_finite(key, p_compress, "probabilities to compress", dtype, "evaluate.dtype")
        return p_compress


class Answerer:
    """A policy and its reference; `write_part` answers one block of a split."""

    def __init__(self, settings: InferenceSettings, max_new_tokens: int, parts: Parts, split: str):
        self.settings, self.max_new_tokens, self.parts, self.split = settings, max_new_tokens, parts, split
        self.reader = open_reader(settings)
        self.policy, self.reference = load_models(settings, self.reader)

    def write_part(self, block: Block) -> int:
        """Publish the scored answers to a block and return its number of samples."""
        name = block_part(self.split, block.number)
        if not self.parts.done(name):  # it is done if a worker died between publishing and returning
            rows = list(self._answer_rows(block))
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), self.parts.partial(name))
            self.parts.publish(name)
        return len(block.rows)

    def _answer_rows(self, block: Block) -> Iterator[AnswerRow]:
        samples = [self.reader.sample(row) for row in block.rows]
        questions = [self._question(sample) for sample in samples]
        first_tiles = np.cumsum([0, *(len(sample.pixels) for sample in samples)]).tolist()
        pixels = np.concatenate([sample.pixels for sample in samples])
        policy, reference = encoded_pair(self.policy, self.reference, pixels, self.settings.batch_tiles)
        full_rates = [(np.zeros(len(sample.pixels), bool),) for sample in samples]
        losses = rate_losses(
            policy,
            reference,
            [
                RatedSample(sample.skeleton, first, rates)
                for sample, first, rates in zip(samples, first_tiles, block.rates, strict=False)
            ],
            row_tokens=self.settings.row_tokens,
            kl_chunk_rows=self.settings.kl_chunk_rows,
        )
        for sample, sample_losses in zip(samples, losses, strict=True):
            check_finite(sample.key, sample_losses, "losses", self.settings.dtype, "evaluate.dtype")
        no_losses = [np.zeros(1)] * len(samples)
        for model, tiles, rates, kl in (
            ("reference", reference, full_rates, no_losses),
            ("policy", policy, block.rates, losses),
        ):
            answers = iter(self._answers(tiles, questions, first_tiles, rates))
            for s, question in enumerate(questions):
                for flags, loss in zip(rates[s], kl[s], strict=True):
                    answer = next(answers)
                    yield self._answer_row(block.rows[s], question, model, flags, float(loss), answer)
        yield from self._retiled_rows(block)

    def _retiled_rows(self, block: Block) -> Iterator[AnswerRow]:
        """Answer the samples with fewer tiles, all at the full rate; their KL is nan, since the reference has
        other tiles."""
        retiled = [
            self.reader.retiled(row, limit)
            for row, limits in zip(block.rows, block.max_tiles, strict=True)
            for limit in limits
        ]
        if not retiled:
            return
        questions = [self._question(sample) for sample in retiled]
        rates = [(np.zeros(len(sample.pixels), bool),) for sample in retiled]
        first_tiles = np.cumsum([0, *(len(sample.pixels) for sample in retiled)]).tolist()
        pixels = np.concatenate([sample.pixels for sample in retiled])
        tiles = encoded_tiles(self.policy, pixels, self.settings.batch_tiles)
        answers = self._answers(tiles, questions, first_tiles, rates)
        for sample, question, (flags,), answer in zip(retiled, questions, rates, answers, strict=True):
            yield self._answer_row(sample.row, question, "policy", flags, float("nan"), answer)

    def _question(self, sample: EncodedSample) -> Question:
        turns = self.reader.record(sample.row)["conversations"]
        return last_question(turns, sample.tiles_per_image, self.reader.prompt_format)

    def _answers(
        self,
        tiles: EncodedTiles,
        questions: Sequence[Question],
        first_tiles: Sequence[int],
        rates: Sequence[Rates],
    ) -> list[Answer]:
        """Return the model's answer to each question at each of its rate vectors."""
        prompts = [
            TiledSequence(question.prompt, flags[: question.prompt.num_tiles], first)
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

    def _answer_row(
        self, row: int, question: Question, model: str, flags: np.ndarray, kl: float, answer: Answer
    ) -> AnswerRow:
        indexed = self.reader.index.row(row)
        prediction = self.reader.prompt_format.tokenizer.decode(answer.ids, skip_special_tokens=False)
        assert isinstance(prediction, str)  # decode of several answers would return a list
        return {
            "key": indexed["key"],
            "kind": indexed["kind"],
            "question": question.text,
            "answer": question.answer,
            "model": model,
            "rates": rate_text(flags),
            "prediction": prediction,
            "exact_match": exact_match(prediction, question.answer),
            "similarity": similarity(prediction, question.answer),
            "kl": kl,
            "truncated": answer.truncated,
        }
