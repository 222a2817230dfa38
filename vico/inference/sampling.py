"""How the next token of an answer is chosen: greedily, or drawn at random from its seed.

Shapes: B answers that get a token in one step, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sampling:
    """The choice of the tokens of one answer.

    `temperature` 0 takes the most likely token. `top_p` draws from the fewest tokens that have this
    probability together. The same `seed` draws the same tokens from the same probabilities; None: any.
    `top_logprobs` asks for log-probabilities, of the token and of this many likeliest ones; None: of none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None


GREEDY = Sampling()


@dataclass(frozen=True)
class Token:
    """A chosen token. `logprob` and `top` (id, log-probability), by the model's own distribution at
    temperature 1, are given only if they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Sampler:
    """Chooses the tokens of one answer in turn."""

    sampling: Sampling
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self._random = random.Random(None if seed is None else seed % 2**64)  # else -3 would draw as 3

    def drawn(self, logits_V: torch.Tensor) -> int:
        """Return a token drawn at the temperature, from float32 logits.

        One uniform number is drawn per token, so an answer does not depend on those decoded beside it.
        """
        logits_V = logits_V.double()
        scaled_V = (
            logits_V - logits_V.max()
        ) / self.sampling.temperature  # finite or -inf at any temperature
        probability, ids = scaled_V.softmax(-1).sort(descending=True)
        cumulated = probability.cumsum(-1)
        likelier = cumulated - probability
        kept = int((likelier < self.sampling.top_p).sum().clamp_min(1))
        point = self._random.random() * float(cumulated[kept - 1])
        return int(ids[min(int((cumulated[:kept] <= point).sum()), kept - 1)])


def chosen_tokens(samplers: Sequence[Sampler], logits_BV: torch.Tensor) -> list[Token]:
    """Return the next token of each answer from the logits that precede it."""
    likeliest = logits_BV.argmax(-1).tolist()
    return [
        _token(sampler, logits_BV[b], likeliest[b])
        if sampler.sampling.temperature > 0 or sampler.sampling.top_logprobs is not None
        else Token(likeliest[b])
        for b, sampler in enumerate(samplers)
    ]


def _token(sampler: Sampler, logits_V: torch.Tensor, likeliest: int) -> Token:
    logits_V = logits_V.float()
    sampling = sampler.sampling
    token_id = sampler.drawn(logits_V) if sampling.temperature > 0 else likeliest
    if sampling.top_logprobs is None:
        return Token(token_id)
    logprobs_V = logits_V.log_softmax(-1)
    values, ids = logprobs_V.topk(min(sampling.top_logprobs, len(logprobs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token_id, float(logprobs_V[token_id]), top)
