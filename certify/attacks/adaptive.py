"""Adaptive attacks on activations whose gradients mislead: the network is exact, only its slopes are replaced.

Trainable and discontinuous activations can be steep, flat or jagged where an attack looks, and so hide the direction in
which the function really rises. Three other slopes are tried: secants over a wider stretch, those of a smooth stand-in
(backward pass differentiable approximation), and the mean over neighbouring inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from certify.attacks.base import Attack, Objective
from certify.attacks.pgd import PGD
from certify.attacks.worst import Worst
from certify.draws import Draws
from certify.errors import InvalidInput
from certify.registry import ACTIVATIONS, lookup, register_attack
from certify.sets import PerturbationSet
from certify.shapes import beside
from certify.specs import Spec

#: Smooth functions whose slopes may stand in for an activation's.
STAND_INS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "softplus": F.softplus, "tanh": torch.tanh}
#: Replaces an activation's slope: from the module, its input and its output to an output of the same value.
Slope = Callable[[nn.Module, Tensor, Tensor], Tensor]


@register_attack("adaptive")
@dataclass(frozen=True, kw_only=True)
class Adaptive(Attack):
    """Return the worst point that ``attack`` finds with the network's own gradients and with replaced ones, in turn.

    ``temperatures`` are half lengths of secants, in standard deviations of the activation's inputs; ``stand_in`` is the
    function whose slope is used instead ("silu", "softplus", "tanh"), or None; ``neighbours`` is the number of random
    neighbours, each feature moved by ``spread`` half widths of the set's bounding box at most, whose gradients are
    averaged (0: none). Slopes are replaced in activation modules with bound rules, not in functional calls; every
    point is judged by the exact network.
    Reference: Athalye, Carlini, Wagner, "Obfuscated gradients ..." (2018), section 4; Tramer et al., "On adaptive
    attacks to adversarial example defenses" (2020), section 5, for neighbours.
    """

    attack: Attack = field(default_factory=PGD)
    temperatures: tuple[float, ...] = (0.3, 1.0)
    stand_in: str | None = "silu"
    neighbours: int = 10
    spread: float = 0.5

    def __post_init__(self) -> None:
        if self.stand_in is not None:
            lookup("stand-in", STAND_INS, self.stand_in)
        if not all(t > 0 for t in self.temperatures) or self.neighbours < 0 or not self.spread > 0:
            raise InvalidInput(
                f"temperatures={self.temperatures}, neighbours={self.neighbours}, spread={self.spread}",
                "temperatures and spread > 0, neighbours >= 0",
                "Adaptive()",
            )

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        worst = Worst(domain)
        model = objective.model
        slopes: list[Slope] = [partial(_secant, temperature) for temperature in self.temperatures]
        if self.stand_in is not None:
            slopes.append(partial(_swapped, STAND_INS[self.stand_in]))
        self._try(objective, domain, spec, draws, worst)
        for slope in slopes:
            with sloped(model, slope) as modules:
                if modules:
                    self._try(objective, domain, spec, draws, worst)
        if self.neighbours:
            self._try_neighbours(objective, domain, spec, draws, worst)
        return worst.points

    def _try_neighbours(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws, worst: Worst
    ) -> None:
        """Attack with the mean gradient over neighbours: the same shifts for every sample, in its own half widths."""
        alive = worst.whole
        if len(alive) == 0:
            return
        part, claim, streams = domain.take(alive), spec.take(alive), draws.take(alive)
        shifts = 2 * Draws(torch.zeros(1, dtype=torch.long), 1).uniform(self.neighbours, *domain.shape)[0] - 1
        half = _rounded((part.hull.width / 2).flatten(1).amax(1))
        for reach in half.unique():  # samples of one reach are attacked together
            here = (half == reach).nonzero()[:, 0]
            noise = (self.spread * reach * shifts.to(reach.device)).to(domain.center.dtype)
            blurred = Objective(_Blurred(objective.model, noise))
            found = part.take(here).project(
                self.attack.search(blurred, part.take(here), claim.take(here), streams.take(here))
            )
            worst.meet(found, objective.rows(found, claim.take(here)).amin(1), alive[here])
            objective.queries += blurred.queries * (1 + self.neighbours)

    def _try(self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws, worst: Worst) -> None:
        """Attack the samples that are whole with the gradients as they are now."""
        alive = worst.whole
        if len(alive):
            part, claim = domain.take(alive), spec.take(alive)
            found = part.project(self.attack.search(objective, part, claim, draws.take(alive)))
            worst.meet(found, objective.rows(found, claim).amin(1), alive)


def _rounded(x: Tensor) -> Tensor:
    """To 16 binary digits: widths that differ by rounding alone are the same."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)


@contextmanager
def sloped(model: nn.Module, slope: Slope) -> Iterator[int]:
    """Let every activation module keep its values and take its gradient from ``slope``; yields how many there are."""
    inputs: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs[module] = given[0]
        return (given[0].clone(), *given[1:])  # an activation may work in place

    def after(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
        z = inputs.pop(module)
        return slope(module, z, output) if z.requires_grad else output

    kinds = tuple(kind for kind in ACTIVATIONS if isinstance(kind, type))
    known = [module for module in model.modules() if type(module) in kinds]
    handles = [module.register_forward_pre_hook(before) for module in known]
    handles += [module.register_forward_hook(after) for module in known]
    try:
        yield len(known)
    finally:
        for handle in handles:
            handle.remove()


def _secant(temperature: float, module: nn.Module, z: Tensor, output: Tensor) -> Tensor:
    """The output with the slope of the chord over z +- temperature standard deviations of the sample's inputs."""
    with torch.no_grad():
        spread = beside(z.flatten(1).std(1, correction=0), z)
        reach = temperature * spread + torch.finfo(z.dtype).eps
        slope = (module.forward(z + reach) - module.forward(z - reach)) / (2 * reach)
    return output.detach() + slope * (z - z.detach())


def _swapped(stand_in: Callable[[Tensor], Tensor], _: nn.Module, z: Tensor, output: Tensor) -> Tensor:
    """The output with the slope of another function."""
    y = stand_in(z)
    return output.detach() + (y - y.detach())


class _Blurred(nn.Module):
    """The network's own outputs, with the mean gradient over the input moved by each of ``noise``."""

    def __init__(self, model: nn.Module, noise: Float[Tensor, "neighbours *shape"]) -> None:
        super().__init__()
        self.model, self.noise = model, noise

    def forward(self, x: Float[Tensor, "batch *shape"]) -> Tensor:
        y = self.model(x)
        if not x.requires_grad:
            return y
        mean = torch.stack([self.model(x + shift) for shift in self.noise]).mean(0)
        return y.detach() + (mean - mean.detach())
