"""Boxes: an interval per feature."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.rounding import gamma, step_down, step_up
from certify.sets.base import PerturbationSet, check_points, view


class Box(PerturbationSet):
    """{x : lower <= x <= upper}, elementwise; features with lower = upper are fixed.

    ``lower`` and ``upper`` are [batch, *shape] in the model's dtype. Raises ``InvalidInput`` if they are not finite,
    differ in shape, or lower > upper somewhere.
    """

    def __init__(self, lower: Float[Tensor, "batch *shape"], upper: Float[Tensor, "batch *shape"]) -> None:
        check_points("lower", lower)
        check_points("upper", upper)
        if lower.shape != upper.shape or lower.dtype != upper.dtype:
            raise InvalidInput(
                f"lower {tuple(lower.shape)} {lower.dtype}, upper {tuple(upper.shape)} {upper.dtype}",
                "two tensors of one shape and dtype",
                "certify.Box(lower, upper) with both [batch, *shape]",
            )
        if (lower > upper).any():
            raise InvalidInput(
                f"lower > upper in {int((lower > upper).sum())} places",
                "lower <= upper everywhere",
                "swap or intersect the ends",
            )
        self.hull = Interval(*(end.detach().to(torch.float64, copy=True) for end in (lower, upper)))
        middle = (self.hull.lower + self.hull.width / 2).to(lower.dtype)
        self.center = torch.minimum(torch.maximum(middle, lower), upper)

    @property
    def is_box(self) -> bool:
        return True

    def support(self, a: Float[Tensor, "n *shape"]) -> Float64[Tensor, "n"]:
        return -box_infimum(-a[:, None], self.hull)[:, 0]

    def steepest(self, a: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        ends = torch.where(a > 0, self.hull.upper, self.hull.lower)
        return self._inward(torch.where(a == 0, self.center.double(), ends).to(self.center.dtype))

    def stride(self, a: Float[Tensor, "batch *shape"], length: float | None) -> Float[Tensor, "batch *shape"]:
        return a.sign().mul_((self.hull.width / 2).to(a.dtype) if length is None else length)

    def project(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        return self._inward(x)

    def contains(self, x: Float[Tensor, "batch *shape"]) -> Bool[Tensor, "batch"]:
        return self._in_hull(x)

    def take(self, index: Int[Tensor, "n"]) -> Box:
        return view(self, index)


def box_infimum(A: Float[Tensor, "n rows *shape"], hull: Interval) -> Float64[Tensor, "n rows"]:
    """Return min <A, x> over lower <= x <= upper, by centre and half width, rounded downward.

    ``hull`` is float64, [n or 1, *shape].
    """
    b = A.flatten(2).to(torch.float64, copy=True)
    size = b.abs if torch.is_grad_enabled() else b.abs_  # in place once b itself has been used
    center = (hull.lower + hull.width / 2).flatten(1)
    half = step_up(torch.maximum(hull.upper.flatten(1) - center, center - hull.lower.flatten(1)))
    reach = half + gamma(b.shape[2] + 4, torch.float64) * (center.abs() + half)
    if len(center) == 1:  # one sample for all rows: matrix times vector
        total = b @ center[0] - size() @ reach[0]
    else:
        total = (torch.bmm(b, center[..., None]) - torch.bmm(size(), reach[..., None]))[..., 0]
    return step_down(total, 2)
