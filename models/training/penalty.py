"""Penalties that a config adds to a recipe's loss."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from certify import penalties as norms
from models.penalties import curvature_penalty, slope_penalty
from models.training.adversary import attacked, pull_back
from models.training.config import Penalties
from models.training.recipe import Batch, Threat


def penalty(batch: Batch, weights: Penalties, threat: Threat | None) -> Float[Tensor, ""] | None:
    """Return the weighted sum of the penalties that ``weights`` asks for; None if it asks for none."""
    found = []
    if weights.lipschitz:
        found.append(weights.lipschitz * norms.norm_penalty(batch.model, tuple(batch.x.shape[1:])))
    if weights.slope:
        found.append(weights.slope * slope_penalty(batch.model))
    if weights.curvature:
        found.append(weights.curvature * curvature_penalty(batch.model))
    if weights.gradalign and threat is not None:
        found.append(weights.gradalign * _misalignment(batch, threat))
    return torch.stack([value.double() for value in found]).sum() if found else None


def _misalignment(batch: Batch, threat: Threat) -> Tensor:
    """1 - cos of the loss's gradients at the images and at random points of their balls, averaged."""
    nearby = pull_back(batch.x + threat.radius * batch.uniform(), batch.x, threat)
    with attacked(batch.model, "batch"):
        here, there = (_gradient(batch, point) for point in (batch.x, nearby))
    return 1 - F.cosine_similarity(here.flatten(1), there.flatten(1), dim=1, eps=1e-12).mean()


def _gradient(batch: Batch, point: Tensor) -> Tensor:
    """The gradient in the images, itself differentiable in the weights."""
    point = point.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(batch.loss(batch.model(point)), point, create_graph=True)
    return gradient
