"""The policy with the lowest KL on calibration packs, kept while training goes on; a warning when it rises.

Every rank makes the same calls: the figures are sums over ranks, so all decide alike.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.parts import Parts
from stages.training.checkpoints import BEST, best_policies
from stages.training.faults import KL_RISE, Diverged
from stages.training.metrics import read_metrics
from vico.checkpoints.load import save_model

logger = logging.getLogger(__name__)
SCORE_FILE = "score.json"


class BestPolicy:
    """Keeps `best/step-<n>/` in the stage's output: the policy folder and the figure it won with.

    The figure is the KL per answer token of calibration packs, both rates added up.
    """

    def __init__(self, parts: Parts, model_folder: Path, keep: bool, of_rank_0: Callable[[Any], Any]):
        """`of_rank_0` gives rank 0's value on every rank: what folders hold decides collectives here."""
        self._parts, self._model_folder, self._keep = parts, model_folder, keep
        found = min(_scores(parts), default=None)
        self._best: tuple[float, int] | None
        self._best, self._earlier = of_rank_0((found, [] if keep else reported(parts)))

    def offer(
        self, step: int, figures: Mapping[str, float], state: Callable[[], Mapping[str, Tensor] | None]
    ) -> dict[str, float]:
        """Keeps the policy of `step` where it is the best so far; gives `kl_over_best`.

        `figures` holds `kl_full` and `kl_compressed`, or nothing; `state` gives the policy's tensors on the
        rank that writes and None elsewhere; every rank calls it alike. Logs a warning where the KL is half
        as high again as its best: the early sign of a collapse.
        """
        if not figures:
            return {}
        kl = figures["kl_full"] + figures["kl_compressed"]
        if not math.isfinite(kl):
            self._warn_or_raise(step, figures)
            return {}
        for before in self._earlier:  # what they reported of later steps is done again
            if before[1] < step and (self._best is None or before < self._best):
                self._best = before
        if self._best is None or kl < self._best[0]:
            self._best = kl, step
            if self._keep:
                self._write(step, kl, state())
        over = kl / max(self._best[0], 1e-12)
        if over > KL_RISE:
            logger.warning(
                "step %d: the validation KL is %.2f times its best (step %d); a lower "
                "optimizer.learning_rate keeps it down, select: best publishes the best policy",
                step,
                over,
                self._best[1],
            )
        return {"kl_over_best": over}

    def _warn_or_raise(self, step: int, figures: Mapping[str, float]) -> None:
        """No such figure is the best of anything."""
        bad = ", ".join(f"{name}={kl}" for name, kl in figures.items() if not math.isfinite(kl))
        remedy = "look at the calibration samples of that source, or train in float32"
        if self._keep:
            raise Diverged(
                f"step {step}: the validation gives {bad}, and select: best cannot choose; {remedy}"
            )
        logger.warning("step %d: the validation gives %s; %s", step, bad, remedy)

    def _write(self, step: int, kl: float, state: Mapping[str, Tensor] | None) -> None:
        name = f"{BEST}/step-{step:07d}"
        if state is None or self._parts.done(name):
            return
        partial = self._parts.partial(name)
        shutil.rmtree(partial, ignore_errors=True)
        save_model(state, self._model_folder, partial)
        (partial / SCORE_FILE).write_text(json.dumps({"step": step, "kl": kl}))
        self._parts.publish(name)
        for folder in best_policies(self._parts)[:-1]:
            self._parts.remove(f"{BEST}/{folder.name}")


def reported(parts: Parts) -> list[tuple[float, int]]:
    """(KL, step) of the validations that earlier attempts reported."""
    names = "validation_kl_full", "validation_kl_compressed"
    return [
        (sum(metrics[name] for name in names), step)
        for step, metrics in read_metrics(parts)
        if all(math.isfinite(metrics.get(name, math.nan)) for name in names)
    ]


def _scores(parts: Parts) -> Iterator[tuple[float, int]]:
    """(KL, step) of the policies kept; one that is not the best any more may go while it is looked at."""
    for folder in best_policies(parts):
        try:
            score = json.loads((folder / SCORE_FILE).read_text())
        except FileNotFoundError:
            continue
        yield score["kl"], score["step"]
