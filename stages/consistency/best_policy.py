"""Keep the policy with the lowest KL on calibration packs while training continues; warn when the KL rises.

Every rank makes the same calls: the metrics are sums over ranks, so that all decide alike.
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
from vico.checkpoints.save import save_model

logger = logging.getLogger(__name__)
SCORE_FILE = "score.json"


class BestPolicy:
    """Keeps `best/step-<n>/` in the stage's output: the folder of the best policy so far, with its KL.

    The KL is that per answer token of the calibration packs, summed over both rates.
    """

    def __init__(self, parts: Parts, model_folder: Path, keep: bool, of_rank_0: Callable[[Any], Any]):
        """`of_rank_0` returns rank 0's value on every rank: all ranks must decide by the same folders."""
        self._parts, self._model_folder, self._keep = parts, model_folder, keep
        kept = min(_scores(parts), default=None)
        self._best: tuple[float, int] | None
        self._best, self._reported = of_rank_0((kept, [] if keep else reported_scores(parts)))

    def offer(
        self, step: int, metrics: Mapping[str, float], state: Callable[[], Mapping[str, Tensor] | None]
    ) -> dict[str, float]:
        """Keep the policy of `step` if it is the best so far; return `kl_over_best`.

        `metrics` has `kl_full` and `kl_compressed`, or is empty. `state` returns the policy's tensors on the
        rank that writes and None elsewhere; all ranks call it alike. Warns if the KL is more than 1.5 times
        its best, an early sign of a collapse.
        """
        if not metrics:
            return {}
        kl = metrics["kl_full"] + metrics["kl_compressed"]
        if not math.isfinite(kl):
            self._warn_or_raise(step, metrics)
            return {}
        for score in self._reported:  # later steps are done again, so that their scores do not count
            if score[1] < step and (self._best is None or score < self._best):
                self._best = score
        if self._best is None or kl < self._best[0]:
            self._best = kl, step
            if self._keep:
                self._write(step, kl, state())
        over_best = kl / max(self._best[0], 1e-12)
        if over_best > KL_RISE:
            logger.warning(
                "step %d: the validation KL is %.2f times its best (step %d); a lower "
                "optimizer.learning_rate keeps it down, select: best publishes the best policy",
                step,
                over_best,
                self._best[1],
            )
        return {"kl_over_best": over_best}

    def _warn_or_raise(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn about a KL that is not finite; raise Diverged if the best policy is to be kept."""
        bad = ", ".join(f"{name}={kl}" for name, kl in metrics.items() if not math.isfinite(kl))
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


def reported_scores(parts: Parts) -> list[tuple[float, int]]:
    """Return (KL, step) of the validations that earlier attempts reported."""
    names = "validation_kl_full", "validation_kl_compressed"
    return [
        (sum(metrics[name] for name in names), step)
        for step, metrics in read_metrics(parts)
        if all(math.isfinite(metrics.get(name, math.nan)) for name in names)
    ]


def _scores(parts: Parts) -> Iterator[tuple[float, int]]:
    """Yield (KL, step) of the policies kept. One that is no longer the best may vanish meanwhile."""
    for folder in best_policies(parts):
        try:
            score = json.loads((folder / SCORE_FILE).read_text())
        except FileNotFoundError:
            continue
        yield score["kl"], score["step"]
