"""Normalisation of tiles on the device: pixels travel there as bytes, a quarter of their size as float32.

Shapes: N tiles, S tile side in pixels.
"""

import torch

from vico.tiling import IMAGENET_MEAN, IMAGENET_STD


def normalised(pixels_N3SS: torch.Tensor) -> torch.Tensor:
    """Return uint8 [N, 3, S, S] as float32, scaled to 0..1 and normalised with ImageNet's constants.

    The same float32 operations in the same order as `vico.tiling.pixel_values`, so the same values on a CPU.
    The constants are numbers and not tensors, which the host would have to send to the device each time.
    """
    values = pixels_N3SS.float().div_(255)
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        values[:, channel].sub_(mean).div_(std)
    return values
