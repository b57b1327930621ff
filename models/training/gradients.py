"""Gradients layer by layer: whether they explode or vanish on the way back."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from models.training.adversary import attacked


def gradient_norms(model: nn.Module, x: Float[Tensor, "n *shape"], y: Int[Tensor, "n"]) -> dict[str, float]:
    """Return the l2 norm of the loss's gradient in the weight of every trained dense layer and convolution, in order.

    In train mode, with the statistics of the batch; running statistics, modes and gradients are left as they are.
    """
    layers = {name: module for name, module in model.named_modules() if _is_trained(module)}
    weights = [module.weight for module in layers.values()]
    if not weights:
        return {}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        with attacked(model, "batch"), torch.enable_grad():
            loss = F.cross_entropy(model(x), y)
            found = torch.autograd.grad(loss, weights, allow_unused=True)
    finally:
        for module, mode in modes:
            module.training = mode
    return {name: 0.0 if g is None else float(g.double().norm()) for name, g in zip(layers, found, strict=True)}


def gradient_ratio(norms: dict[str, float]) -> float:
    """Return the first layer's gradient norm over the last hidden one's: far above 1 gradients explode, below vanish.

    The last layer is the classifier, whose gradient says nothing of depth; with two layers it has to do.
    """
    values = list(norms.values())
    if not values:
        return float("nan")
    last = values[-2] if len(values) > 2 else values[-1]
    return values[0] / last if last else float("inf")


def _is_trained(module: nn.Module) -> bool:
    """Whether it is a dense layer or a convolution whose weight is trained."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim >= 2 and weight.requires_grad
