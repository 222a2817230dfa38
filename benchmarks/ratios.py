"""Losses per tile as the ratio stage computes them, compared with whole forwards one by one and packed.

    python -m benchmarks.ratios --json

A sample of T tiles needs T + 1 losses of the policy and one forward of the reference.

separate: a whole forward for each of them, vision included, one after another.
packed: vision and connectors once per model; the T + 1 whole sequences in rows of the language model.
shared: what the ratio stage does. Beginnings that sequences share are computed once, and a vision tower that
policy and reference have in common runs once (`common`: a consistency training with `train_vision: false`;
`trained`: each has its own).

`bound` is the same ratio by FLOPs (`vico/objectives/flops.py`), printed before the measurement. Models have
random weights. `medium` has InternVL3.5-1B's proportions and 300 text tokens per 256 tokens of a tile, a
third of them answers; `demo` has the sizes and texts of the demo; `1b` is InternVL3.5-1B itself, measured on
CUDA in bfloat16, and on a CPU only predicted. `error_vs_float64` is the largest relative error of a loss,
compared with whole forwards one by one in float64 (CPU only).
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.train_step import IMAGE_TOKEN_ID, SIZES, random_model
from vico.inference.branches import RatedSample, plan_of
from vico.inference.tile_losses import EncodedTiles, encoded_pair, encoded_tiles, rate_losses
from vico.losses import chunked_kl
from vico.model.internvl import VicoModel
from vico.objectives.flops import RowWork, connector_flops, head_flops, language_flops, vision_flops
from vico.packing import TiledSequence
from vico.prompt import Skeleton

DEMO = {
    "vision": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 5, "heads": 6},
    "text": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "heads": 6},
    "keys": 3,
    "head_dim": 32,
    "vocab_size": 416,
    "tile_size": 112,
}
GEOMETRIES: dict[str, dict[str, Any]] = {"demo": DEMO, "medium": SIZES["cpu"], "1b": SIZES["cuda"]}
TEXT_TOKENS = {"demo": (48, 14), "medium": (75, 25), "1b": (300, 100)}
"""Tokens of text, and of them answers."""
ROW_TOKENS, BATCH_TILES, KL_ROWS = 4096, 64, 256
Losses = list[float]


@dataclass(frozen=True)
class Case:
    """A policy, its reference, and one sample with the rate vectors of isolation `tile`."""

    policy: VicoModel
    reference: VicoModel
    skeleton: Skeleton
    pixels: np.ndarray

    @property
    def rates(self) -> list[np.ndarray]:
        num_tiles = self.skeleton.num_tiles
        return [np.zeros(num_tiles, bool), *np.eye(num_tiles, dtype=bool)]

    def rated(self) -> RatedSample:
        return RatedSample(self.skeleton, 0, self.rates)

    def in_float64(self) -> "Case":
        policy, reference = (copy.deepcopy(model).double() for model in (self.policy, self.reference))
        return Case(policy, reference, self.skeleton, self.pixels)


def case_of(geometry: str, num_tiles: int, tower: str, device: str) -> Case:
    """Return a random case. Its policy differs from the reference in all weights, or in all but the tower.

    On the device `meta` it has no weights, which is enough to count FLOPs.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    reference, policy = (random_model(GEOMETRIES[geometry], device, dtype).eval() for _ in range(2))
    policy.add_compressed_connector(0)
    if device != "meta":
        change(policy, reference, tower, torch.Generator(device).manual_seed(1))
    if tower == "common":
        reference.base.model.vision_tower = policy.base.model.vision_tower
    return Case(policy, reference, *sample_of(num_tiles, policy, *TEXT_TOKENS[geometry]))


def change(policy: VicoModel, reference: VicoModel, tower: str, generator: torch.Generator) -> None:
    """Train the policy, as it were: add noise to its weights."""
    with torch.no_grad():
        # logits of a random model are flat, and their KL mostly rounding
        for model in (policy, reference):
            model.base.model.language_model.norm.weight.mul_(4.0)
        for name, parameter in policy.named_parameters():
            if tower == "trained" or "vision_tower" not in name:
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.add_((noise * 0.1 * parameter.std(correction=0)).to(parameter.dtype))


