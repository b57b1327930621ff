"""Balls in l1, l2 and linf, clipped to the data range."""

from __future__ import annotations

from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from certify.duality import l1_dual, l1_shrink, l2_dual, l2_scale
from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.rounding import gamma, step_down, step_up
from certify.sets.base import PerturbationSet, check_points, view
from certify.sets.box import box_infimum
from certify.shapes import beside

Clip = tuple[float | Tensor, float | Tensor]
Radius = float | int | Fraction | Tensor


class LpBall(PerturbationSet):
    """{x : ||x - center||_p <= radius, clip[0] <= x <= clip[1]} for p = 1, 2 or inf, one ball per sample.

    ``radius`` is a float, a ``Fraction`` (kept exact, rounded outward) or a tensor [batch], in the units of x.
    Raises ``InvalidInput`` for NaN or negative radii, other p, or a centre outside ``clip``.
    """

    def __init__(
        self,
        center: Float[Tensor, "batch *shape"],
        radius: Radius,
        p: float = torch.inf,
        clip: Clip | None = None,
    ) -> None:
        check_points("center", center)
        if p not in (1, 2, torch.inf):
            raise InvalidInput(f"p = {p!r}", "p = 1, 2 or inf", "p=torch.inf for pixelwise perturbations")
        self.center, self.p = center.detach().clone(), float(p)  # the caller may write into its own tensor
        self.radius, self.clip = _radii(radius, center), clip
        reach = beside(self.radius, center)
        lower, upper = step_down(center.double() - reach), step_up(center.double() + reach)
        # Where the radius is 0 the ball is its centre; outward steps would let fixed features move.
        lower, upper = (torch.where(reach == 0, center.double(), end) for end in (lower, upper))
        if clip is not None:
            low, high = (torch.as_tensor(end, dtype=torch.float64, device=center.device) for end in clip)
            if not bool(((center.double() >= low) & (center.double() <= high)).all()):
                raise InvalidInput(
                    f"a centre in [{center.min():.6g}, {center.max():.6g}]",
                    f"centres inside the data range clip=({low.min():.6g}, {high.max():.6g})",
                    "clip=(0.0, 1.0) for images in [0, 1], or clip=None",
                )
            lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
        self.hull = Interval(lower, upper)

    @property
    def is_box(self) -> bool:
        return self.p == torch.inf

    def with_radius(self, radius: Radius) -> LpBall:
        """Return the balls of another radius around the same centres, in the same data range."""
        return LpBall(self.center, radius, self.p, self.clip)

    def distance(self, x: Float[Tensor, "batch *shape"]) -> Float64[Tensor, "batch"]:
        """Return ||x - center||_p in float64: how far each x is, in the norm of the set."""
        return torch.linalg.vector_norm((x.double() - self.center.double()).flatten(1), ord=self.p, dim=1)

    def support(self, a: Float[Tensor, "n *shape"]) -> Float64[Tensor, "n"]:
        if self.p == torch.inf:
            return -box_infimum(-a[:, None], self.hull)[:, 0]
        b, center = a.double().flatten(1), self.center.double().flatten(1)
        magnitude, cap = b.abs(), self._caps(b)
        radius = self.radius.expand(len(b)) if len(self.radius) == 1 else self.radius
        if self.clip is None:
            dual = magnitude.amax(1) if self.p == 1 else torch.linalg.vector_norm(magnitude, dim=1)
            rise = radius * dual
        elif self.p == 1:
            rise = l1_dual(magnitude, cap, radius)
        else:
            rise = l2_dual(magnitude, cap, radius)
        error = gamma(3 * b.shape[1] + 20, torch.float64)
        return (b * center).sum(1) + rise + error * ((magnitude * center.abs()).sum(1) + 2 * rise.abs())

    def steepest(self, a: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        if self.p == torch.inf:
            ends = torch.where(a > 0, self.hull.upper, self.hull.lower)
            return self._inward(torch.where(a == 0, self.center.double(), ends).to(self.center.dtype))
        b = a.double().flatten(1)
        magnitude, cap = b.abs(), self._caps(b)
        if self.p == 1:
            order = magnitude.argsort(1, descending=True)
            room = cap.gather(1, order)
            spent = room.cumsum(1) - room
            move = torch.minimum(room, (self.radius[:, None] - spent).clamp(min=0))
            step = torch.zeros_like(b).scatter(1, order, move)
        else:
            step = torch.minimum(magnitude * l2_scale(magnitude, cap, self.radius)[:, None], cap)
        step = torch.where(magnitude > 0, step, 0)
        return self._land(self.center.double() + (step * b.sign()).view_as(a))

    def stride(self, a: Float[Tensor, "batch *shape"], length: float | None) -> Float[Tensor, "batch *shape"]:
        radius = beside(self.radius.to(a.dtype), a)
        size = radius if length is None else torch.full_like(radius, length)
        if self.p == torch.inf:
            return a.sign().mul_(size)
        if self.p == 2:
            norm = torch.linalg.vector_norm(a.double().flatten(1), dim=1).view_as(radius)
            return (a / torch.where(norm > 0, norm, 1)).to(a.dtype) * size
        across = (self.steepest(a) - self.steepest(-a)) / 2
        return across * torch.where(radius > 0, size / radius, 0)

    def project(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        if self.p == torch.inf:
            return self._inward(x)
        v = (x.double() - self.center.double()).flatten(1)
        magnitude, cap = v.abs(), self._caps(v)
        if self.p == 2:  # KKT: min(|v| t, cap) with t <= 1
            scale = l2_scale(magnitude, cap, self.radius).clamp(max=1)[:, None]
            step = torch.minimum(magnitude * scale, cap)
        else:
            step = l1_shrink(magnitude, cap, self.radius)
        return self._land(self.center.double() + (step * v.sign()).view_as(x))

    def contains(self, x: Float[Tensor, "batch *shape"]) -> Bool[Tensor, "batch"]:
        inside = self._in_hull(x)
        if self.p == torch.inf:
            return inside & ~_distance_exceeds(x, self.center, self.radius).flatten(1).any(1)
        error = gamma(self.center[0].numel() + 8, torch.float64)
        return inside & (self.distance(x) * (1 + error) <= self.radius)

    def take(self, index: Int[Tensor, "n"]) -> LpBall:
        taken = view(self, index)
        taken.radius = self.radius[index]
        if self.clip is not None:
            taken.clip = _taken(self.clip[0], self.center, index), _taken(self.clip[1], self.center, index)
        return taken

    def _caps(self, direction: Tensor) -> Tensor:
        """How far each coordinate may move along ``direction`` [n, features], float64, rounded up."""
        center = self.center.double()
        up, down = ((step_up(end)).flatten(1) for end in (self.hull.upper - center, center - self.hull.lower))
        return torch.where(direction > 0, up, down).clamp(min=0)

    def _tightened(self, end: Tensor) -> Tensor:
        if self.p == torch.inf:
            while bool((outside := _distance_exceeds(end, self.center, self.radius)).any()):
                end = torch.where(outside, torch.nextafter(end, self.center), end)
        return end

    def _land(self, x: Tensor) -> Tensor:
        """Round float64 points to the dtype towards the centre, and inside the ball whatever the rounding did."""
        center = self.center.double()
        for shrink in (1.0, 1 - 1e-12, 1 - 1e-7, 1 - 1e-5):
            target = center + (x - center) * shrink
            landed = target.to(self.center.dtype)
            too_far = (landed.double() - center).abs() > (target - center).abs()
            landed = self._inward(torch.where(too_far, torch.nextafter(landed, self.center), landed))
            inside = self.contains(landed)
            if bool(inside.all()):
                return landed
        return torch.where(beside(inside, x), landed, self.center)


def _taken(end: float | Tensor, center: Tensor, index: Tensor) -> float | Tensor:
    """An end of the data range for the samples ``index``: one of its own per sample, or the same for all."""
    per_sample = isinstance(end, Tensor) and end.ndim == center.ndim and len(end) == len(center)
    return end[index] if isinstance(end, Tensor) and per_sample else end


def _radii(radius: Radius, center: Tensor) -> Tensor:
    """Return the radius per sample in float64, rounded up."""
    batch, device = center.shape[0], center.device
    if isinstance(radius, Tensor):
        value = radius.detach().to(device=device, dtype=torch.float64)
        if value.ndim > 1 or (value.ndim == 1 and len(value) != batch):
            raise InvalidInput(f"radius of shape {tuple(radius.shape)}", f"a scalar or [{batch}]", "one per sample")
    else:
        try:
            number = float(radius)
        except (TypeError, ValueError):
            raise InvalidInput(f"radius {radius!r}", "a number, Fraction or tensor", "radius=8/255") from None
        value = torch.tensor(number, dtype=torch.float64, device=device)
        if isinstance(radius, Fraction) and Fraction(number) < radius:
            value = step_up(value)
    if not bool((torch.isfinite(value) & (value >= 0)).all()):
        raise InvalidInput(f"radius {radius}", "finite and >= 0", "radius=8/255")
    return value.expand(batch).clone()


def _distance_exceeds(x: Tensor, center: Tensor, radius: Tensor) -> Tensor:
    """Return where |x - center| > radius, exactly: the float64 difference and its own error (two-sum)."""
    a, b = x.double(), center.double()
    reach = beside(radius, x)
    s = a - b
    exceeds, equal = s.abs() > reach, s.abs() == reach
    if bool(equal.any()):  # then the rounding of the difference decides
        t = s - a
        error = (a - (s - t)) - (b + t)
        exceeds |= equal & (torch.where(s < 0, -error, error) > 0)
    return exceeds
