"""The fast gradient attack: one gradient, one jump to the far side of the set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certify.attacks.base import LOSSES, Attack, Objective
from certify.registry import lookup, register_attack
from certify.sets import PerturbationSet
from certify.specs import Spec


@register_attack("fgsm")
@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """Return argmax <gradient, x> over the set: centre + radius sign(gradient) for linf, any set alike.

    ``loss`` is "ce" or "margin". Reference: Goodfellow, Shlens, Szegedy (2015), equation 1 (there for linf).
    """

    loss: str = "ce"

    def __post_init__(self) -> None:
        lookup("loss", LOSSES, self.loss)

    def search(
        self,
        objective: Objective,
        domain: PerturbationSet,
        spec: Spec,
        generator: torch.Generator | None,
    ) -> Float[Tensor, "batch *shape"]:
        return domain.steepest(objective.gradient(domain.center, spec, LOSSES[self.loss])[1])
