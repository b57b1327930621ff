"""Sums of equally spaced Gaussians by powers: two exponentials for a group of terms, one multiply-add for each term.

In a group around the point c, with u = s - c and the step h of the dictionary,
exp(-gamma (u - j h)^2) = E c_j t^j, where E = exp(-gamma u^2), t = exp(2 gamma h u), c_j = exp(-gamma j^2 h^2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

#: gamma u^2 is clamped here, so that neither E nor t^j leaves the range of float32.
FAR = 72.0
#: Most points on one side of a group's centre.
WIDEST = 5
#: Most roundings of a term, whatever D: 3.6e-6 in float32, of which 1e-6 was ever seen.
MOST = 60
#: How many of them may come from points off their line, an error that is all seen: 5 for 20 points of linspace.
STRAIGHT = 8
#: Largest sum|alpha| for which no alpha_j c_j t^j overflows in float32: t^j <= exp(2 sqrt(FAR) FLAT) < 1e16.
HEAVIEST = 1e20
#: Largest j h sqrt(gamma): what the clamp leaves of a term is at most exp(-(sqrt(FAR) - FLAT)^2) = 1e-18.
FLAT = 2.1


@dataclass(frozen=True, eq=False)
class Plan:
    """How to sum the Gaussians of one dictionary in one dtype; without groups, term by term.

    ``groups`` are (first, centre, end). ``numbers`` are -gamma, 2 gamma h, the clamp of u and the centres,
    ``scale`` the c_j and ``lean`` the 2 gamma h j of all points: all rounded from float64.
    """

    groups: tuple[tuple[int, int, int], ...]
    dictionary: Float[Tensor, "size"]
    gamma: Float[Tensor, ""]
    sources: tuple[Tensor, Tensor]
    versions: tuple[int, int]
    floats: tuple[float, ...]
    numbers: Float[Tensor, "groups+3"]
    scale: Float[Tensor, "size"]
    lean: Float[Tensor, "size"]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the error of the sum is bounded."""
        return self.numbers.dtype

    def fits(self, dictionary: Tensor, gamma: Tensor, dtype: torch.dtype) -> bool:
        """Whether the plan was made from these values: compared on the CPU, elsewhere known by identity and version.

        Comparing would make the CPU wait for a GPU. A write through ``.data`` leaves versions as they are;
        ``coefficients`` answers it with NaN.
        """
        if dtype != self.dtype or dictionary.device != self.dictionary.device:
            return False
        if dictionary.device.type == "cpu":
            same = dictionary.dtype == self.dictionary.dtype and gamma.dtype == self.gamma.dtype
            return same and torch.equal(dictionary, self.dictionary) and torch.equal(gamma, self.gamma)
        known = dictionary is self.sources[0] and gamma is self.sources[1]
        return known and (dictionary._version, gamma._version) == self.versions


def make_plan(dictionary: Float[Tensor, "size"], gamma: Float[Tensor, ""], dtype: torch.dtype) -> Plan:
    """Return the plan of widest groups whose error is at most 4 D + 10 roundings of each |alpha_i|.

    That is the float contract of a KAF, in any order of the terms, so one contract covers every form of the sum.
    Dictionaries that are not evenly spaced to within it, and kernels too narrow for groups, are summed term by term.
    """
    points, width = dictionary.detach().double().cpu(), float(gamma.detach())
    size = len(points)
    step = float(points[-1] - points[0]) / (size - 1) if size > 1 else 0.0
    groups: tuple[tuple[int, int, int], ...] = ()
    if step > 0 and math.isfinite(step) and 0 < width * step**2 < FLAT**2:
        for half in range(min(WIDEST, size - 1), 0, -1):
            trial = _groups(size, 2 * half + 1)
            if _roundings(points, width, step, trial, dtype) <= min(4 * size + 10, MOST):
                groups = trial
                break
    centres = torch.tensor([centre for first, centre, end in groups for _ in range(first, end)], dtype=torch.long)
    j = torch.arange(size, dtype=torch.float64)[: len(centres)] - centres
    reach = math.sqrt(FAR / width) if width > 0 else 0.0
    floats = (-width, 2 * width * step, reach, *(float(points[centre]) for _, centre, _ in groups))

    def rounded(exact: Tensor) -> Tensor:
        return exact.to(dtype=dtype, device=dictionary.device)

    return Plan(
        groups,
        dictionary.detach().clone(),
        gamma.detach().clone(),
        (dictionary, gamma),
        (dictionary._version, gamma._version),
        floats,
        rounded(torch.tensor(floats, dtype=torch.float64)),
        rounded(torch.exp(-width * (j * step).square())),
        rounded(2 * width * step * j),
    )


def _groups(size: int, most: int) -> tuple[tuple[int, int, int], ...]:
    """Cut ``size`` points in groups of nearly equal width, at most ``most``, with their centres."""
    count = -(-size // most)
    ends = [size * k // count for k in range(count + 1)]
    return tuple((first, (first + end - 1) // 2, end) for first, end in pairwise(ends))


def _roundings(
    points: Tensor, gamma: float, step: float, groups: tuple[tuple[int, int, int], ...], dtype: torch.dtype
) -> float:
    """Bound the error of a term of unit weight in any group, in units of the roundoff; infinite where not covered.

    With b = gamma h^2, v = |u| / h: the rounding of u moves the term by 2 b v |v - j|; E errs by 3 b v^2 (two
    products, one more where exp multiplies by log2 e) and 4 (two units in the last place of exp), t^j by j times
    (6 b v + 4), one for a reciprocal, and two for a step of Horner; c_j and its product with alpha by 2, the sums by 3
    and one for every group; all times the term, exp(-b (v - j)^2). Points off the line j h move it by at most
    sqrt(2 gamma / e) times their distance.
    """
    b, roundoff = gamma * step**2, torch.finfo(dtype).eps / 2
    half = max(max(centre - first, end - 1 - centre) for first, centre, end in groups)
    if half * math.sqrt(b) > FLAT:
        return math.inf
    v = torch.linspace(0, math.sqrt(FAR / b), 4001, dtype=torch.float64)
    worst = 0.0
    for j in range(half + 1):
        units = 2 * b * v * (v - j).abs() + 3 * b * v.square() + 9 + j * (6 * b * v + 7) + len(groups)
        worst = max(worst, float((units * torch.exp(-b * (v - j).square())).max()))
    off = 0.0
    for first, centre, end in groups:
        line = points[centre] + (torch.arange(first, end, dtype=torch.float64) - centre) * step
        off = max(off, float((points[first:end] - line).abs().max()))
    bend = math.sqrt(2 * gamma / math.e) * off / roundoff
    return 1.02 * worst + bend if bend <= STRAIGHT else math.inf


def coefficients(
    alpha: Float[Tensor, "parameters size"], dictionary: Tensor, gamma: Tensor, plan: Plan
) -> Float[Tensor, "size parameters"]:
    """Return alpha_j c_j by term; NaN where the values are no longer those of the plan."""
    known = (dictionary == plan.dictionary).all() & (gamma == plan.gamma)
    return torch.where(known, alpha.t().contiguous() * plan.scale[:, None], torch.nan)
