"""Which tiles of a request are compressed, and the report on it. Shapes: N tiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.serving.limits import RequestError
from pipeline.serving.request_body import Routing
from vico.inference.routing import absolute_rule, published_rule
from vico.settings import ModelSettings


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of P(compress), `absolute` None for a model without a router.

    `rule` is the rule for requests without one; None: the absolute rule if the model has a router.
    """

    absolute: float | None = None
    relative: float = 0.0
    rule: str | None = None


@dataclass(frozen=True)
class RoutedTiles:
    """`compressed_N` bool, and the report that the client may ask for."""

    compressed_N: np.ndarray
    report: Mapping[str, Any]


def routed_tiles(
    routing: Routing,
    p_compress_N: torch.Tensor | None,
    counts: Sequence[int],
    thresholds: Thresholds,
    settings: ModelSettings,
) -> RoutedTiles:
    """Return the decision for every tile.

    `p_compress_N` is None without a router; `counts` are the tiles per picture. Raises RequestError if the
    request asks for a rule that needs a router and there is none, or for a threshold that has no effect.
    """
    rule = routing.rule or thresholds.rule or ("full" if p_compress_N is None else "absolute")
    threshold = thresholds.absolute if routing.threshold is None else routing.threshold
    if rule == "full":
        if routing.threshold is not None:
            message = (
                f"vico.threshold={routing.threshold}: no tile is compressed here (rule full); leave it out"
            )
            raise RequestError(message, "vico.threshold")
        threshold, compressed_N = None, np.zeros(sum(counts), bool)
    elif p_compress_N is None:
        message = f"vico.rule={rule}: this model has no router; leave vico.rule out"
        raise RequestError(message, "vico.rule")
    else:
        assert threshold is not None, "a model with a router is served with a threshold"
        if rule == "absolute":
            compressed = absolute_rule(p_compress_N, threshold)
        else:
            compressed = published_rule(p_compress_N, thresholds.relative, threshold)
        compressed_N = compressed.numpy()
    tokens = np.where(compressed_N, settings.tokens_compressed, settings.tokens_full).tolist()
    positions = [(image, tile) for image, count in enumerate(counts) for tile in range(count)]
    tiles = [
        {
            "image": image,
            "tile": tile,
            "p_compress": None if p_compress_N is None else p_compress_N[n].item(),
            "compressed": bool(compressed_N[n]),
            "tokens": tokens[n],
        }
        for n, (image, tile) in enumerate(positions)
    ]
    report = {
        "rule": rule,
        "threshold": threshold,
        "visual_tokens": sum(tokens),
        "visual_tokens_full": len(tiles) * settings.tokens_full,
        "tiles": tiles,
    }
    return RoutedTiles(compressed_N, report)
