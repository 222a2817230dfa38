"""Keep the weights of each candidate router at its highest AUC on calibration tiles; say when to stop.

Every rank makes the same calls: the AUCs are computed from the scores of all ranks, so that all decide alike.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.parts import Parts
from stages.training.checkpoints import BEST, checkpoints
from stages.training.metrics import read_metrics

AUC_METRIC = "auc/{candidate}"
"""The metric of a validation with the AUC of a candidate."""


class BestRouters:
    """Keeps `best/step-<n>-router-<c>.safetensors`, the best weights of each candidate so far.

    What was best is decided by the AUCs of all validations up to a step, also those that earlier attempts
    reported, so that a resumed training keeps and stops as an undisturbed one.
    """

    def __init__(
        self, parts: Parts, num_candidates: int, patience: int, of_rank_0: Callable[[Any], Any]
    ) -> None:
        """`of_rank_0` returns rank 0's value on every rank. `patience` is in validations, 0: no end."""
        self._parts, self._num_candidates, self._patience = parts, num_candidates, patience
        self._of_rank_0 = of_rank_0
        self._aucs: dict[int, Sequence[float]] = of_rank_0(reported_aucs(parts, num_candidates))

    def offer(
        self, step: int, aucs: Sequence[float], state: Callable[[], Mapping[str, torch.Tensor] | None]
    ) -> None:
        """Keep the candidates whose AUC at `step` is the highest so far.

        `state` returns the tensors of all candidates, named `routers.<c>.*`, on the rank that writes and None
        elsewhere; all ranks call it alike.
        """
        self._aucs[step] = aucs
        improved = [candidate for candidate, (best, _) in enumerate(self.best(step)) if best == step]
        if not improved:
            return
        tensors = state()
        for candidate in improved if tensors is not None else ():
            assert tensors is not None
            name = _file(step, candidate)
            if not self._parts.done(name):  # else written before a kill, later than the last checkpoint
                prefix = f"routers.{candidate}."
                kept = {
                    f"router.{key.removeprefix(prefix)}": tensor.contiguous()
                    for key, tensor in tensors.items()
                    if key.startswith(prefix)
                }
                save_file(kept, self._parts.partial(name))
                self._parts.publish(name)
            self._remove_older(candidate)

    def _remove_older(self, candidate: int) -> None:
        """Remove what neither this training nor one that resumes from its last checkpoint needs."""
        last_checkpoint = max((step for step, _ in checkpoints(self._parts)), default=0)
        if not any(validated <= last_checkpoint for validated in self._aucs):
            return
        needed = self.best(last_checkpoint)[candidate][0]
        for path in self._parts.output.glob(f"{BEST}/step-*-router-{candidate}.safetensors"):
            if (match := re.match(r"step-(\d+)-", path.name)) and int(match[1]) < needed:
                self._parts.remove(f"{BEST}/{path.name}")

    def best(self, step: int) -> list[tuple[int, float]]:
        """Return (step, AUC) of the best validation up to `step`, for each candidate; there must be one."""
        done = sorted(validated for validated in self._aucs if validated <= step)
        return [
            max(((s, self._aucs[s][candidate]) for s in done), key=lambda pair: (pair[1], -pair[0]))
            for candidate in range(self._num_candidates)
        ]

    def finished(self, step: int) -> bool:
        """Return whether no candidate has improved in the last `patience` validations up to `step`."""
        done = [validated for validated in self._aucs if validated <= step]
        if not self._patience or not done:
            return False
        last_improved = max(best for best, _ in self.best(step))
        return sum(validated > last_improved for validated in done) >= self._patience

    def winner(self, step: int) -> dict[str, torch.Tensor]:
        """Return the tensors `router.*` of the candidate with the highest AUC up to `step`.

        Every rank must call it.
        """
        best = self.best(step)
        candidate = max(range(self._num_candidates), key=lambda c: (best[c][1], -c))
        path = self._parts.output / _file(best[candidate][0], candidate)
        return self._of_rank_0(load_file(path) if path.exists() else {})


def _file(step: int, candidate: int) -> str:
    return f"{BEST}/step-{step:07d}-router-{candidate}.safetensors"


def reported_aucs(parts: Parts, num_candidates: int) -> dict[int, Sequence[float]]:
    """Return the AUCs of the validations that earlier attempts reported, by step."""
    names = [f"validation_{AUC_METRIC.format(candidate=c)}" for c in range(num_candidates)]
    return {
        step: [metrics[name] for name in names]
        for step, metrics in read_metrics(parts)
        if all(name in metrics for name in names)
    }
