"""Augmentation of whole batches on their device: crop, flip and cutout, each image by draws of its own."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from certify.errors import InvalidInput
from models.training.config import Augment


def augmented(
    x: Float[Tensor, "batch *shape"], options: Augment, draws: Float[Tensor, "batch 5"]
) -> Float[Tensor, "batch *shape"]:
    """Return the images changed as ``options`` say; ``draws`` in [0, 1) decide where.

    Raises ``InvalidInput`` for anything but images [batch, channels, height, width].
    """
    if options == Augment():
        return x
    if x.ndim != 4:
        raise InvalidInput(f"augmentation of inputs {tuple(x.shape[1:])}", "images [channels, height, width]")
    if options.flip:
        x = torch.where(draws[:, 0].view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
    if options.crop:
        x = _cropped(x, options.crop, draws[:, 1:3])
    return _cut_out(x, options.cutout, draws[:, 3:5]) if options.cutout else x


def _cropped(x: Tensor, pad: int, draws: Tensor) -> Tensor:
    """Every image padded with zeros by ``pad``, and cut back at an offset of its own."""
    n, _, height, width = x.shape
    top, left = (draws * (2 * pad + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    padded = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cut_out(x: Tensor, side: int, draws: Tensor) -> Tensor:
    """A square of zeros around a random pixel, as far as it lies in the image.

    Reference: DeVries, Taylor, "Improved regularization of convolutional neural networks with cutout" (2017).
    """
    masks = []
    for size, draw in zip(x.shape[2:], draws.unbind(1), strict=True):
        first = (draw * size).long()[:, None] - side // 2
        place = torch.arange(size, device=x.device)
        masks.append((place >= first) & (place < first + side))
    inside = masks[0][:, None, :, None] & masks[1][:, None, None, :]
    return x.masked_fill(inside, 0.0)
