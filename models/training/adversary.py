"""Points of a ball at which a loss is higher: what adversarial training trains on. Quick, and inside up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from certify.attacks.annealing import annealed
from certify.attacks.base import evaluating
from certify.shapes import beside
from models.training.recipe import CLIP, Threat

#: A loss to be raised, from logits.
Loss = Callable[[Float[Tensor, "batch classes"]], Float[Tensor, ""]]


def climb(
    model: nn.Module,
    x: Float[Tensor, "batch *shape"],
    start: Float[Tensor, "batch *shape"],
    threat: Threat,
    loss: Loss,
    *,
    lengths: Sequence[float],
) -> Float[Tensor, "batch *shape"]:
    """Return where ascents of those ``lengths`` from ``start`` lead, each pulled back to ball and data range.

    Parameters keep their gradients. Reference: Madry et al. (2018), section 2.1.
    """
    point = start
    for length in lengths:
        point = pull_back(point.detach() + stride(input_gradient(model, point, loss), threat, length), x, threat)
    return point.detach()


def shrinking(threat: Threat, steps: int) -> list[float]:
    """Return the lengths of the PGD attack: one radius at first and then ever less, along a cosine.

    Networks can overfit to steps of one length: a small MNIST CNN of KAFs (tests/benchmarks/mnist.py fast-kaf) kept
    87 % of 500 validation images under the attack after training on 7 steps of 2.5 / 7 radii, 92 % on 7 of these.
    """
    return [threat.radius * annealed(k, steps) for k in range(steps)]


def input_gradient(model: nn.Module, point: Float[Tensor, "batch *shape"], loss: Loss) -> Float[Tensor, "batch *shape"]:
    """Return the gradient of the loss in the inputs alone."""
    point = point.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(point)), point)
    return gradient


def stride(gradient: Float[Tensor, "batch *shape"], threat: Threat, length: float) -> Float[Tensor, "batch *shape"]:
    """Return the step of that length in the threat's norm along which a linear loss rises most."""
    if threat.norm == "linf":
        return length * gradient.sign()
    if threat.norm == "l2":
        return length * gradient / _norm(gradient)
    flat = gradient.flatten(1)
    steepest = torch.zeros_like(flat).scatter(1, flat.abs().argmax(1, keepdim=True), 1.0)
    return (length * steepest * flat.sign()).view_as(gradient)


def pull_back(
    point: Float[Tensor, "batch *shape"], x: Float[Tensor, "batch *shape"], threat: Threat
) -> Float[Tensor, "batch *shape"]:
    """Return points of the ball around ``x`` and of the data range."""
    if threat.norm == "linf":
        return (x + (point - x).clamp(-threat.radius, threat.radius)).clamp(*CLIP)
    if threat.norm == "l2":
        return (x + (point - x) * (threat.radius / _norm(point - x)).clamp(max=1)).clamp(*CLIP)
    return threat.ball(x).project(point)


@contextmanager
def attacked(model: nn.Module, statistics: str) -> Iterator[None]:
    """Let batch normalisation see attacked images with the "batch"'s statistics, or its "running" ones in eval mode.

    Neither touches the running statistics: they are those of the images trained on. Modes come back afterwards.
    """
    if statistics == "running":
        with evaluating(model):
            yield
        return
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True


def _norm(x: Tensor) -> Tensor:
    return beside(x.flatten(1).norm(dim=1).clamp(min=1e-12), x)
