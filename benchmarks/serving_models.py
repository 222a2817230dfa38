"""The models of the serving benchmark: published widths with random weights, and the demo model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model
from vico.inference.tile_losses import num_tokens
from vico.objectives.flops import RowWork, connector_flops, language_flops, vision_flops
from vico.packing import TiledSequence
from vico.prompt import load_prompt_format
from vico.settings import ModelSettings

DEMO = Path(__file__).parents[1] / "models" / "small-internvl"
_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
_TEXT = {"num_key_value_heads": 8, "head_dim": 128}


@dataclass(frozen=True)
class Size:
    """Widths, all layers of vision tower and language model, and the share of them that is measured."""

    vision: dict[str, Any]
    text: dict[str, Any]
    layers: tuple[int, int]
    share: float

    def measured_layers(self, share: float | None = None) -> tuple[int, int]:
        """Return the layers of tower and language model at the share, at least one each."""
        tower, language = (max(1, round(number * (share or self.share))) for number in self.layers)
        return tower, language


SIZES = {
    "1b": Size(
        _VISION,
        {**_TEXT, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16},
        (24, 28),
        1 / 4,
    ),
    "8b": Size(
        _VISION,
        {**_TEXT, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32},
        (24, 36),
        1 / 12,
    ),
}
"""InternVL3.5-1B and -8B: InternViT-300M with Qwen3-0.6B and Qwen3-8B."""


def written_model(folder: Path, size: str, layers: tuple[int, int], dtype: torch.dtype) -> Path:
    """Write a model with connectors and router, and return its folder.

    Router and compressed connector are random. No answer ends by itself: the end of turn has the score 0, and
    some other token a higher one.
    """
    source = DEMO
    if size != "demo":
        vision = {**SIZES[size].vision, "num_hidden_layers": layers[0]}
        text = {**SIZES[size].text, "num_hidden_layers": layers[1]}
        source = make_tiny_model(folder / "base", tile_size=448, vision=vision, text=text)
    torch.manual_seed(3)
    model = load_model(source, dtype)
    model.add_compressed_connector(1)
    model.add_router(2)
    with torch.no_grad():
        model.lm_head.weight[load_prompt_format(source).end_of_turn_id] = 0
    save_model(model.state_dict(), source, folder / "model", {"absolute_threshold": 0.5})
    return folder / "model"


def request_flops(
    config: Any, settings: ModelSettings, prompt: TiledSequence, layers: tuple[int, int] | None = None
) -> float:
    """Return the FLOPs of a request up to its first token; with `layers`, those of the whole model.

    The vision tower does not depend on the rates, and both connectors run on every tile.
    """
    num_tiles = prompt.skeleton.num_tiles
    work = RowWork(num_tiles, num_tiles, (num_tokens(prompt, settings),), 0)
    vision, language = vision_flops(config, num_tiles).forward, language_flops(config, work).forward
    if layers is not None:
        vision *= layers[0] / config.vision_config.num_hidden_layers
        language *= layers[1] / config.text_config.num_hidden_layers
    return vision + connector_flops(config, work).forward + language