def sample_of(
    num_tiles: int, model: VicoModel, num_text: int, num_answers: int
) -> tuple[Skeleton, np.ndarray]:
    """Return a sample whose picture comes first, as InternVL's prompts have it."""
    settings, random = model.settings, np.random.default_rng(0)
    text = random.integers(10, settings.vocab_size, num_text)
    ids = np.concatenate([text[:8], np.full(num_tiles, IMAGE_TOKEN_ID), text[8:]]).astype(np.int64)
    side = settings.tile_size
    pixels = random.integers(0, 256, (num_tiles, 3, side, side), np.uint8)
    return Skeleton(ids, np.arange(len(ids)) >= len(ids) - num_answers, num_tiles), pixels


@torch.no_grad()
def separate(case: Case) -> Losses:
    """Run one whole forward per rate vector, and one of the reference."""
    tiles = encoded_tiles(case.reference, case.pixels, BATCH_TILES)
    (expected_AD,) = tiles.answers_by_sequence([case.rated().at_full_rate()])
    losses = []
    for rates in case.rates:
        tiles = encoded_tiles(case.policy, case.pixels, BATCH_TILES)
        (hidden_AD,) = tiles.answers_by_sequence([TiledSequence(case.skeleton, rates, 0)])
        losses += kl_means(case, [hidden_AD], expected_AD)
    return losses


@torch.no_grad()
def packed(case: Case) -> Losses:
    """Run vision once per model, then rows of whole sequences."""
    tiles, reference = (
        encoded_tiles(model, case.pixels, BATCH_TILES) for model in (case.policy, case.reference)
    )
    (expected_AD,) = reference.answers_by_sequence([case.rated().at_full_rate()])
    sequences = [TiledSequence(case.skeleton, rates, 0) for rates in case.rates]
    losses = []
    for row in packed_rows(tiles, sequences):
        losses += kl_means(case, tiles.answers_by_sequence(row), expected_AD)
    return losses


def packed_rows(tiles: EncodedTiles, sequences: Sequence[TiledSequence]) -> list[list[TiledSequence]]:
    rows: list[list[TiledSequence]] = [[]]
    filled = 0
    for sequence in sequences:
        length = int(sequence.token_starts(tiles.model.settings)[-1])
        if rows[-1] and filled + length > ROW_TOKENS:
            rows.append([])
            filled = 0
        rows[-1].append(sequence)
        filled += length
    return rows


def kl_means(case: Case, hidden: Sequence[torch.Tensor], expected_AD: torch.Tensor) -> Losses:
    heads = case.policy.lm_head.weight, case.reference.lm_head.weight
    weights = torch.ones(len(hidden) * len(expected_AD), device=expected_AD.device)
    expected = torch.cat([expected_AD] * len(hidden))
    _, kl_A = chunked_kl(torch.cat(list(hidden)), heads[0], expected, heads[1], weights, KL_ROWS)
    return kl_A.double().view(len(hidden), -1).mean(1).tolist()


def shared(case: Case) -> Losses:
    """Run what the ratio stage runs."""
    tiles = encoded_pair(case.policy, case.reference, case.pixels, BATCH_TILES)
    (losses,) = rate_losses(*tiles, [case.rated()], row_tokens=ROW_TOKENS, kl_chunk_rows=KL_ROWS)
    return losses.tolist()


WAYS: dict[str, Callable[[Case], Losses]] = {"separate": separate, "packed": packed, "shared": shared}


def flops_of(case: Case) -> dict[str, float]:
    """Return the FLOPs of each way."""
    config, settings, num_tiles = case.policy.base.config, case.policy.settings, case.skeleton.num_tiles
    answers, plan = case.skeleton.num_answer_tokens, plan_of([case.rated()], settings)

    def work(length: int = 0, full: int = 0, compressed: int = 0, answers: int = 0) -> RowWork:
        return RowWork(full, compressed, (length,) if length else (), answers)

    def language(length: int) -> float:
        return language_flops(config, work(length)).forward

    lengths = [int(TiledSequence(case.skeleton, r, 0).token_starts(settings)[-1]) for r in case.rates]
    head = head_flops(config, work(answers=answers)).forward
    vision = vision_flops(config, num_tiles).forward
    both_connectors = connector_flops(config, work(full=num_tiles, compressed=num_tiles)).forward
    reference = connector_flops(config, work(full=num_tiles)).forward + language(lengths[0])
    kl = 2 * head * len(lengths)
    whole = sum(map(language, lengths)) + kl + reference
    # causal attention: the tokens after position p of a sequence cost what it costs less its beginning
    branches = sum(
        language(b.sequence.start + b.num_tokens) - language(b.sequence.start) for b in plan.branches
    )
    one_tower = case.policy.base.model.vision_tower is case.reference.base.model.vision_tower
    return {
        "separate": (len(lengths) + 1) * vision + len(lengths) * both_connectors + whole,
        "packed": 2 * vision + both_connectors + whole,
        "shared": (2 - one_tower) * vision + both_connectors + branches + kl + reference,
    }


