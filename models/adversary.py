"""What a step of adversarial training trains on, and accuracy with and without an attack."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from certify.attacks import PGD
from certify.sets import LpBall
from certify.specs import class_margins
from models.recipe import Recipe

#: Images live here; every adversarial image does too.
CLIP = (0.0, 1.0)


def training_inputs(
    model: nn.Module,
    x: Float[Tensor, "batch *shape"],
    y: Int[Tensor, "batch"],
    recipe: Recipe,
    *,
    classes: int,
    generator: torch.Generator,
) -> Float[Tensor, "batch *shape"]:
    """Return what ``recipe.method`` trains on: x itself, or points of its ball with a higher loss."""
    if recipe.method == "standard":
        return x
    if recipe.method == "fast":
        return _fast(model, x, y, recipe, generator)
    attack = PGD(steps=recipe.steps, step=recipe.step_size, loss="ce", early_stop=False)
    ball = LpBall(x, recipe.radius, recipe.p, CLIP)
    return attack(model, ball, class_margins(y, classes, x.dtype), generator=generator).witness


def accuracy(model: nn.Module, x: Float[Tensor, "n *shape"], y: Int[Tensor, "n"], *, batch: int = 1000) -> float:
    """Return the share of samples whose largest logit is the true label's, in the model's current mode."""
    with torch.no_grad():
        hits = [
            (model(part).argmax(1) == labels).sum() for part, labels in zip(x.split(batch), y.split(batch), strict=True)
        ]
    return int(torch.stack(hits).sum()) / len(x)


def robust_accuracy(
    model: nn.Module, x: Float[Tensor, "n *shape"], y: Int[Tensor, "n"], recipe: Recipe, *, classes: int
) -> float:
    """Return the share of samples that are right and survive ten steps of PGD at the recipe's radius.

    The attack starts at the image and draws nothing, so the number depends on the weights alone.
    """
    attack = PGD(steps=10, random_start=False)
    ball = LpBall(x, recipe.radius, recipe.p, CLIP)
    result = attack(model, ball, class_margins(y, classes, x.dtype))
    return float((result.margin.amin(1) > 0).double().mean())


def _fast(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """One gradient step of 1.25 radius from a random point of the ball, back into ball and data range.

    The model stays in train mode: batch statistics are those of training. Reference: Wong, Rice, Kolter,
    "Fast is better than free" (2020), algorithm 3.
    """
    # Drawn on the generator's device, so that a seed gives the same points everywhere.
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) * 2 - 1
    start = (x + _into_ball(recipe.radius * noise, recipe)).clamp(*CLIP).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    direction = gradient.sign() if recipe.norm == "linf" else gradient * _norm(gradient).reciprocal()
    moved = start.detach() + 1.25 * recipe.radius * direction - x
    return (x + _into_ball(moved, recipe)).clamp(*CLIP)


def _into_ball(delta: Tensor, recipe: Recipe) -> Tensor:
    """Pull perturbations back to the linf or l2 ball, up to rounding: training needs no proof."""
    if recipe.norm == "linf":
        return delta.clamp(-recipe.radius, recipe.radius)
    return delta * (recipe.radius / _norm(delta)).clamp(max=1)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.ndim - 1))
