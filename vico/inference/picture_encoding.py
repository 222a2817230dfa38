"""Pictures through vision tower, router and connectors, tiles of several pictures in one pass, and a cache.

Shapes: N tiles of a picture, S tile side in pixels, P vision tokens per tile, v their width, F tokens of a
tile at the full rate, C at the compressed rate, D language width.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vico.inference.tile_losses import EncodedTiles
from vico.model.internvl import VicoModel

BATCH_TILES = 16


@dataclass(frozen=True)
class EncodedPicture:
    """The visual tokens of N tiles at both rates, and P(compress) float32 [N] on the CPU.

    The compressed tokens and P(compress) are None for a model without a router.
    """

    full_NFD: torch.Tensor
    compressed_NCD: torch.Tensor | None
    p_compress_N: torch.Tensor | None

    @property
    def num_bytes(self) -> int:
        parts = (self.full_NFD, self.compressed_NCD, self.p_compress_N)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(eq=False)
class PendingPicture:
    """A picture's tiles, float32 [N, 3, S, S], and the part of them that is encoded."""

    pixels_N3SS: np.ndarray
    parts: list[EncodedPicture] = field(default_factory=list)

    @property
    def num_encoded(self) -> int:
        return sum(len(part.full_NFD) for part in self.parts)

    @property
    def is_complete(self) -> bool:
        return self.num_encoded == len(self.pixels_N3SS)

    def encoded(self) -> EncodedPicture:
        """Return the encoded tiles of a complete picture."""
        return joined_pictures(self.parts)


@torch.no_grad()
def encode_batch(
    model: VicoModel, pictures: Sequence[PendingPicture], batch_tiles: int = BATCH_TILES
) -> None:
    """Encode the next tiles of the first incomplete pictures, at most `batch_tiles`, in one pass."""
    taken: list[tuple[PendingPicture, int]] = []
    room = batch_tiles
    for picture in pictures:
        count = min(len(picture.pixels_N3SS) - picture.num_encoded, room)
        if count:
            taken.append((picture, count))
            room -= count
    if not taken:
        return
    pixels_N3SS = np.concatenate(
        [picture.pixels_N3SS[picture.num_encoded : picture.num_encoded + count] for picture, count in taken]
    )
    encoded = encoded_picture(model, pixels_N3SS)
    first = 0
    for picture, count in taken:
        tiles = slice(first, first + count)
        compressed, p_compress = encoded.compressed_NCD, encoded.p_compress_N
        picture.parts.append(
            EncodedPicture(
                encoded.full_NFD[tiles].clone(),  # a view would keep the whole batch in memory
                None if compressed is None else compressed[tiles].clone(),
                None if p_compress is None else p_compress[tiles].clone(),
            )
        )
        first += count


@torch.no_grad()
def encoded_picture(model: VicoModel, pixels_N3SS: np.ndarray) -> EncodedPicture:
    """Return the encoded tiles of float32 [N, 3, S, S], in one pass."""
    features_NPv = model.vision_features(torch.from_numpy(pixels_N3SS).to(model.lm_head.weight.device))
    # Without the class tokens the tiles are apart in memory. In bfloat16 on a CPU the router's products of
    # such a batch took ten times as long, which was most of the router's time.
    features_NPv = features_NPv.contiguous()
    full_NFD = model.full_tokens(features_NPv)
    if model.router is None or model.compressed_connector is None:
        return EncodedPicture(full_NFD, None, None)
    p_compress_N = model.router.compress_probability(features_NPv).float().cpu()
    return EncodedPicture(full_NFD, model.compressed_tokens(features_NPv), p_compress_N)


def joined_pictures(pictures: Sequence[EncodedPicture]) -> EncodedPicture:
    """Return the tiles of all pictures, in order; at least one picture is needed."""
    if len(pictures) == 1:
        return pictures[0]
    compressed = [picture.compressed_NCD for picture in pictures if picture.compressed_NCD is not None]
    p_compress = [picture.p_compress_N for picture in pictures if picture.p_compress_N is not None]
    return EncodedPicture(
        torch.cat([picture.full_NFD for picture in pictures]),
        torch.cat(compressed) if compressed else None,
        torch.cat(p_compress) if p_compress else None,
    )


def no_pictures(model: VicoModel) -> EncodedPicture:
    """Return zero tiles, for a prompt without a picture."""
    weight, settings = model.lm_head.weight, model.settings
    full = weight.new_zeros(0, settings.tokens_full, model.language_width)
    if model.router is None or model.compressed_connector is None:
        return EncodedPicture(full, None, None)
    compressed = weight.new_zeros(0, settings.tokens_compressed, model.language_width)
    return EncodedPicture(full, compressed, torch.zeros(0))


def as_encoded_tiles(model: VicoModel, picture: EncodedPicture) -> EncodedTiles:
    """Return the tiles in the form that prompts are embedded with."""
    return EncodedTiles(model, picture.full_NFD, picture.compressed_NCD)


@dataclass
class PictureCache:
    """The encoded pictures that were used last, at most `max_bytes` of them."""

    max_bytes: int
    num_bytes: int = 0
    _pictures: "OrderedDict[Hashable, EncodedPicture]" = field(default_factory=OrderedDict)

    def get(self, key: Hashable) -> EncodedPicture | None:
        picture = self._pictures.get(key)
        if picture is not None:
            self._pictures.move_to_end(key)
        return picture

    def put(self, key: Hashable, picture: EncodedPicture) -> None:
        """Keep a picture, in place of those that were not used for longest."""
        if key in self._pictures or picture.num_bytes > self.max_bytes:
            return
        self._pictures[key] = picture
        self.num_bytes += picture.num_bytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._pictures.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