def measured(case: Case, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Return the (wall, CPU) seconds of each way; their order rotates."""
    names = list(WAYS)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for repeat in range(-1, repeats):  # the first round warms up
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            synchronize()
            started, cpu_started = time.perf_counter(), time.process_time()
            WAYS[name](case)
            synchronize()
            if repeat >= 0:
                spent = time.perf_counter() - started, time.process_time() - cpu_started
                seconds[name].append(spent)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def largest_error(losses: Losses, expected: Losses) -> float:
    return float(np.max(np.abs(np.array(losses) / np.array(expected) - 1)))


def rows_of_case(
    geometry: str, num_tiles: int, tower: str, device: str, repeats: int
) -> list[dict[str, Any]]:
    """Print the bound, measure, and return one row per way."""
    print(
        f"{geometry}, {num_tiles} tiles, tower {tower}: {bounds_of(geometry, num_tiles, tower)}",
        file=sys.stderr,
    )
    case = case_of(geometry, num_tiles, tower, device)
    flops, losses = flops_of(case), {name: way(case) for name, way in WAYS.items()}
    errors: dict[str, float] = {}
    if device == "cpu":
        exact_case = case.in_float64()
        exact = separate(exact_case)
        errors = {name: largest_error(losses[name], exact) for name in WAYS}
        errors["exact"] = largest_error(shared(exact_case), exact)
    seconds = measured(case, repeats)
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        wall, cpu = zip(*times, strict=True)
        faster = [
            [a / b for a, b in zip(t, s, strict=True)] for t, s in zip(times, seconds["shared"], strict=True)
        ]
        row = {"way": name, "geometry": geometry, "tiles": num_tiles, "tower": tower, "flops": flops[name]}
        row |= {"seconds": statistics.median(wall), "seconds_min": min(wall), "seconds_max": max(wall)}
        row |= {"cpu_seconds": statistics.median(cpu), "tflops_per_second": flops[name] / min(wall) / 1e12}
        row |= {"error_vs_separate": largest_error(losses[name], losses["separate"])}
        row |= {"error_vs_float64": errors.get(name), "smallest_loss": min(losses[name])}
        speedups = (statistics.median(column) for column in zip(*faster, strict=True))
        rows.append(row | dict(zip(("shared_is_faster", "shared_is_faster_by_cpu"), speedups, strict=True)))
    rows[-1]["error_in_float64"] = errors.get("exact")
    return rows


def bounds_of(geometry: str, num_tiles: int, tower: str) -> dict[str, float]:
    """Return the speedups of the shared way that FLOPs predict."""
    flops = flops_of(case_of(geometry, num_tiles, tower, "meta"))
    ends = {name: f"vs_{name}_{num_tiles}_{geometry}_{tower}" for name in ("separate", "packed")}
    return {f"bound_{end}": round(flops[name] / flops["shared"], 3) for name, end in ends.items()}


def ratios_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the speedups by wall and by CPU time."""
    ratios = {}
    for row in rows:
        if row["way"] != "shared":
            end = f"vs_{row['way']}_{row['tiles']}_{row['geometry']}_{row['tower']}"
            ratios[f"speedup_{end}"] = row["shared_is_faster"]
            ratios[f"cpu_speedup_{end}"] = row["shared_is_faster_by_cpu"]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--tiles", default="6,12")
    parser.add_argument("--towers", default="common,trained")
    parser.add_argument("--geometries", help="default: demo,medium on a CPU, 1b on CUDA")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none")
    torch.set_num_threads(options.threads)
    towers, tiles = options.towers.split(","), [int(number) for number in options.tiles.split(",")]
    geometries = (options.geometries or ("1b" if options.device == "cuda" else "demo,medium")).split(",")
    cases = [(num_tiles, tower) for tower in towers for num_tiles in tiles]
    ratios: dict[str, float] = {}
    for case in cases:
        for geometry in dict.fromkeys([*geometries, "1b"]):
            ratios |= bounds_of(geometry, *case)
    rows = []
    for geometry in geometries:
        for case in cases:
            rows += rows_of_case(geometry, *case, options.device, options.repeats)
            print(*rows[-len(WAYS) :], sep="\n", file=sys.stderr, flush=True)
    ratios |= ratios_of(rows)
    print(json.dumps({"name": "ratios", "device": options.device, "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    main()
