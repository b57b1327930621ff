"""An ensemble of attacks, each on the samples that those before it left whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certify.attacks.apgd import APGD, APGDT
from certify.attacks.base import Attack, Objective
from certify.attacks.fmn import FMN
from certify.attacks.square import Square
from certify.attacks.worst import Worst
from certify.draws import Draws
from certify.errors import InvalidInput
from certify.registry import register_attack
from certify.sets import LpBall, PerturbationSet
from certify.specs import Spec


@register_attack("ensemble")
@dataclass(frozen=True, kw_only=True)
class Ensemble(Attack):
    """Return the worst point that any of the ``attacks`` finds, in turn, per sample.

    By default those of AutoAttack in its order: APGD on cross-entropy, APGD towards nine targets, a minimum-norm attack
    (FMN, where AutoAttack takes FAB; left out where the set is no ball) and Square.
    Reference: Croce, Hein, "Reliable evaluation of adversarial robustness ..." (2020), section 5.
    """

    attacks: tuple[Attack, ...] = (APGD(), APGDT(), FMN(), Square())

    def __post_init__(self) -> None:
        if not self.attacks:
            raise InvalidInput("an ensemble of no attacks", "at least one", "Ensemble()")

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        worst = Worst(domain)
        everyone = torch.arange(domain.batch, device=domain.center.device)
        worst.meet(domain.center, objective.rows(domain.center, spec).amin(1), everyone)
        for key, attack in enumerate(self.attacks):
            alive = worst.whole
            if len(alive) == 0:
                break
            if isinstance(attack, FMN) and not isinstance(domain, LpBall):
                continue
            part, claim = domain.take(alive), spec.take(alive)
            streams = draws.split(key) if key else draws  # the first one's are those that it has alone
            found = part.project(attack.search(objective, part, claim, streams.take(alive)))
            worst.meet(found, objective.rows(found, claim).amin(1), alive)
        return worst.points
