"""Square attack: a black box's random search that changes one square of pixels at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certify.attacks.base import Attack, Objective
from certify.draws import Draws
from certify.errors import InvalidInput
from certify.registry import register_attack
from certify.sets import PerturbationSet
from certify.shapes import beside
from certify.specs import Spec

#: Of 10,000 queries, those after which the squares' area halves once more.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: Queries whose random numbers are drawn at once.
BLOCK = 100


@register_attack("square")
@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Return the worst point of ``queries`` random proposals per sample; no gradient is used.

    Each proposal sets a square (a run of features, where inputs are no images) to one end of the set per channel, and
    stays where it lowers the smallest row. ``area`` is the first squares' share of the image; it shrinks on schedule.
    Where the set is no box (l1, l2), the same proposals are projected into it, which is not the paper's l2 variant.
    Reference: Andriushchenko et al., "Square attack" (2020), algorithms 1 and 2 (linf).
    """

    queries: int = 5000
    area: float = 0.8

    def __post_init__(self) -> None:
        if self.queries < 1 or not 0 < self.area <= 1:
            raise InvalidInput(f"queries={self.queries}, area={self.area}", "queries >= 1, area in (0, 1]", "Square()")

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        found = domain.center.clone()
        canvas = _canvas(domain.shape)
        search = _Search(domain, spec, canvas, draws)
        search.accept(search.stripes(), objective, always=True)
        for start in range(0, self.queries - 1, BLOCK):
            if not search.keep_whole(found):
                return found
            count = min(BLOCK, self.queries - 1 - start)
            numbers = search.draws.uniform(count, 2 + canvas[0]).to(found.device)
            for k in range(count):
                side = _side(self.area, (start + k) / self.queries, canvas)
                search.accept(search.squares(numbers[:, k], side), objective)
        search.keep_whole(found, last=True)
        return found


class _Search:
    """The samples that are still whole: their sets, the best points and how low their rows are there."""

    def __init__(self, domain: PerturbationSet, spec: Spec, canvas: tuple[int, int, int], draws: Draws) -> None:
        self.domain, self.spec, self.draws, self.canvas = domain, spec, draws, canvas
        self.owner = torch.arange(domain.batch, device=domain.center.device)
        self.x, self.value = domain.center, torch.full_like(self.owner, math.inf, dtype=torch.float64)
        self._ends()

    def accept(self, proposal: Tensor, objective: Objective, *, always: bool = False) -> None:
        """Move to the proposals that lower the smallest row."""
        value = objective.rows(proposal, self.spec).amin(1)
        better = (value < self.value) | always
        self.x = torch.where(beside(better, self.x), proposal, self.x)
        self.value = torch.where(better, value, self.value)

    def keep_whole(self, found: Tensor, *, last: bool = False) -> bool:
        """Write the points of broken samples (of all, at last) into ``found``; go on with the others, if any."""
        done = (self.value < 0) | last
        found[self.owner[done]] = self.x[done]
        whole = (~done).nonzero()[:, 0]
        if bool(done.any()):
            self.domain, self.spec = self.domain.take(whole), self.spec.take(whole)
            self.draws = self.draws.take(whole)
            self.owner, self.x, self.value = self.owner[whole], self.x[whole], self.value[whole]
            self._ends()
        return len(whole) > 0

    def stripes(self) -> Tensor:
        """Random vertical stripes of width 1."""
        channels, _, width = self.canvas
        return self._inside(self.draws.signs(channels, 1, width).expand(-1, *self.canvas))

    def squares(self, numbers: Tensor, side: tuple[int, int]) -> Tensor:
        """The best points with one square each, set to one end per channel."""
        channels, height, width = self.canvas
        top = (numbers[:, 0] * (height - side[0] + 1)).long()
        left = (numbers[:, 1] * (width - side[1] + 1)).long()
        rows, columns = (torch.arange(size, device=numbers.device) for size in (height, width))
        within = [
            (places >= first[:, None]) & (places < first[:, None] + length)
            for places, first, length in ((rows, top, side[0]), (columns, left, side[1]))
        ]
        mask = (within[0][:, :, None] & within[1][:, None, :])[:, None]
        signs = torch.where(numbers[:, 2:] < 0.5, -1.0, 1.0).view(-1, channels, 1, 1)
        return self._inside(torch.where(mask, signs, 0))

    def _ends(self) -> None:
        """The set's two opposite corners; for balls of other norms, of their bounding boxes."""
        self.lower, self.upper = self.domain.interval().lower, self.domain.interval().upper
        if self.domain.is_box:
            ones = torch.ones_like(self.domain.center)
            self.lower, self.upper = self.domain.steepest(-ones), self.domain.steepest(ones)

    def _inside(self, signs: Tensor) -> Tensor:
        """The best points, moved to the ends that the signs say (0: stay), in the set."""
        signs = signs.reshape(-1, *self.domain.shape) if signs.shape[1:] != self.domain.shape else signs
        moved = torch.where(signs > 0, self.upper, torch.where(signs < 0, self.lower, self.x))
        return moved if self.domain.is_box else self.domain.project(moved)


def _canvas(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width; inputs that are no images are a single row."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return (1, *shape) if len(shape) == 2 else (1, 1, math.prod(shape))


def _side(area: float, progress: float, canvas: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of the squares at this share of the queries."""
    _, height, width = canvas
    share = area / 2 ** sum(10_000 * progress > step for step in HALVINGS)
    if height == 1:
        return 1, max(1, round(share * width))
    side = max(1, round(math.sqrt(share * height * width)))
    return min(side, height), min(side, width)
