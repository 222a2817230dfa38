"""Time to first token and decoding of the serving engine, at shares of compressed tiles, against FLOPs.

    python -m benchmarks.serving --size 1b --layers 0.1 --json

The model has the widths of InternVL3.5-1B or -8B (`--size`), random weights, and `--layers` of the layers of
vision tower and language model alike, so that the ratio of both is the published one. One run asks the same
requests, a picture and a question each, with 0, 1/3, 1/2 and 2/3 of the tiles compressed, alone (batch 1) and
all at once. The shares are given, not routed; the router runs in all of them.

- `first_token_per_s`: requests per second up to the first token of each.
- `gain`: first tokens per second over those at the full rate, the median over repetitions.
- `bound`: the gain that FLOPs allow, by `vico/objectives/flops.py`. The vision pass does not shrink.
- `router_share`, `connector_share`: of the time to the first token.
- `tokens_per_s`: generated tokens per second after the first tokens.

The vocabulary is 8,192: the head computes one position per request in any case.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch

from benchmarks.reports import ratio, report, row
from benchmarks.train_step import IMAGE_TOKEN_ID, random_model
from vico.inference.decoding import Decoder
from vico.inference.picture_encoding import EncodedPicture, PendingPicture, as_encoded_tiles, encode_batch
from vico.inference.tile_losses import num_tokens
from vico.model.internvl import VicoModel
from vico.objectives.flops import RowWork, connector_flops, language_flops, vision_flops
from vico.packing import TiledSequence
from vico.prompt import Skeleton

VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "heads": 16}
SIZES: dict[str, dict[str, Any]] = {
    "1b": {
        "vision": VISION,
        "text": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "heads": 16},
    },
    "8b": {
        "vision": VISION,
        "text": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "heads": 32},
    },
    "tiny": {
        "vision": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 10, "heads": 6},
        "text": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 10, "heads": 6},
    },
}
SHARES = {"full": 0.0, "1/3": 1 / 3, "1/2": 1 / 2, "2/3": 2 / 3}
TEXT_TOKENS = 32


def model_of(size: str, layers: float, tile_size: int, device: str, dtype: torch.dtype) -> VicoModel:
    """Return a random model with a share of the layers of a published size."""
    sizes = {part: dict(values) for part, values in SIZES[size].items()}
    for part in sizes.values():
        part["num_hidden_layers"] = max(1, round(part["num_hidden_layers"] * layers))
    keys = 8 if size != "tiny" else 3
    head_dim = 128 if size != "tiny" else 32
    sizes |= {"keys": keys, "head_dim": head_dim, "vocab_size": 8192, "tile_size": tile_size}
    model = random_model(sizes, device, dtype)
    if model.compressed_connector is None:
        model.add_compressed_connector(1)
    model.add_router(2)
    return model.eval()


def prompt_of(num_tiles: int, share: float, request: int) -> TiledSequence:
    """Return a prompt of one picture, at the rates of a share; all requests are different."""
    text = np.random.default_rng(request).integers(10, 8000, TEXT_TOKENS)
    ids = np.concatenate([text[:8], np.full(num_tiles, IMAGE_TOKEN_ID), text[8:]])
    compressed = np.zeros(num_tiles, bool)
    compressed[: round(share * num_tiles)] = True
    return TiledSequence(Skeleton(ids, np.zeros(len(ids), bool), num_tiles), compressed, 0)


class Requests:
    """Requests with the same pictures at any share, through the parts of the serving engine."""

    def __init__(self, model: VicoModel, num_requests: int, num_tiles: int, new_tokens: int):
        self.model, self.new_tokens = model, new_tokens
        size = model.settings.tile_size
        random = np.random.default_rng(0)
        shape = (num_requests, num_tiles, 3, size, size)
        self.pixels = random.standard_normal(shape).astype(np.float32)

    def timed(self, share: float) -> tuple[float, float]:
        """Answer all requests at once; return seconds to the last first token, and from there to the end."""
        started = time.perf_counter()
        pending = [PendingPicture(pixels) for pixels in self.pixels]
        while not all(picture.is_complete for picture in pending):
            encode_batch(self.model, [picture for picture in pending if not picture.is_complete])
        prompts = [prompt_of(len(pixels), share, n) for n, pixels in enumerate(self.pixels)]
        decoder = Decoder(self.model, 10**9, len(prompts))
        for picture, prompt in zip(pending, prompts, strict=True):
            self._start(decoder, picture.encoded(), prompt)
        waiting = set(decoder.rows)
        while waiting:
            waiting -= {row for row, _ in decoder.step()}
        first = time.perf_counter() - started
        for _ in range(self.new_tokens - 1):
            decoder.step()
        return first, time.perf_counter() - started - first

    def _start(self, decoder: Decoder, encoded: EncodedPicture, prompt: TiledSequence) -> None:
        [embeds_LD] = as_encoded_tiles(self.model, encoded).embeddings([prompt])
        decoder.reserve(len(embeds_LD) + self.new_tokens).start(embeds_LD, self.new_tokens)

    @torch.no_grad()
    def seconds_of_parts(self) -> tuple[float, float]:
        """Return the seconds that router and connectors take over the tiles of all requests."""
        tiles = torch.from_numpy(self.pixels.reshape(-1, *self.pixels.shape[2:])[:16])
        features = self.model.vision_features(tiles.to(self.model.lm_head.weight.device))
        passes = self.pixels.shape[0] * self.pixels.shape[1] / len(tiles)
        started = time.perf_counter()
        self.model.router.compress_probability(features)
        routed = time.perf_counter()
        self.model.full_tokens(features)
        self.model.compressed_tokens(features)
        return passes * (routed - started), passes * (time.perf_counter() - routed)


def flops(model: VicoModel, num_tiles: int, share: float) -> float:
    """Return the FLOPs of one request up to its first token. Both connectors run on every tile."""
    config = model.base.config
    prompt = prompt_of(num_tiles, share, 0)
    work = RowWork(num_tiles, num_tiles, (num_tokens(prompt, model.settings),), 0)
    parts = vision_flops(config, num_tiles), connector_flops(config, work), language_flops(config, work)
    return sum(part.forward for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--layers", type=float, default=0.1, help="share of the layers of both parts")
    parser.add_argument("--tile-size", type=int, default=448)
    parser.add_argument("--tiles", type=int, default=6)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    model = model_of(arguments.size, arguments.layers, arguments.tile_size, arguments.device, dtype)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for number in sorted({1, arguments.requests}):
        requests = Requests(model, number, arguments.tiles, arguments.new_tokens)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in SHARES}
        requests.timed(0.0)  # the first run allocates
        for _ in range(arguments.repetitions):
            for name, share in SHARES.items():
                times[name].append(requests.timed(share))
        first_rows = [
            row(f"batch {number} {name}", [number / first for first, _ in pairs], "first_token")
            for name, pairs in times.items()
        ]
        rows += first_rows
        generated = number * (arguments.new_tokens - 1)
        rows += [
            row(f"batch {number} {name} decode", [generated / rest for _, rest in pairs], "token")
            for name, pairs in times.items()
        ]
        router_s, connector_s = requests.seconds_of_parts()
        first_s = min(first for first, _ in times["full"])
        ratios[f"batch {number} router_share"] = round(router_s / first_s, 4)
        ratios[f"batch {number} connector_share"] = round(connector_s / first_s, 4)
        for name, share in SHARES.items():
            if share:
                gain = ratio(first_rows, f"batch {number} {name}", f"batch {number} full")
                bound = flops(model, arguments.tiles, 0.0) / flops(model, arguments.tiles, share)
                ratios[f"batch {number} {name} gain"] = gain
                ratios[f"batch {number} {name} bound"] = round(bound, 3)
    report(f"serving_{arguments.size}", rows, ratios, arguments.json)


if __name__ == "__main__":
    main()
