"""Prompts whose greedy answers are known from the simplest possible loop."""

import numpy as np
import pytest
import torch

from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.inference.tile_losses import EncodedTiles, encoded_tiles
from vico.packing import TiledSequence
from vico.prompt import load_prompt_format

SHAPES = [(3,), (1,), (2, 1), (), (4,), (1, 1, 1), (1,), (3, 3)]
MAX_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model whose answers vary, its tiles, and prompts with no, one and several pictures at mixed rates."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "m", tied=False)
    model = load_model(folder)
    model.add_compressed_connector(1)
    model.eval()
    with torch.no_grad():  # larger weights: the next token depends on all earlier ones
        for name, parameter in model.base.model.language_model.named_parameters():
            if "proj" in name:
                parameter.mul_(6)
    prompt_format, random = load_prompt_format(folder), np.random.default_rng(0)
    prompts, first = [], 0
    for n, shape in enumerate(SHAPES):
        turns = [{"from": "human", "value": "<image>" * len(shape) + "what is written here " * (1 + n % 3)}]
        skeleton = prompt_format.encode(turns, shape, add_generation_prompt=True)
        prompts.append(TiledSequence(skeleton, random.random(sum(shape)) < 0.5, first))
        first += sum(shape)
    pixels = random.standard_normal((first, 3, 56, 56)).astype(np.float32)
    return encoded_tiles(model, pixels, 8), prompts


@torch.no_grad()
def plain_loop(tiles: EncodedTiles, prompt: TiledSequence) -> list[int]:
    """Return greedy tokens of one prompt: a whole forward pass for each, no cache, padding or end."""
    model = tiles.model
    embeds = tiles.embeddings([prompt])[0].unsqueeze(0)
    ids: list[int] = []
    for _ in range(MAX_NEW_TOKENS):
        ids.append(int(model.base(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.base.model.get_input_embeddings()(torch.tensor([ids[-1:]]))], dim=1)
    return ids


@pytest.fixture(scope="module")
def expected(case):
    tiles, prompts = case
    return [plain_loop(tiles, prompt) for prompt in prompts]
