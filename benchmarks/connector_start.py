"""Compare initialisations of the new connector: the same consistency training from each, on real packs.

    python -m benchmarks.connector_start --shards FOLDER --model FOLDER --json

`vico run CONFIG --until shard` writes the folder of shards. Starts: `random` is torch's default
initialisation; `full` uses the weights of the full connector (`vico/model/connectors.py`); `fitted` and
`full-fitted` then fit either one to the mean of the full connector's tokens in each square of 2 x 2,
without the language model. `+warm-up` trains only the new connector in the first fifth of the updates. One
process and one thread, torch only. The result is the KL of calibration packs with all tiles at the full and
at the compressed rate.

Shapes: N tiles, F tokens of a tile at the full rate, D language width.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from cluster.train_settings import TrainSettings
from stages.consistency.config import ConsistencyConfig
from stages.consistency.learning_rates import consistency_rates
from stages.consistency.packs import ConsistencyPacks, ConsistencySettings
from stages.parts import Parts
from stages.training.parameter_groups import parameter_groups
from stages.training.step import derived_seed
from vico.checkpoints import load_model
from vico.model.connectors import start_from_full
from vico.model.internvl import VicoModel
from vico.objectives.consistency import ConsistencyTask

STARTS = ("random", "full", "fitted", "full-fitted")
_FIT_STEPS = 150


def config_of(options: argparse.Namespace, start: str) -> ConsistencyConfig:
    """Return the config of the training from one start."""
    return ConsistencyConfig(
        seed=options.seed,
        optimizer={"learning_rate": options.learning_rate},
        connector_lr_scale=options.connector_lr_scale,
        connector_warmup_steps=options.steps // 5 if start.endswith("+warm-up") else 0,
        reference_tokens_per_pack=512,
        tiles_per_pack=16,
        packs_per_step=options.packs,
        epochs=100,
        max_steps=options.steps,
        validation_packs=8,
    )


def mean_of_squares(tokens_NFD: torch.Tensor) -> torch.Tensor:
    """Return the mean of each 2 x 2 square of tokens on a grid: [N, F, D] -> [N, F / 4, D]."""
    num_tiles, num_tokens, width = tokens_NFD.shape
    side = round(num_tokens**0.5)
    grid = tokens_NFD.reshape(num_tiles, side // 2, 2, side // 2, 2, width)
    return grid.mean(dim=(2, 4)).reshape(num_tiles, num_tokens // 4, width)


def fit(policy: VicoModel, packs: ConsistencyPacks) -> float:
    """Fit the new connector to the mean of squares of the full one's tokens; return the relative error."""
    optimizer = torch.optim.AdamW(policy.compressed_connector.parameters(), lr=2e-3)
    for step in range(_FIT_STEPS):
        batch = packs.batch(
            packs.packs(step // packs.config.packs_per_step)[step % packs.config.packs_per_step]
        )
        with torch.no_grad():
            features = policy.vision_features(batch.tiles)
            target = mean_of_squares(policy.full_tokens(features))
        loss = F.mse_loss(policy.compressed_tokens(features), target) / target.var()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / _FIT_STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def validation(task: ConsistencyTask, packs: ConsistencyPacks) -> dict[str, float]:
    """Return the KL per answer token of calibration packs at both rates."""
    task.eval()
    metrics = {}
    for rate in ("full", "compressed"):
        kl, tokens = 0.0, 0.0
        for pack in packs.calib_packs(rate == "compressed"):
            counts = task(packs.batch(pack))[1]
            kl, tokens = kl + float(counts["kl_sum"]), tokens + counts["answer_tokens"]
        metrics[f"kl_{rate}"] = kl / tokens
    task.train()
    return metrics


@dataclass(frozen=True)
class Start:
    """A policy with its initialised connector, the seconds of fitting it and the error (None: not fitted)."""

    policy: VicoModel
    fit_seconds: float
    fit_error: float | None


def initialised(start: str, packs: ConsistencyPacks, model_folder: Path, config: ConsistencyConfig) -> Start:
    """Return the policy of one start."""
    policy = load_model(model_folder).train()
    policy.add_compressed_connector(derived_seed(config.seed, "compressed_connector"))
    kind = start.removesuffix("+warm-up")
    if kind.startswith("full"):
        start_from_full(policy.compressed_connector, policy.base.model.multi_modal_projector)
    started = time.perf_counter()
    torch.manual_seed(derived_seed(config.seed, "fit"))
    error = fit(policy, packs) if kind.endswith("fitted") else None
    return Start(policy, time.perf_counter() - started, error)


class Training:
    """AdamW on the consistency loss, one update per call of `update`."""

    def __init__(self, task: ConsistencyTask, packs: ConsistencyPacks, config: ConsistencyConfig):
        self.task, self.packs, self.config = task, packs, config
        layers = len(task.policy.base.model.vision_tower.encoder.layer)
        self.groups = parameter_groups(task, config.optimizer, consistency_rates(config, layers))
        self.optimizer = torch.optim.AdamW(
            [{"params": group.parameters, "weight_decay": group.weight_decay} for group in self.groups],
            betas=(config.optimizer.beta1, config.optimizer.beta2),
        )

    def update(self, step: int) -> None:
        """Train on the packs of one step."""
        config = self.config
        batches = [self.packs.batch(pack) for pack in self.packs.packs(step)]
        weight = sum(batch.loss_weight for batch in batches)
        self.optimizer.zero_grad()
        for number, batch in enumerate(batches):
            torch.manual_seed(derived_seed(config.seed, "consistency", step, number))
            (self.task(batch)[0] / weight).backward()
        torch.nn.utils.clip_grad_norm_(self.task.parameters(), config.optimizer.grad_clip)
        learning_rate = config.optimizer.learning_rate_at(step, config.max_steps)
        for group, ours in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = ours.rate.at(learning_rate, step)
        self.optimizer.step()


def trained_row(
    name: str, packs: ConsistencyPacks, model_folder: Path, config: ConsistencyConfig, every: int
) -> dict[str, Any]:
    """Train from one start; return its row: seconds of fitting and training, the curve of validation KL."""
    start = initialised(name, packs, model_folder, config)
    task = ConsistencyTask(start.policy, load_model(model_folder), kl_chunk_rows=256)
    training = Training(task, packs, config)
    curve: list[dict[str, float]] = [{"step": 0, **validation(task, packs)}]
    seconds = 0.0
    for step in range(config.max_steps):
        started = time.perf_counter()
        training.update(step)
        seconds += time.perf_counter() - started
        if (step + 1) % every == 0 or step + 1 == config.max_steps:
            curve.append({"step": step + 1, **validation(task, packs)})
            print(name, curve[-1], file=sys.stderr, flush=True)
    return {
        "start": name,
        "updates": config.max_steps,
        "seconds": round(seconds, 1),
        "fit_steps": _FIT_STEPS if start.fit_error is not None else 0,
        "fit_seconds": round(start.fit_seconds, 1),
        "fit_error": start.fit_error,
        "curve": curve,
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the last KL of each start divided by that of the random start, at both rates."""
    last = {row["start"]: row["curve"][-1] for row in rows}
    if "random" not in last:
        return {}
    return {
        f"{rate}_{start}_vs_random": last[start][rate] / last["random"][rate]
        for start in last
        for rate in ("kl_full", "kl_compressed")
        if start != "random"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("models/small-internvl"))
    parser.add_argument("--starts", default="random,random+warm-up,fitted,full,full+warm-up,full-fitted")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--packs", type=int, default=3, help="packs per update")
    parser.add_argument("--every", type=int, default=20, help="updates between two validations")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--connector-lr-scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = {start.removesuffix("+warm-up") for start in options.starts.split(",")} - set(STARTS)
    if unknown:
        parser.error(
            f"--starts {', '.join(sorted(unknown))}: use {', '.join(STARTS)}, each optionally with +warm-up"
        )
    torch.set_num_threads(1)
    rows = []
    for start in options.starts.split(","):
        config = config_of(options, start)
        settings = ConsistencySettings(
            config, options.shards, options.model, Parts(options.shards.parent / "starts", 1), TrainSettings()
        )
        packs = ConsistencyPacks(settings)
        rows.append(trained_row(start, packs, options.model, config, options.every))
    print(json.dumps({"name": "connector_start", "rows": rows, "ratios": ratios(rows)}))


if __name__ == "__main__":
    main()
