"""The VGG-like network of F. Peconi's thesis (Sapienza, 2020)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.activations import Factory, factory
from models.networks import NETWORKS, Network, check_sizes, describe, head, initialised

#: Share of values dropped after each block.
DROPOUT = (0.2, 0.3, 0.4)
#: Neurons of the hidden dense layer, in units of the width.
HIDDEN = 4


def vgg(
    input_shape: Sequence[int],
    classes: int,
    activation: str | Factory = "relu",
    *,
    width: int = 32,
    pool: str = "max",
    init: str = "he-uniform",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Network:
    """Return three blocks and two dense layers: [batch, *input_shape] to [batch, classes].

    A block is two 3x3 convolutions, each with batch normalisation before the activation, a 2x2 pooling and dropout;
    ``width``, 2 and 4 ``width`` channels, 4 ``width`` hidden neurons. ``pool`` is "max", as published, or "avg", which
    is exact for bounds. Raises ``InvalidInput`` for images under 8x8 and unknown names.
    """
    check_sizes("input_shape", input_shape, len(input_shape) == 3 and min(input_shape[1:]) >= 8)
    check_sizes("classes and width", (classes, width), pool in ("max", "avg"))
    make, layers = factory(activation), head(mean, std, dims=2)
    channels, index = input_shape[0], 0
    for block, dropout in enumerate(DROPOUT, 1):
        for _ in range(2):
            index, after = index + 1, width * 2 ** (block - 1)
            layers[f"conv{index}"] = nn.Conv2d(channels, after, 3, padding=1)
            layers[f"norm{index}"] = nn.BatchNorm2d(after)
            layers[f"act{index}"] = make(after)
            channels = after
        layers[f"pool{block}"] = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
        layers[f"dropout{block}"] = nn.Dropout(dropout)
    layers["flatten"] = nn.Flatten()
    layers["linear1"] = nn.Linear(channels * (input_shape[1] // 8) * (input_shape[2] // 8), HIDDEN * width)
    layers["norm7"] = nn.BatchNorm1d(HIDDEN * width)
    layers["act7"] = make(HIDDEN * width)
    layers["linear2"] = nn.Linear(HIDDEN * width, classes)
    options = {"width": width, "pool": pool, "init": init, "mean": list(mean), "std": list(std)}
    described = describe("vgg", activation, input_shape=list(input_shape), classes=classes, **options)
    return initialised(Network(layers, described), init)


NETWORKS["vgg"] = vgg
