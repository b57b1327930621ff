"""Recipes that train on images as they are, or attacked: standard, fast, n-fgsm, free, pgd and trades."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from certify.errors import InvalidInput
from models.training.adversary import attacked, climb, input_gradient, pull_back, shrinking, stride
from models.training.fields import between, known
from models.training.recipe import CLIP, Batch, Outcome, Recipe, Threat, register_recipe


@register_recipe("standard")
@dataclass(frozen=True, kw_only=True)
class Standard(Recipe):
    """Cross-entropy on the images."""

    def __call__(self, batch: Batch) -> Outcome:
        logits = batch.model(batch.x)
        return Outcome(batch.loss(logits), logits)


@dataclass(frozen=True, kw_only=True)
class Adversarial(Recipe):
    """Cross-entropy on attacked images; what attacks them is the subclass's.

    ``statistics`` is what batch normalisation uses while it is attacked: "batch" (train mode) or "running".
    """

    radius: float
    norm: str = "linf"
    statistics: str = "batch"

    def __post_init__(self) -> None:
        Threat(self.radius, self.norm)
        known("statistics", self.statistics, ("batch", "running"))

    @property
    def threat(self) -> Threat:
        return Threat(self.radius, self.norm)

    @abstractmethod
    def attack(self, batch: Batch) -> Float[Tensor, "batch *shape"]:
        """Return the images to train on."""

    def __call__(self, batch: Batch) -> Outcome:
        with attacked(batch.model, self.statistics):
            points = self.attack(batch)
        logits = batch.model(points)
        return Outcome(batch.loss(logits), logits)


@register_recipe("fast")
@dataclass(frozen=True, kw_only=True)
class Fast(Adversarial):
    """One gradient step of ``step`` radii from a random point of the ball, back into it.

    Reference: Wong, Rice, Kolter, "Fast is better than free" (2020), algorithm 3.
    """

    one_step: ClassVar[bool] = True

    step: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        between("step", self.step, 0, math.inf)

    def attack(self, batch: Batch) -> Float[Tensor, "batch *shape"]:
        start = pull_back(batch.x + self.radius * batch.uniform(), batch.x, self.threat)
        return climb(batch.model, batch.x, start, self.threat, batch.loss, lengths=[self.step * self.radius])


@register_recipe("n-fgsm")
@dataclass(frozen=True, kw_only=True)
class NoisyFGSM(Adversarial):
    """One gradient step of ``step`` radii from a point ``noise`` radii around, without a way back into the ball.

    Reference: de Jorge et al., "Make some noise: reliable and efficient single-step adversarial training" (2022):
    it does not overfit to its own attack. For linf.
    """

    one_step: ClassVar[bool] = True

    noise: float = 2.0
    step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        between("noise", self.noise, 0, math.inf)
        between("step", self.step, 0, math.inf)

    def attack(self, batch: Batch) -> Float[Tensor, "batch *shape"]:
        if self.norm != "linf":
            raise InvalidInput(f"n-fgsm in {self.norm}", "linf", "method pgd for other norms")
        start = (batch.x + self.noise * self.radius * batch.uniform()).clamp(*CLIP)
        gradient = input_gradient(batch.model, start, batch.loss)
        return (start + stride(gradient, self.threat, self.step * self.radius)).clamp(*CLIP)


@dataclass(frozen=True, kw_only=True)
class Climbing(Adversarial):
    """Training on points that several gradient steps reach.

    There are ``steps`` of length ``step`` in the units of the images; where open, ``shrinking`` ones.
    """

    statistics: str = "running"
    steps: int = 7
    step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        between("steps", self.steps, 1, 10_000)
        if self.step is not None:
            between("step", self.step, 0, math.inf)

    @property
    def lengths(self) -> list[float]:
        """The steps' lengths."""
        return shrinking(self.threat, self.steps) if self.step is None else [self.step] * self.steps


@register_recipe("pgd")
@dataclass(frozen=True, kw_only=True)
class PGDTraining(Climbing):
    """PGD on the cross-entropy, from a random point of the ball.

    Reference: Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018).
    """

    def attack(self, batch: Batch) -> Float[Tensor, "batch *shape"]:
        start = pull_back(batch.x + self.radius * batch.uniform(), batch.x, self.threat)
        return climb(batch.model, batch.x, start, self.threat, batch.loss, lengths=self.lengths)


@register_recipe("free")
@dataclass(frozen=True, kw_only=True)
class Free(Adversarial):
    """Every batch ``replays`` times; the gradient in the images, a by-product of training, moves the perturbation.

    The perturbation outlives its batch, as published, and starts at zero in every epoch. Reference: Shafahi et al.,
    "Adversarial training for free!" (2019), algorithm 1. An epoch costs as many standard ones as there are replays.
    """

    one_step: ClassVar[bool] = True

    replays: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        between("replays", self.replays, 1, 10_000)

    @property
    def repeats(self) -> int:
        return self.replays

    def attack(self, batch: Batch) -> Float[Tensor, "batch *shape"]:
        x, last = batch.x, batch.memory.get("point")
        shift = torch.zeros_like(x)
        if last is not None:
            kept, n = batch.memory["shift"], min(len(last), len(x))
            assert last.grad is not None
            moved = kept + stride(last.grad, self.threat, self.radius)
            shift[:n] = (pull_back(x[:n] + moved[:n], x[:n], self.threat) - x[:n]).detach()
        batch.memory["shift"] = shift
        batch.memory["point"] = (x + shift).detach().requires_grad_()
        return batch.memory["point"]


@register_recipe("trades")
@dataclass(frozen=True, kw_only=True)
class Trades(Climbing):
    """Cross-entropy on the images + beta KL(p(x) || p(x')), x' where PGD made that divergence largest.

    Reference: Zhang et al., "Theoretically principled trade-off between robustness and accuracy" (2019), equation 5.
    """

    beta: float = 6.0
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        between("beta", self.beta, 0, 1e6)

    def attack(self, batch: Batch) -> Float[Tensor, "batch *shape"]:
        with torch.no_grad():
            clean = batch.model(batch.x).log_softmax(1)
        start = (batch.x + 1e-3 * batch.uniform()).clamp(*CLIP)
        return climb(batch.model, batch.x, start, self.threat, lambda y: _divergence(clean, y), lengths=self.lengths)

    def __call__(self, batch: Batch) -> Outcome:
        with attacked(batch.model, self.statistics):
            points = self.attack(batch)
        logits, moved = batch.model(batch.x), batch.model(points)
        return Outcome(batch.loss(logits) + self.beta * _divergence(logits.log_softmax(1), moved), moved)


def _divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """The mean KL divergence of the softmax of ``logits`` from clean log-probabilities."""
    return F.kl_div(logits.log_softmax(1), clean, reduction="batchmean", log_target=True)
