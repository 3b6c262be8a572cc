"""Image augmentation on the device: what a policy must not care about."""

from __future__ import annotations

import torch
from torch import Tensor


def augment_images(images: Tensor, shift: float, colour: float, generator: torch.Generator) -> Tensor:
    """Displace and recolour each picture at random.

    images (B, cameras, 3, S, S) float32 in [-1, 1]; `shift` is the largest displacement as a share of S (edges are
    repeated), `colour` the largest change of brightness, contrast and single channels -> same shape, in [-1, 1].
    """
    batch, cameras, _, size, _ = images.shape
    flat = images.flatten(0, 1)
    count = batch * cameras

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=images.device) * 2 - 1

    reach = round(shift * size)
    if reach:
        place = torch.arange(size, device=images.device)
        rows, columns = (
            (place + (uniform(count, 1) * (reach + 0.49)).round().long()).clamp(0, size - 1) for _ in range(2)
        )
        index = torch.arange(count, device=images.device)[:, None, None]
        flat = flat.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if colour:
        contrast = 1 + colour * uniform(count, 1, 1, 1)
        channels = 1 + 0.5 * colour * uniform(count, 3, 1, 1)
        brightness = colour * uniform(count, 1, 1, 1)
        mean = flat.mean(dim=(1, 2, 3), keepdim=True)
        flat = ((flat - mean) * contrast + mean) * channels + brightness
    return flat.clamp(-1, 1).unflatten(0, (batch, cameras))
