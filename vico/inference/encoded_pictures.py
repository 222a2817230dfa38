"""Pictures as visual tokens at both rates, with the router's probabilities, for `vico.load`.

Shapes: N tiles, P vision tokens per tile, v their width, S pixels per side.
"""

from collections.abc import Iterable

import torch
from PIL import Image

from vico.inference.tile_losses import EncodedTiles
from vico.model.internvl import VicoModel
from vico.tiling import Tiling, pixel_values

_BATCH_TILES = 16


@torch.no_grad()
def encoded_pictures(
    model: VicoModel,
    pictures: Iterable[tuple[Image.Image, Tiling]],
) -> tuple[EncodedTiles, torch.Tensor | None]:
    """Return the visual tokens of all tiles, and P(compress) float32 [N] on the CPU if there is a router.

    The tiles of one picture at a time are in memory.
    """
    weight = model.lm_head.weight
    router = model.router if model.compressed_connector is not None else None
    full = [weight.new_zeros(0, model.settings.tokens_full, model.language_width)]
    compressed = [weight.new_zeros(0, model.settings.tokens_compressed, model.language_width)]
    p_compress = [torch.zeros(0)]
    for picture, tiling in pictures:
        pixels_N3SS = pixel_values(picture, tiling)
        for start in range(0, len(pixels_N3SS), _BATCH_TILES):
            batch = torch.from_numpy(pixels_N3SS[start : start + _BATCH_TILES]).to(weight.device)
            features_NPv = model.vision_features(batch)
            full.append(model.full_tokens(features_NPv))
            if router is not None:
                compressed.append(model.compressed_tokens(features_NPv))
                p_compress.append(router.compress_probability(features_NPv).cpu())
    if router is None:
        return EncodedTiles(model, torch.cat(full), None), None
    return EncodedTiles(model, torch.cat(full), torch.cat(compressed)), torch.cat(p_compress)
