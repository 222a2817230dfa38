"""One step of a training: the share of a rank, its batches decoded ahead, one optimizer update over all
ranks.

What a step contains depends on the step alone, never on the number of ranks.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, Self, TypeVar

import torch
from torch import nn
from torch.distributed import ReduceOp, all_reduce

from stages.training.engine import Engine
from stages.training.faults import Diverged
from stages.training.kept_batches import KeptBatches

PackT = TypeVar("PackT")


class Batch(Protocol):
    """A pack that is decoded: tensors, and what the pack adds to the denominator of the step's loss."""

    @property
    def loss_weight(self) -> float: ...

    def to(self, device: torch.device) -> Self: ...


class StepSource(Protocol[PackT]):
    """Where the packs of a training come from. `packs` depends on the step alone, `batch` on the pack
    alone."""

    num_steps: int

    def packs(self, step: int) -> Sequence[PackT]:
        """Return the G packs of a step, empty ones included."""

    def batch(self, pack: PackT) -> Batch:
        """Return the pack decoded."""

    def empty(self) -> Batch:
        """Return a batch without samples, for a rank that has no pack in a micro-step."""


NumberedBatch = tuple[int, Batch]
"""The number of a pack in its step, and its batch."""


def derived_seed(*parts: int | str) -> int:
    """Return a seed of 63 bits that depends on all `parts` (seed, purpose, step, pack, ...) and nothing
    else."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def share_of_rank(packs: Sequence[PackT], rank: int, world_size: int) -> list[tuple[int, PackT | None]]:
    """Return (number in the step, pack) for each micro-step of a rank; None if the step has no such pack."""
    num_micro_steps = -(-len(packs) // world_size)
    numbers = [micro_step * world_size + rank for micro_step in range(num_micro_steps)]
    return [(number, packs[number] if number < len(packs) else None) for number in numbers]


class Prefetch:
    """Decodes this rank's packs of the next step in a thread while the current step trains."""

    def __init__(self, source: StepSource[Any], rank: int, world_size: int):
        self._source, self._rank, self._world_size = source, rank, world_size
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._next: dict[int, Future[list[NumberedBatch]]] = {}

    def batches(self, step: int, last_step: int) -> list[NumberedBatch]:
        """Return the batches of `step`, waiting for them if needed, and start to decode those of the next."""
        future = self._next.pop(step, None) or self._pool.submit(self._decode, step)
        batches = future.result()
        if step + 1 < last_step:
            self._next[step + 1] = self._pool.submit(self._decode, step + 1)
        return batches

    def _decode(self, step: int) -> list[NumberedBatch]:
        source = self._source
        share = share_of_rank(source.packs(step), self._rank, self._world_size)
        return [(number, source.empty() if pack is None else source.batch(pack)) for number, pack in share]

    def close(self) -> None:
        """Stop the thread without waiting for it."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def sum_over_ranks(values: Mapping[str, float | torch.Tensor], device: torch.device) -> dict[str, float]:
    """Return each value summed over ranks, in float64. Every rank must give the same names in the same
    order."""
    total = torch.stack(
        [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values.values()]
    )
    all_reduce(total, ReduceOp.SUM)
    return dict(zip(values, total.tolist(), strict=True))


@dataclass(frozen=True)
class Update:
    """An optimizer update: its step, counted from 0, the learning rate, and what its random draws depend
    on."""

    step: int
    learning_rate: float
    seed: int
    purpose: str


def train_step(
    engine: Engine,
    batches: Sequence[NumberedBatch],
    update: Update,
    before_update: Callable[[], None] = lambda: None,
    flags: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Make one optimizer update on this rank's batches. The loss is the weighted sum over the packs of all
    ranks.

    Returns sums over ranks (the counts of the module, `loss`, `flags`) and the gradient norm. `before_update`
    is called when the gradients of the step are complete. Raises Diverged on every rank, and leaves the
    weights as they were, if the loss of a pack is not finite. The host learns of it after it has queued the
    update, so that the device need not wait for the host in between.
    """
    loss_weight = sum_over_ranks({"w": sum(batch.loss_weight for _, batch in batches)}, engine.device)["w"]
    denominator = max(loss_weight, 1e-12)
    sums: dict[str, Any] = {}
    losses: list[tuple[int, torch.Tensor]] = []
    for micro_step, (number, batch) in enumerate(batches, start=1):
        torch.manual_seed(derived_seed(update.seed, update.purpose, update.step, number))
        loss_sum, counts = engine(batch.to(engine.device))
        engine.backward(poisoned(loss_sum), denominator=denominator)
        losses.append((number, loss_sum.detach()))
        counts = {"loss": loss_sum.detach() / denominator, **counts}
        sums = {name: sums.get(name, 0) + value for name, value in counts.items()}
        if micro_step == len(batches):
            before_update()
        engine.step(update.learning_rate, update.step)
    totals = sum_over_ranks({**sums, **(flags or {})}, engine.device)
    if not math.isfinite(totals["loss"]):
        _raise_not_finite(update.step, losses)
    return {**totals, "grad_norm": engine.grad_norm()}


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss with a gradient that is NaN if the loss is not finite, and unchanged otherwise.

    The engine makes no update with such a gradient. A loss can be infinite while its gradient is finite.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)


def _raise_not_finite(step: int, losses: Sequence[tuple[int, torch.Tensor]]) -> NoReturn:
    """Raise Diverged on every rank, with the packs of the step whose loss is not finite."""
    own = [(number, float(loss)) for number, loss in losses if not torch.isfinite(loss)]
    by_rank: list[list[tuple[int, float]]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, own)
    bad_losses = sorted(pair for rank in by_rank for pair in rank)
    packs = ", ".join(f"pack {number}: {loss}" for number, loss in bad_losses)
    raise Diverged(
        f"step {step + 1}: the loss is not finite ({packs}), the update was not made; look at the samples of "
        "the step (vico audit RUN --step), lower optimizer.learning_rate, or train in float32"
    )


def probe_loss(engine: Engine, source: StepSource[Any], step: int, kept: KeptBatches[Batch]) -> float:
    """Return the loss sum of the first pack of the last of `step` updates, without dropout: the same number
    on every rank."""
    batch = kept.get(step, lambda: source.batch(source.packs(step - 1)[0]))
    with evaluating(engine.module), torch.no_grad():
        loss, _ = engine(batch.to(engine.device))
    return float(loss)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context; after it every part has the mode that it had.

    `module.train()` would put frozen parts into training mode, too, and steps after the first validation or
    checkpoint would have dropout where those before it had none.
    """
    in_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in in_training:
            part.training = True
