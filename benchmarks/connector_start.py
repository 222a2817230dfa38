"""Starts of the new connector compared: the same consistency training from each, on real packs.

`python -m benchmarks.connector_start --shards FOLDER --model FOLDER --json`; the folder of shards is what
`vico run CONFIG --until shard` leaves. Starts: `random`, torch's own; `full`, the weights of the full
connector laid into the new one (`vico/model/connectors.py`); `fitted` and `full-fitted`, either of them then fitted
to the mean of the full connector's tokens in each square of 2 x 2, without the language model. `+warm-up`
moves the new connector alone in the first fifth of the updates. One process and thread, torch alone; a run is
told by the KL of calibration packs with all tiles at either rate.
"""

# N tiles, F/C tokens of a full/compressed tile, D language width

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from cluster.site import TrainSettings
from stages.consistency.config import ConsistencyConfig
from stages.consistency.learning_rates import consistency_rates
from stages.consistency.packs import ConsistencyPacks, ConsistencySettings
from stages.parts import Parts
from stages.training.loop import derived_seed
from stages.training.parameter_groups import parameter_groups
from vico.checkpoints import load_model
from vico.model.connectors import start_from_full
from vico.model.internvl import VicoModel
from vico.objectives.consistency import ConsistencyTask

STARTS = ("random", "full", "fitted", "full-fitted")
_FIT_STEPS = 150


def config_of(options: argparse.Namespace, start: str) -> ConsistencyConfig:
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
    """[N, F, D] on a square grid -> [N, F / 4, D], the mean of each 2 x 2."""
    num_tiles, num_tokens, width = tokens_NFD.shape
    side = round(num_tokens**0.5)
    grid = tokens_NFD.reshape(num_tiles, side // 2, 2, side // 2, 2, width)
    return grid.mean(dim=(2, 4)).reshape(num_tiles, num_tokens // 4, width)


def fit(policy: VicoModel, packs: ConsistencyPacks) -> float:
    """Fits the new connector to the mean of squares of the full one's tokens; the last relative error."""
    optimizer = torch.optim.AdamW(policy.compressed_connector.parameters(), lr=2e-3)
    for step in range(_FIT_STEPS):
        batch = packs.batch(
            packs.packs(step // packs.config.packs_per_step)[step % packs.config.packs_per_step]
        )
        with torch.no_grad():
            features = policy.vision_features(batch.pixel_values)
            target = mean_of_squares(policy.full_tokens(features))
        loss = F.mse_loss(policy.compressed_tokens(features), target) / target.var()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / _FIT_STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def validation(task: ConsistencyTask, packs: ConsistencyPacks) -> dict[str, float]:
    """KL per answer token of calibration packs at both rates."""
    task.eval()
    found = {}
    for rate in ("full", "compressed"):
        kl, tokens = 0.0, 0.0
        for pack in packs.calib_packs(rate == "compressed"):
            counts = task(packs.batch(pack))[1]
            kl, tokens = kl + float(counts["kl_sum"]), tokens + counts["answer_tokens"]
        found[f"kl_{rate}"] = kl / tokens
    task.train()
    return found


def trained(start: str, packs: ConsistencyPacks, model_folder: Path, config: ConsistencyConfig, every: int):
    """The row of one start: seconds of fitting and training, the curve of validation KL."""
    policy, reference = (load_model(model_folder) for _ in range(2))
    policy.train().add_compressed_connector(derived_seed(config.seed, "compressed_connector"))
    kind = start.removesuffix("+warm-up")
    if kind.startswith("full"):
        start_from_full(policy.compressed_connector, policy.base.model.multi_modal_projector)
    began, error = time.perf_counter(), None
    torch.manual_seed(derived_seed(config.seed, "fit"))
    if kind.endswith("fitted"):
        error = fit(policy, packs)
    fit_seconds = time.perf_counter() - began
    task = ConsistencyTask(policy, reference, kl_chunk_rows=256)
    layers = len(policy.base.model.vision_tower.encoder.layer)
    groups = parameter_groups(task, config.optimizer, consistency_rates(config, layers))
    optimizer = torch.optim.AdamW(
        [{"params": group.parameters, "weight_decay": group.weight_decay} for group in groups],
        betas=(config.optimizer.beta1, config.optimizer.beta2),
    )
    curve, seconds = [{"step": 0, **validation(task, packs)}], 0.0
    for step in range(config.max_steps):
        began = time.perf_counter()
        batches = [packs.batch(pack) for pack in packs.packs(step)]
        weight = sum(batch.loss_weight for batch in batches)
        optimizer.zero_grad()
        for number, batch in enumerate(batches):
            torch.manual_seed(derived_seed(config.seed, "consistency", step, number))
            (task(batch)[0] / weight).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), config.optimizer.grad_clip)
        for group, ours in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = ours.rate.at(config.optimizer.learning_rate_at(step, config.max_steps), step)
        optimizer.step()
        seconds += time.perf_counter() - began
        if (step + 1) % every == 0 or step + 1 == config.max_steps:
            curve.append({"step": step + 1, **validation(task, packs)})
            print(start, curve[-1], file=sys.stderr, flush=True)
    return {
        "start": start,
        "updates": config.max_steps,
        "seconds": round(seconds, 1),
        "fit_steps": _FIT_STEPS if error is not None else 0,
        "fit_seconds": round(fit_seconds, 1),
        "fit_error": error,
        "curve": curve,
    }


def ratios(rows: list[dict]) -> dict[str, float]:
    """The last KL of each start over that of the random one, at both rates."""
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
    parser.add_argument("--packs", type=int, default=3, help="packs of an update")
    parser.add_argument("--every", type=int, default=20, help="updates between two validations")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--connector-lr-scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = {start.removesuffix("+warm-up") for start in options.starts.split(",")} - set(STARTS)
    if unknown:
        parser.error(
            f"--starts {', '.join(sorted(unknown))}: known are {', '.join(STARTS)}, each with +warm-up"
        )
    torch.set_num_threads(1)
    rows = []
    for start in options.starts.split(","):
        config = config_of(options, start)
        settings = ConsistencySettings(
            config, options.shards, options.model, Parts(options.shards.parent / "starts", 1), TrainSettings()
        )
        packs = ConsistencyPacks(settings)
        rows.append(trained(start, packs, options.model, config, options.every))
    print(json.dumps({"name": "connector_start", "rows": rows, "ratios": ratios(rows)}))


if __name__ == "__main__":
    main()
