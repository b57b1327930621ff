"""Networks built from the name of an activation: small, sequential, with readable child names.

An architecture is a plain dictionary, such as {"network": "mlp", "sizes": [64, 64, 64, 10], "activation":
"kaf"}: what a checkpoint stores and ``build`` turns back into the network.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from certify.errors import InvalidInput, unknown_name
from models.kaf import KAF, TARGETS

#: Makes the activation of a layer from its number of neurons or channels.
Factory = Callable[[int], nn.Module]


def _plain(module: type[nn.Module]) -> Factory:
    return lambda _: module()


ACTIVATIONS: dict[str, Factory] = {
    "relu": _plain(nn.ReLU),
    "leaky_relu": _plain(nn.LeakyReLU),
    "prelu": nn.PReLU,
    "relu6": _plain(nn.ReLU6),
    "hardtanh": _plain(nn.Hardtanh),
    "sigmoid": _plain(nn.Sigmoid),
    "tanh": _plain(nn.Tanh),
    "elu": _plain(nn.ELU),
    "silu": _plain(nn.SiLU),
    "gelu": _plain(nn.GELU),
    "softplus": _plain(nn.Softplus),
    "kaf": KAF,
    **{f"kaf-{name}": partial(KAF, init=name) for name in TARGETS},
    "kaf-free": partial(KAF, trainable=True),
    "relu+kaf": lambda channels: KAF(channels, init=torch.zeros_like, base=nn.ReLU()),
    "silu+kaf": lambda channels: KAF(channels, init=torch.zeros_like, base=nn.SiLU()),
}


class Normalize(nn.Module):
    """Return (x - mean) / std with fixed buffers: one value per channel, or one for all.

    ``dims`` counts the dimensions after the channel (2 for images). Raises ``InvalidInput`` for std <= 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], dims: int = 2) -> None:
        super().__init__()
        finite = all(math.isfinite(value) for value in (*mean, *std))
        if len(mean) != len(std) or len(mean) == 0 or not finite or min(std) <= 0:
            raise InvalidInput(
                f"mean {list(mean)} and std {list(std)}",
                "as many std > 0 as means, one per channel",
                "mean 0 and std 1 leave the input as it is",
            )
        shape = (len(mean), *[1] * dims)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.get_default_dtype()).view(shape))
        self.register_buffer("std", torch.tensor(std, dtype=torch.get_default_dtype()).view(shape))

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Return the normalised x, of the same shape."""
        return (x - self.mean) / self.std


class Network(nn.Sequential):
    """An ``nn.Sequential`` that carries its own architecture (None if an activation factory made it)."""

    def __init__(self, layers: OrderedDict[str, nn.Module], architecture: dict[str, Any] | None) -> None:
        super().__init__(layers)
        self.architecture = architecture


def mlp(
    sizes: Sequence[int],
    activation: str | Factory = "relu",
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Network:
    """Return normalize, flatten, linear1, act1, ..., linearN: [batch, *shape] to [batch, classes].

    ``sizes`` is (features, hidden, ..., classes). ``mean`` and ``std`` belong to image channels and are left
    out where empty. Raises ``InvalidInput`` for fewer than two sizes or an unknown activation.
    """
    _check_sizes("sizes", sizes, len(sizes) >= 2)
    make = _factory(activation)
    layers = _head(mean, std, dims=2)
    layers["flatten"] = nn.Flatten()
    _dense(layers, sizes, make)
    return Network(layers, _describe("mlp", activation, sizes=list(sizes), mean=list(mean), std=list(std)))


def cnn(
    input_shape: Sequence[int],
    classes: int,
    activation: str | Factory = "relu",
    *,
    width: int = 16,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Network:
    """Return two strided convolutions and two dense layers: [batch, *input_shape] to [batch, classes].

    The convolutions are 4x4 with stride 2 and padding 1, ``width`` and 2 ``width`` channels; the hidden dense
    layer has 100 neurons. Stride takes the place of max-pooling, which is harder to bound. Raises
    ``InvalidInput`` for images under 4x4, or an unknown activation.
    """
    _check_sizes("input_shape", input_shape, len(input_shape) == 3 and min(input_shape[1:]) >= 4)
    _check_sizes("classes and width", (classes, width), True)
    make = _factory(activation)
    channels, height, side = input_shape
    layers = _head(mean, std, dims=2)
    for index, (before, after) in enumerate([(channels, width), (width, 2 * width)], 1):
        layers[f"conv{index}"] = nn.Conv2d(before, after, 4, stride=2, padding=1)
        layers[f"act{index}"] = make(after)
        height, side = height // 2, side // 2
    layers["flatten"] = nn.Flatten()
    _dense(layers, (2 * width * height * side, 100, classes), make, first_act=3)
    architecture = _describe(
        "cnn",
        activation,
        input_shape=list(input_shape),
        classes=classes,
        width=width,
        mean=list(mean),
        std=list(std),
    )
    return Network(layers, architecture)


NETWORKS: dict[str, Callable[..., Network]] = {"mlp": mlp, "cnn": cnn}


def architecture(
    network: str,
    input_shape: Sequence[int],
    classes: int,
    activation: str,
    *,
    hidden: Sequence[int] = (64, 64),
    **options: Any,
) -> dict[str, Any]:
    """Return the architecture of a registered network for data of that shape, for ``build``.

    ``hidden`` are the sizes of an mlp's hidden layers; ``options`` go to the network (mean, std, width).
    """
    if network == "mlp":
        shape: dict[str, Any] = {"sizes": [math.prod(input_shape), *hidden, classes]}
    else:
        shape = {"input_shape": list(input_shape), "classes": classes}
    return {"network": network, **shape, "activation": activation, **options}


def build(architecture: dict[str, Any], *, seed: int | None = None) -> Network:
    """Return the network that ``architecture`` describes, in train mode.

    With ``seed`` its weights depend on the seed alone and torch's global generator is left as it was. Raises
    ``InvalidInput`` for unknown networks, activations or options.
    """
    options = dict(architecture)
    network = options.pop("network", None)
    if network not in NETWORKS:
        raise unknown_name("network", network, NETWORKS)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return NETWORKS[network](**options)
        except TypeError as error:
            raise InvalidInput(
                f"architecture {architecture}", f"the options of {network}", f"check its keys: {error}"
            ) from None


def _head(mean: Sequence[float], std: Sequence[float], dims: int) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(mean) or len(std):
        layers["normalize"] = Normalize(mean, std, dims)
    return layers


def _dense(layers: OrderedDict[str, nn.Module], sizes: Sequence[int], make: Factory, *, first_act: int = 1) -> None:
    """Append linear1, act, linear2, ..., without an activation after the last."""
    for index, (before, after) in enumerate(pairwise(sizes), 1):
        layers[f"linear{index}"] = nn.Linear(before, after)
        if index < len(sizes) - 1:
            layers[f"act{first_act + index - 1}"] = make(after)


def _describe(network: str, activation: str | Factory, **options: Any) -> dict[str, Any] | None:
    return {"network": network, **options, "activation": activation} if isinstance(activation, str) else None


def _factory(activation: str | Factory) -> Factory:
    if callable(activation):
        return activation
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    return ACTIVATIONS[activation]


def _check_sizes(name: str, sizes: Sequence[int], valid: bool) -> None:
    if not valid or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise InvalidInput(
            f"{name} {tuple(sizes)}",
            "positive integers: sizes (features, hidden, ..., classes), images (channels, height, width)",
            "mlp([64, 64, 64, 10]) or cnn((1, 28, 28), 10)",
        )
