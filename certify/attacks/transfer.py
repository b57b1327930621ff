"""Transfer: points that break another network are tried on this one (a grey box)."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from certify.attacks.base import Attack, Objective, evaluating
from certify.attacks.pgd import PGD
from certify.draws import Draws
from certify.sets import PerturbationSet
from certify.specs import Spec


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """Return what ``attack`` finds on the ``surrogate``, a network with the same inputs and outputs.

    The attacked network is asked only when the points are judged; passes of the surrogate are not counted as queries.
    Reference: Papernot et al., "Practical black-box attacks against machine learning" (2017).
    """

    surrogate: nn.Module
    attack: Attack = field(default_factory=lambda: PGD(early_stop=False))

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        with evaluating(self.surrogate):
            return self.attack.search(Objective(self.surrogate), domain, spec, draws)
