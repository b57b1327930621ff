"""Residual networks in their CIFAR form: ResNet20 and 56, post- and pre-activation, and PreActResNet18.

References: He et al., "Deep residual learning for image recognition" (2016), section 4.2; He et al., "Identity mappings
in deep residual networks" (2016). Shortcuts that change shape are 1x1 convolutions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.activations import Factory, factory
from models.networks import NETWORKS, Network, check_sizes, describe, head, initialised

#: (channels in units of the width, blocks, stride of the first one) of every stage.
Stages = tuple[tuple[int, int, int], ...]


class PostBlock(nn.Module):
    """act(norm(conv(act(norm(conv(x))))) + shortcut(x)): the activation after the addition is on every path."""

    def __init__(self, before: int, after: int, stride: int, make: Factory) -> None:
        super().__init__()
        self.conv1 = _conv3(before, after, stride)
        self.norm1, self.act1 = nn.BatchNorm2d(after), make(after)
        self.conv2 = _conv3(after, after)
        self.norm2 = nn.BatchNorm2d(after)
        shortcut = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(before, after, 1, stride, bias=False), norm=nn.BatchNorm2d(after))
        )
        self.shortcut: nn.Module = nn.Identity() if (before, stride) == (after, 1) else shortcut
        self.act2 = make(after)

    def forward(self, x: Float[Tensor, "batch before h w"]) -> Float[Tensor, "batch after h2 w2"]:
        """Return the block's output, smaller by its stride."""
        y = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(y)) + self.shortcut(x))


class PreBlock(nn.Module):
    """conv(act(norm(conv(z)))) + shortcut, with z = act(norm(x)): between blocks of one shape x itself is passed on."""

    def __init__(self, before: int, after: int, stride: int, make: Factory) -> None:
        super().__init__()
        self.norm1, self.act1 = nn.BatchNorm2d(before), make(before)
        self.conv1 = _conv3(before, after, stride)
        self.norm2, self.act2 = nn.BatchNorm2d(after), make(after)
        self.conv2 = _conv3(after, after)
        self.same = (before, stride) == (after, 1)
        if not self.same:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "batch before h w"]) -> Float[Tensor, "batch after h2 w2"]:
        """Return the block's output, smaller by its stride."""
        z = self.act1(self.norm1(x))
        y = self.conv2(self.act2(self.norm2(self.conv1(z))))
        return y + (x if self.same else self.shortcut(z))


def resnet(
    name: str,
    stages: Stages,
    input_shape: Sequence[int],
    classes: int,
    activation: str | Factory = "relu",
    *,
    width: int,
    preactivation: bool,
    init: str = "he-uniform",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Network:
    """Return a 3x3 convolution, stages of blocks, the mean over pixels and a dense layer.

    ``preactivation`` chooses between ``PreBlock`` and ``PostBlock``. Raises ``InvalidInput`` for images that the
    strides leave nothing of, and unknown names.
    """
    check_sizes("input_shape", input_shape, len(input_shape) == 3 and min(input_shape[1:]) >= 2 ** (len(stages) - 1))
    check_sizes("classes and width", (classes, width), True)
    make, layers = factory(activation), head(mean, std, dims=2)
    channels = width
    layers["conv"] = _conv3(input_shape[0], channels)
    if not preactivation:
        layers["norm"], layers["act"] = nn.BatchNorm2d(channels), make(channels)
    block = PreBlock if preactivation else PostBlock
    for index, (scale, count, stride) in enumerate(stages, 1):
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for place in range(count):
            blocks[f"block{place + 1}"] = block(channels, width * scale, stride if place == 0 else 1, make)
            channels = width * scale
        layers[f"stage{index}"] = nn.Sequential(blocks)
    if preactivation:
        layers["norm"], layers["act"] = nn.BatchNorm2d(channels), make(channels)
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["linear"] = nn.Linear(channels, classes)
    options = {
        "width": width,
        "preactivation": preactivation,
        "init": init,
        "mean": list(mean),
        "std": list(std),
    }
    described = describe(name, activation, input_shape=list(input_shape), classes=classes, **options)
    return _with_calm_branches(initialised(Network(layers, described), init))


def _with_calm_branches(network: Network) -> Network:
    """Scale the last convolution of every pre-activation branch by 1 / blocks.

    So the identity paths carry the signal at the start, whatever the gain of an activation: gradients of a KafResNet56
    explode otherwise (first to last convolution 9e4; 0.7 with it). Reference: H. Zhang, Dauphin, Ma, "Fixup
    initialization: residual learning without normalization" (2019), whose argument needs no normalisation to be absent.
    """
    branches = [module for module in network.modules() if isinstance(module, PreBlock)]
    with torch.no_grad():
        for branch in branches:
            branch.conv2.weight.div_(len(branches))
    return network


def _conv3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without a bias: batch normalisation follows."""
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)


def _cifar(depth: int) -> Stages:
    blocks = (depth - 2) // 6
    return (1, blocks, 1), (2, blocks, 2), (4, blocks, 2)


#: As published: activations after the additions. With KAFs gradients explode the deeper it is (``certify diagnose``).
resnet20 = partial(resnet, "resnet20", _cifar(20), width=16, preactivation=False)
#: Pre-activation, so that it trains with any activation; ``preactivation=False`` is the published one.
resnet56 = partial(resnet, "resnet56", _cifar(56), width=16, preactivation=True)
preactresnet18 = partial(
    resnet, "preactresnet18", ((1, 2, 1), (2, 2, 2), (4, 2, 2), (8, 2, 2)), width=64, preactivation=True
)

NETWORKS |= {"resnet20": resnet20, "resnet56": resnet56, "preactresnet18": preactresnet18}
