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
from certify.registry import ACTIVATIONS, register_attack
from certify.sets import PerturbationSet
from certify.specs import Spec

#: Replaces an activation's slope: from the module, its input and its output to an output of the same value.
Slope = Callable[[nn.Module, Tensor, Tensor], Tensor]


@register_attack("adaptive")
@dataclass(frozen=True, kw_only=True)
class Adaptive(Attack):
    """Return the worst point that ``attack`` finds with the network's own gradients and with replaced ones, in turn.

    ``temperatures`` are half lengths of secants, in standard deviations of the activation's inputs; ``stand_in`` is the
    function whose slope is used instead, or None; ``neighbours`` is the number of random neighbours, within
    ``spread`` radii, whose gradients are averaged (0: none). Every point is judged by the exact network.
    Reference: Athalye, Carlini, Wagner, "Obfuscated gradients ..." (2018), section 4; Tramer et al., "On adaptive
    attacks to adversarial example defenses" (2020), section 5, for neighbours.
    """

    attack: Attack = field(default_factory=PGD)
    temperatures: tuple[float, ...] = (0.3, 1.0)
    stand_in: Callable[[Tensor], Tensor] | None = F.silu
    neighbours: int = 10
    spread: float = 0.5

    def __post_init__(self) -> None:
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
            slopes.append(partial(_swapped, self.stand_in))
        self._try(objective, objective, domain, spec, draws, worst)
        for slope in slopes:
            with sloped(model, slope):
                self._try(objective, objective, domain, spec, draws, worst)
        if self.neighbours:
            reach = self.spread * float(domain.hull.width.mean()) / 2
            blurred = Objective(_Blurred(model, self.neighbours, reach))
            self._try(blurred, objective, domain, spec, draws, worst)
            objective.queries += blurred.queries * (1 + self.neighbours)
        return worst.points

    def _try(
        self, seen: Objective, judge: Objective, domain: PerturbationSet, spec: Spec, draws: Draws, worst: Worst
    ) -> None:
        """Attack the samples that are whole with the gradients as ``seen``."""
        alive = worst.whole
        if len(alive):
            part, claim = domain.take(alive), spec.take(alive)
            found = part.project(self.attack.search(seen, part, claim, draws.take(alive)))
            worst.meet(found, judge.rows(found, claim).amin(1), alive)


@contextmanager
def sloped(model: nn.Module, slope: Slope) -> Iterator[None]:
    """Let every activation module keep its values and take its gradient from ``slope``."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        z = inputs[0]
        return slope(module, z, output) if z.requires_grad else output

    known = tuple(kind for kind in ACTIVATIONS if isinstance(kind, type))
    handles = [module.register_forward_hook(hook) for module in model.modules() if type(module) in known]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _secant(temperature: float, module: nn.Module, z: Tensor, output: Tensor) -> Tensor:
    """The output with the slope of the chord over z +- temperature standard deviations of the sample's inputs."""
    with torch.no_grad():
        spread = z.flatten(1).std(1, correction=0).view(-1, *[1] * (z.ndim - 1))
        reach = temperature * spread + torch.finfo(z.dtype).eps
        slope = (module.forward(z + reach) - module.forward(z - reach)) / (2 * reach)
    return output.detach() + slope * (z - z.detach())


def _swapped(stand_in: Callable[[Tensor], Tensor], _: nn.Module, z: Tensor, output: Tensor) -> Tensor:
    """The output with the slope of another function."""
    y = stand_in(z)
    return output.detach() + (y - y.detach())


class _Blurred(nn.Module):
    """The network's own outputs, with the mean gradient over neighbours of the input."""

    def __init__(self, model: nn.Module, neighbours: int, reach: float) -> None:
        super().__init__()
        self.model, self.neighbours, self.reach = model, neighbours, reach
        self.draws = Draws(torch.zeros(1, dtype=torch.long), neighbours)

    def forward(self, x: Float[Tensor, "batch *shape"]) -> Tensor:
        y = self.model(x)
        if not x.requires_grad:
            return y
        # The same noise for every sample: what one sample sees does not depend on who else is in the batch.
        noise = (2 * self.draws.uniform(*x.shape[1:]) - 1).to(x.dtype).to(x.device) * self.reach
        mean = torch.stack([self.model(x + shift) for shift in noise]).mean(0)
        return y.detach() + (mean - mean.detach())
