"""Activations by name: what networks are built with, from a number of neurons or channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from certify.errors import InvalidInput, unknown_name
from models.kaf import KAF, TARGETS
from models.kwta import KWTA
from models.pssilu import PSSiLU

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
    "hardsigmoid": _plain(nn.Hardsigmoid),
    "hardswish": _plain(nn.Hardswish),
    "sigmoid": _plain(nn.Sigmoid),
    "tanh": _plain(nn.Tanh),
    "elu": _plain(nn.ELU),
    "silu": _plain(nn.SiLU),
    "swish": _plain(nn.SiLU),
    "pssilu": _plain(PSSiLU),
    "gelu": _plain(nn.GELU),
    "softplus": _plain(nn.Softplus),
    "kwta": _plain(KWTA),
    "kaf": KAF,
    **{f"kaf-{name}": partial(KAF, init=name) for name in TARGETS},
    "kaf-swish": partial(KAF, init="silu"),
    "kaf-free": partial(KAF, trainable=True),
    "relu+kaf": lambda channels: KAF(channels, init=torch.zeros_like, base=nn.ReLU()),
    "silu+kaf": lambda channels: KAF(channels, init=torch.zeros_like, base=nn.SiLU()),
}


def factory(activation: str | Factory) -> Factory:
    """Return the factory of that name, or the one given.

    A KAF's name may be followed by options of ``KAF``: "kaf-elu:ridge=auto,tails=linear", "kaf:trainable=true". Raises
    ``InvalidInput`` for unknown names and options.
    """
    if callable(activation):
        return activation
    name, _, words = activation.partition(":") if isinstance(activation, str) else (activation, "", "")
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    made = ACTIVATIONS[name]
    if not words:
        return made
    options = dict(_option(word) for word in words.split(","))
    if "base" in options:  # a module, which words cannot give
        raise InvalidInput(f"base = {options['base']!r} of {name}", "a base by name", "relu+kaf or silu+kaf")
    made = partial(made, **options)
    try:
        made(1)
    except TypeError:
        raise InvalidInput(
            f"the activation {activation!r}", "options that it has", "kaf-elu:ridge=auto,tails=linear"
        ) from None
    return made


def _option(word: str) -> tuple[str, str | bool | int | float]:
    """KEY=VALUE, the value as a number, true or false where it is one."""
    key, sign, text = (part.strip() for part in word.partition("="))
    if not (key and sign and text):
        raise InvalidInput(f"the option {word!r} of an activation", "KEY=VALUE", "kaf-elu:ridge=auto,tails=linear")
    if text in ("true", "false"):
        return key, text == "true"
    for kind in (int, float):
        try:
            return key, kind(text)
        except ValueError:
            continue
    return key, text
