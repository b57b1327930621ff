"""Networks built from the name of an activation: small, sequential, with readable child names.

An architecture is a plain dictionary, such as {"network": "mlp", "sizes": [64, 64, 64, 10], "activation":
"kaf"}: what a checkpoint stores and ``build`` turns back into the network.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor, nn

from certify.errors import InvalidInput, unknown_name
from models.activations import Factory, factory


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
    init: str = "default",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Network:
    """Return normalize, flatten, linear1, act1, ..., linearN: [batch, *shape] to [batch, classes].

    ``sizes`` is (features, hidden, ..., classes). ``mean`` and ``std`` belong to image channels and are left
    out where empty. Raises ``InvalidInput`` for fewer than two sizes or an unknown activation.
    """
    check_sizes("sizes", sizes, len(sizes) >= 2)
    make = factory(activation)
    layers = head(mean, std, dims=2)
    layers["flatten"] = nn.Flatten()
    _dense(layers, sizes, make)
    described = describe("mlp", activation, sizes=list(sizes), mean=list(mean), std=list(std), **_unless_default(init))
    return initialised(Network(layers, described), init)


def cnn(
    input_shape: Sequence[int],
    classes: int,
    activation: str | Factory = "relu",
    *,
    width: int = 16,
    init: str = "default",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Network:
    """Return two strided convolutions and two dense layers: [batch, *input_shape] to [batch, classes].

    The convolutions are 4x4 with stride 2 and padding 1, ``width`` and 2 ``width`` channels; the hidden dense
    layer has 100 neurons. Stride takes the place of max-pooling, which is harder to bound. Raises
    ``InvalidInput`` for images under 4x4, or an unknown activation.
    """
    check_sizes("input_shape", input_shape, len(input_shape) == 3 and min(input_shape[1:]) >= 4)
    check_sizes("classes and width", (classes, width), True)
    make = factory(activation)
    channels, height, side = input_shape
    layers = head(mean, std, dims=2)
    for index, (before, after) in enumerate([(channels, width), (width, 2 * width)], 1):
        layers[f"conv{index}"] = nn.Conv2d(before, after, 4, stride=2, padding=1)
        layers[f"act{index}"] = make(after)
        height, side = height // 2, side // 2
    layers["flatten"] = nn.Flatten()
    _dense(layers, (2 * width * height * side, 100, classes), make, first_act=3)
    options = {"width": width, "mean": list(mean), "std": list(std), **_unless_default(init)}
    described = describe("cnn", activation, input_shape=list(input_shape), classes=classes, **options)
    return initialised(Network(layers, described), init)


def cnn7(
    input_shape: Sequence[int],
    classes: int,
    activation: str | Factory = "relu",
    *,
    width: int = 64,
    batchnorm: bool = True,
    init: str = "default",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Network:
    """Return five 3x3 convolutions and two dense layers: [batch, *input_shape] to [batch, classes].

    ``width``, ``width`` and three times 2 ``width`` channels, the third with stride 2; 8 ``width`` hidden neurons;
    batch normalisation before every activation unless ``batchnorm`` is False. The network of the certified-training
    literature: Shi et al., "Fast certified robust training with short warmup" (2021).
    """
    check_sizes("input_shape", input_shape, len(input_shape) == 3 and min(input_shape[1:]) >= 2)
    check_sizes("classes and width", (classes, width), True)
    make, layers = factory(activation), head(mean, std, dims=2)
    channels, (height, side) = input_shape[0], input_shape[1:]
    for index, (after, stride) in enumerate(((1, 1), (1, 1), (2, 2), (2, 1), (2, 1)), 1):
        layers[f"conv{index}"] = nn.Conv2d(channels, width * after, 3, stride=stride, padding=1)
        channels = width * after
        if batchnorm:
            layers[f"norm{index}"] = nn.BatchNorm2d(channels)
        layers[f"act{index}"] = make(channels)
    layers["flatten"] = nn.Flatten()
    layers["linear1"] = nn.Linear(channels * -(-height // 2) * -(-side // 2), 8 * width)
    if batchnorm:
        layers["norm6"] = nn.BatchNorm1d(8 * width)
    layers["act6"] = make(8 * width)
    layers["linear2"] = nn.Linear(8 * width, classes)
    options = {"width": width, "batchnorm": batchnorm, "init": init, "mean": list(mean), "std": list(std)}
    described = describe("cnn7", activation, input_shape=list(input_shape), classes=classes, **options)
    return initialised(Network(layers, described), init)


def initialised(network: Network, init: str) -> Network:
    """Return the network with weights drawn anew: "default" (torch's), "he-uniform" or "orthogonal", biases 0.

    References: He et al., "Delving deep into rectifiers" (2015); Saxe, McClelland, Ganguli (2014), with gain sqrt(2).
    """
    if init not in INITS:
        raise unknown_name("init", init, INITS)
    for module in network.modules():
        if init != "default" and isinstance(module, (nn.Conv2d, nn.Linear)):
            if init == "he-uniform":
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            else:
                nn.init.orthogonal_(module.weight, math.sqrt(2))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


INITS = ("default", "he-uniform", "orthogonal")

NETWORKS: dict[str, Callable[..., Network]] = {"mlp": mlp, "cnn": cnn, "cnn7": cnn7}


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

    ``hidden`` are the sizes of an mlp's hidden layers; ``options`` go to the network (mean, std, width). Raises
    ``InvalidInput`` for a ``hidden`` that is no list.
    """
    if not isinstance(hidden, (list, tuple)):
        raise InvalidInput(f"hidden = {hidden!r}", "a list of sizes, one per hidden layer", "hidden = [64, 64]")
    if network == "mlp":
        shape: dict[str, Any] = {"sizes": [math.prod(input_shape), *hidden, classes]}
    else:
        shape = {"input_shape": list(input_shape), "classes": classes}
    return {"network": network, **shape, "activation": activation, **options}


def build(architecture: dict[str, Any], *, seed: int | None = None) -> Network:
    """Return the network that ``architecture`` describes, in train mode.

    With ``seed`` its weights depend on the seed alone and torch's global generator is left as it was. Raises
    ``InvalidInput`` for unknown networks, activations or options, and options of the wrong type.
    """
    options = dict(architecture)
    network = options.pop("network", None)
    if not isinstance(network, str) or network not in NETWORKS:
        raise unknown_name("network", network, NETWORKS)
    _check_types(network, options)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return NETWORKS[network](**options)
        except TypeError as error:
            raise InvalidInput(
                f"architecture {architecture}", f"the options of {network}", f"check its keys: {error}"
            ) from None


def said_elsewhere(options: Iterable[str], places: Mapping[str, str]) -> None:
    """Raise ``InvalidInput`` for a network's option that is said in another place, which ``places`` names."""
    for name in options:
        if name in places:
            place = places[name]
            raise InvalidInput(f"{name} as an option of the network", f"{name} by {place}", f"use {place}")


#: Options of these types are checked before a network is built: any value is true or false to Python.
TYPES: dict[Any, str] = {bool: "true or false", int: "a whole number", str: "a word"}


def _check_types(network: str, options: Mapping[str, Any]) -> None:
    """Raise ``InvalidInput`` for a flag, number or word of another type than the network's annotation."""
    made = NETWORKS[network]
    for name, kind in get_type_hints(getattr(made, "func", made)).items():
        if name in options and kind in TYPES and type(options[name]) is not kind:
            raise InvalidInput(f"{name} = {options[name]!r} of {network}", TYPES[kind], f"leave {name} out")


def head(mean: Sequence[float], std: Sequence[float], dims: int) -> OrderedDict[str, nn.Module]:
    """Return the first layers of a network: the normalisation, if there is one."""
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


def _unless_default(init: str) -> dict[str, str]:
    """The option, left out where it says nothing: checkpoints of earlier versions have none."""
    return {} if init == "default" else {"init": init}


def describe(network: str, activation: str | Factory, **options: Any) -> dict[str, Any] | None:
    """Return the architecture that ``build`` turns back into the network; None for an activation without a name."""
    return {"network": network, **options, "activation": activation} if isinstance(activation, str) else None


def check_sizes(name: str, sizes: Sequence[int], valid: bool) -> None:
    """Raise ``InvalidInput`` unless ``valid`` and all sizes are positive integers."""
    if not valid or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise InvalidInput(
            f"{name} {tuple(sizes)}",
            "positive integers: sizes (features, hidden, ..., classes), images (channels, height, width)",
            "mlp([64, 64, 64, 10]) or cnn((1, 28, 28), 10)",
        )
