"""Recipes that train on certified bounds: ibp, crown-ibp, sabr and mtl-ibp."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from certify.sets import LpBall
from certify.specs import class_margins
from certify.training import training_margins
from models.training.adversary import attacked, climb, pull_back, shrinking
from models.training.fields import between
from models.training.recipe import Batch, Outcome, Recipe, Threat, register_recipe


@dataclass(frozen=True, kw_only=True)
class Certified(Recipe):
    """What recipes on bounds share: the radius grows from 0 over ``ramp`` of the run, after ``warmup`` of it."""

    certified: ClassVar[bool] = True

    radius: float
    norm: str = "linf"
    warmup: float = 0.05
    ramp: float = 0.5

    def __post_init__(self) -> None:
        Threat(self.radius, self.norm)
        between("warmup", self.warmup, 0, 1)
        between("ramp", self.ramp, 0, 1)

    @property
    def threat(self) -> Threat:
        return Threat(self.radius, self.norm)

    @abstractmethod
    def outcome(self, batch: Batch) -> Outcome:
        """Return the loss of a batch, after the forward pass whose statistics its bounds use."""

    def __call__(self, batch: Batch) -> Outcome:
        with batch_statistics(batch.model):
            return self.outcome(batch)

    def grown(self, done: float) -> float:
        """Return the share of the radius at that share of the run."""
        past = done - self.warmup
        return 0.0 if past <= 0 else min(1.0, past / self.ramp if self.ramp else 1.0)


@register_recipe("ibp")
@dataclass(frozen=True, kw_only=True)
class IBPTraining(Certified):
    """kappa CE(image) + (1 - kappa) CE(worst logits by interval bounds); kappa falls from 1 as the radius grows.

    Reference: Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust
    models" (2018), equation 12.
    """

    kappa: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        between("kappa", self.kappa, 0, 1)

    def outcome(self, batch: Batch) -> Outcome:
        logits, share = batch.model(batch.x), self.grown(batch.done)
        plain, kappa = batch.loss(logits), 1 - (1 - self.kappa) * share
        if share == 0:
            return Outcome(plain, logits)
        worst = worst_loss(batch, self.threat.ball(batch.x, share), "ibp")
        return Outcome(kappa * plain + (1 - kappa) * worst, logits)


@register_recipe("crown-ibp")
@dataclass(frozen=True, kw_only=True)
class CrownIBPTraining(Certified):
    """As ibp, with bounds beta CROWN-IBP + (1 - beta) IBP; beta falls from 1 to ``beta`` as the radius grows.

    Reference: Zhang et al., "Towards stable and efficient training of verifiably robust neural networks" (2020),
    equation 12.
    """

    kappa: float = 0.5
    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        between("kappa", self.kappa, 0, 1)
        between("beta", self.beta, 0, 1)

    def outcome(self, batch: Batch) -> Outcome:
        logits, share = batch.model(batch.x), self.grown(batch.done)
        plain, kappa = batch.loss(logits), 1 - (1 - self.kappa) * share
        if share == 0:
            return Outcome(plain, logits)
        beta, ball = 1 - (1 - self.beta) * share, self.threat.ball(batch.x, share)
        margins = (1 - beta) * margins_of(batch, ball, "ibp")
        if beta > 0:
            margins = margins + beta * margins_of(batch, ball, "crown-ibp")
        return Outcome(kappa * plain + (1 - kappa) * _cross_entropy(margins), logits)


@register_recipe("sabr")
@dataclass(frozen=True, kw_only=True)
class Sabr(Certified):
    """CE of worst logits by interval bounds on a small ball, ``share`` of the radius, around an attacked image.

    The attack searches where the small ball still lies in the whole one. Reference: Mueller, Eckert, Fischer, Vechev,
    "Certified training: small boxes are all you need" (2023), section 3.
    """

    share: float = 0.4
    steps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        between("share", self.share, 0, 1)
        between("steps", self.steps, 1, 10_000)

    def outcome(self, batch: Batch) -> Outcome:
        logits, grown = batch.model(batch.x), self.grown(batch.done)
        if grown == 0:
            return Outcome(batch.loss(logits), logits)
        inner = Threat(grown * self.radius * max(1 - self.share, 1e-6), self.norm)
        centres = _attacked(batch, inner, self.steps)
        return Outcome(worst_loss(batch, self.threat.ball(centres, grown * self.share), "ibp"), logits)


@register_recipe("mtl-ibp")
@dataclass(frozen=True, kw_only=True)
class MtlIBP(Certified):
    """(1 - alpha) CE(attacked image) + alpha CE(worst logits by interval bounds).

    Reference: De Palma et al., "Expressive losses for verified robustness via convex combinations" (2024), equation 7.
    """

    alpha: float = 0.1
    steps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        between("alpha", self.alpha, 0, 1)
        between("steps", self.steps, 1, 10_000)

    def outcome(self, batch: Batch) -> Outcome:
        share = self.grown(batch.done)
        points = _attacked(batch, Threat(max(share, 1e-6) * self.radius, self.norm), self.steps)
        logits = batch.model(points)
        plain = batch.loss(logits)
        if share == 0:
            return Outcome(plain, logits)
        worst = worst_loss(batch, self.threat.ball(batch.x, share), "ibp")
        return Outcome((1 - self.alpha) * plain + self.alpha * worst, logits)


def worst_loss(batch: Batch, ball: LpBall, method: str) -> Float[Tensor, ""]:
    """Return the mean cross-entropy >= that of every image in the balls (in real arithmetic)."""
    return _cross_entropy(margins_of(batch, ball, method))


def margins_of(batch: Batch, ball: LpBall, method: str) -> Float[Tensor, "batch rows"]:
    """Return certified margins; batch normalisation has the batch's statistics, dropout is off, autocast too."""
    spec = class_margins(batch.y, batch.classes, batch.x.dtype)
    with settled(batch.model), torch.autocast(batch.x.device.type, enabled=False):
        return training_margins(batch.model, ball, spec, method)


MOVING = ("running_mean", "running_var")


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let running statistics be the last batch's for a while: bounds, which take them, then see what training sees.

    Afterwards they are the moving averages of before, moved by that batch as usual.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    kept = [({name: getattr(module, name).clone() for name in MOVING}, module.momentum) for module in norms]
    for module in norms:
        module.momentum = 1.0
    try:
        yield
    finally:
        for module, (before, momentum) in zip(norms, kept, strict=True):
            share = 1 / max(1, int(module.num_batches_tracked or 1)) if momentum is None else momentum
            for name, value in before.items():  # new tensors: the loss may still need the batch's for its gradients
                setattr(module, name, value.lerp(getattr(module, name), share))
            module.momentum = momentum


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Put batch normalisation and dropout in eval mode, and back."""
    found = [m for m in model.modules() if m.training and isinstance(m, (_BatchNorm, _DropoutNd))]
    for module in found:
        module.training = False
    try:
        yield
    finally:
        for module in found:
            module.training = True


def _cross_entropy(margins: Tensor) -> Tensor:
    """Cross-entropy of logits 0 (the true class) and -margins."""
    return torch.logsumexp(torch.cat([margins.new_zeros((len(margins), 1)), -margins], 1), 1).mean()


def _attacked(batch: Batch, threat: Threat, steps: int) -> Tensor:
    """Where PGD leads within a smaller ball, with running statistics."""
    with attacked(batch.model, "running"):
        start = pull_back(batch.x + threat.radius * batch.uniform(), batch.x, threat)
        return climb(batch.model, batch.x, start, threat, batch.loss, lengths=shrinking(threat, steps))
