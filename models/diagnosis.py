"""Why a network does not train: the gain of its activations, and where NaN begins."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from certify.registry import ACTIVATIONS
from models.kaf import KAF
from models.kwta import KWTA
from models.training.adversary import attacked

#: Half width and number of points of the quadrature over a standard normal variable.
REACH, POINTS = 9.0, 36_001


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return the activation modules by name, in their order; the base of a KAF is a part of it."""
    kafs = [module for module in model.modules() if isinstance(module, KAF)]
    inside = {part for kaf in kafs for part in kaf.modules() if part is not kaf}
    kinds = tuple(kind for kind in ACTIVATIONS if isinstance(kind, type) and issubclass(kind, nn.Module))
    named = ((name, module) for name, module in model.named_modules() if module not in inside)
    return {name: module for name, module in named if isinstance(module, kinds)}


@torch.no_grad()
def gain(activation: nn.Module, channels: int = 1) -> float | None:
    """Return E f'(z)^2 / Var f(z) for z ~ N(0, 1), both averaged over channels: what a layer does to gradients.

    The next layer mixes the channels and batch normalisation divides by the mixture's deviation, so every layer
    multiplies squared gradients by this number, whatever the scale of f: 1.467 for ReLU. None where f is not a function
    of single values, or constant.
    """
    if isinstance(activation, KWTA):
        return None
    module = copy.deepcopy(activation).double().eval()
    z = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    weight = (weight / weight.sum())[:, None]
    with torch.enable_grad():
        inputs = z[:, None].expand(-1, channels).clone().requires_grad_()
        f = module(inputs)
        (slope,) = torch.autograd.grad(f.sum(), inputs)
    mean = (weight * f).sum(0)
    variance = float((weight * (f - mean).square()).sum())
    return float((weight * slope.square()).sum()) / variance if variance > 0 else None


def channels_of(model: nn.Module, x: Float[Tensor, "n *shape"]) -> dict[str, int]:
    """Return how many channels (dimension 1) every activation module sees."""
    with watched(activations(model)) as seen:
        model(x)
    return {name: int(inputs.shape[1]) for name, (inputs, _) in seen.items()}


def nan_origin(model: nn.Module, x: Float[Tensor, "n *shape"], y: Int[Tensor, "n"]) -> str | None:
    """Return where the first value that is not finite appears: in a module's output, else in a weight's gradient.

    Modules are named in the order of their execution, gradients in that of the backward pass. None if all is finite.
    """
    leaves = {name: module for name, module in model.named_modules() if not any(module.children())}
    if not bool(torch.isfinite(x).all()):
        return "the input"
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            return f"the parameter {name}"
    with watched(leaves) as seen, attacked(model, "batch"), torch.enable_grad():
        loss = F.cross_entropy(model(x), y)
    for name, (_, output) in seen.items():
        if not bool(torch.isfinite(output).all()):
            return f"the output of {name}"
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    for name, gradient in reversed(list(zip(names, found, strict=True))):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            return f"the gradient of {name}"
    return None


@contextmanager
def watched(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record the (first) input and the output of modules while the model runs, in the order of execution.

    A module that runs several times keeps its first run.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.setdefault(name, (inputs[0].detach(), output.detach()))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
