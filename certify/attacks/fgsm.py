"""The fast gradient attacks: one gradient, one jump."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from certify.attacks.base import Attack, Objective
from certify.attacks.losses import LOSSES
from certify.draws import Draws
from certify.registry import lookup, register_attack
from certify.sets import PerturbationSet
from certify.specs import Spec


@register_attack("fgsm")
@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """Return argmax <gradient, x> over the set: centre + radius sign(gradient) for linf, any set alike.

    ``loss`` is "ce", "margin" or "dlr". Reference: Goodfellow, Shlens, Szegedy (2015), equation 1 (there for linf).
    """

    loss: str = "ce"

    def __post_init__(self) -> None:
        lookup("loss", LOSSES, self.loss)

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        return domain.steepest(objective.gradient(domain.center, spec, LOSSES[self.loss])[1])


@register_attack("r-fgsm")
@dataclass(frozen=True, kw_only=True)
class RFGSM(Attack):
    """Return a random point of the set, moved by ``reach`` radii along one gradient and pulled back.

    Reference: Wong, Rice, Kolter, "Fast is better than free" (2020), algorithm 3: reach 1.25.
    """

    loss: str = "ce"
    reach: float = 1.25

    def __post_init__(self) -> None:
        lookup("loss", LOSSES, self.loss)

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        start = domain.sample(1, draws)[0]
        gradient = objective.gradient(start, spec, LOSSES[self.loss])[1]
        return domain.project(start + self.reach * domain.stride(gradient, None))
