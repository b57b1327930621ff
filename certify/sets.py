"""What may vary: perturbation sets. Norms live here and nowhere else.

A set is a batch of convex bodies, one per sample. ``hull`` is its bounding box in float64; an ``LpBall`` with
p = 1 or 2 that is clipped to the data range is the intersection of the ball with that box, and its support function
is exact (one sort), not the minimum of two.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from certify.draws import Draws, Source
from certify.duality import l1_dual, l1_shrink, l2_dual, l2_scale
from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.rounding import gamma, round_down, round_up, step_down, step_up

Clip = tuple[float | Tensor, float | Tensor]
Radius = float | int | Fraction | Tensor
SetT = TypeVar("SetT", bound="PerturbationSet")


class PerturbationSet(ABC):
    """A batch of convex sets of inputs; authors of a new set write the abstract methods.

    ``center`` [batch, *shape] lies in the set and carries its dtype and device; ``hull`` is float64.
    """

    center: Tensor
    hull: Interval
    _ends: tuple[Tensor, Tensor] | None = None

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self.center.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.center.shape[1:])

    @property
    def is_box(self) -> bool:
        """Whether the set is its own bounding box."""
        return False

    @abstractmethod
    def support(self, a: Float[Tensor, "n *shape"]) -> Float64[Tensor, "n"]:
        """Return max <a, x> over the set, never below it: float64, rounded upward. n = batch, or batch = 1."""

    def infimum(self, a: Float[Tensor, "n *shape"]) -> Float64[Tensor, "n"]:
        """Return min <a, x> over the set, never above it: float64, rounded downward."""
        return -self.support(-a)

    def infimum_rows(self, A: Float[Tensor, "batch rows *shape"]) -> Float64[Tensor, "batch rows"]:
        """Return min <A, x> over the set for several rows per sample, never above it."""
        index = torch.arange(len(A), device=A.device).repeat_interleave(A.shape[1])
        return self.take(index).infimum(A.flatten(0, 1)).view(A.shape[:2])

    @abstractmethod
    def steepest(self, a: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Return a point of the set at which <a, x> is largest (up to rounding inward)."""

    @abstractmethod
    def stride(self, a: Float[Tensor, "batch *shape"], length: float | None) -> Float[Tensor, "batch *shape"]:
        """Return the step that raises <a, x> most, of the given length in the set's norm; None means the radius.

        ``project`` follows, into the data range, which in l1 alone spreads the step over more coordinates and shortens
        it. Attacks climb by it.
        """

    @abstractmethod
    def project(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Return the point of the set nearest to ``x`` (l2), rounded inward: ``contains`` is true of it."""

    @abstractmethod
    def contains(self, x: Float[Tensor, "batch *shape"]) -> Bool[Tensor, "batch"]:
        """Return whether each x lies in the set: float64, false in doubt."""

    @abstractmethod
    def take(self, index: Int[Tensor, "n"]) -> PerturbationSet:
        """Return the sets of the samples ``index``."""

    def interval(self) -> Interval:
        """Return the bounding box in the set's dtype, rounded outward."""
        dtype = self.center.dtype
        return Interval(round_down(self.hull.lower, dtype), round_up(self.hull.upper, dtype))

    def double(self) -> PerturbationSet:
        """Return the same sets with their centres in float64, exactly."""
        twin = copy.copy(self)
        twin.center, twin._ends = self.center.double(), None
        return twin

    def sample(self, n: int, generator: Source | Draws = None) -> Float[Tensor, "n batch *shape"]:
        """Return ``n`` random points of each set: uniform in the bounding box, then projected.

        With ``Draws``, or a seed per sample, a sample's points depend on nothing but its own stream.
        """
        device = self.center.device
        draws = generator if isinstance(generator, Draws) else Draws(generator, self.batch, device)
        shares = draws.uniform(n, *self.shape).transpose(0, 1)
        points = self.hull.lower + shares * self.hull.width
        return torch.stack([self.project(point.to(self.center.dtype)) for point in points])

    def _inward(self, x: Tensor) -> Tensor:
        """Clamp ``x`` to the floats inside the hull (the centre is one of them)."""
        return torch.clamp(x, *self._floats)

    @property
    def _floats(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest floats inside the hull, elementwise; found once, for attacks ask often."""
        if self._ends is None:
            dtype = self.center.dtype
            lower = torch.minimum(round_up(self.hull.lower, dtype), self.center)
            upper = torch.maximum(round_down(self.hull.upper, dtype), self.center)
            self._ends = self._tightened(lower), self._tightened(upper)
        return self._ends

    def _tightened(self, end: Tensor) -> Tensor:
        """The float nearest to ``end``, towards the centre, that lies in the set: the hull may be rounded outward."""
        return end

    def _in_hull(self, x: Tensor) -> Tensor:
        inside = (x.double() >= self.hull.lower) & (x.double() <= self.hull.upper)
        return inside.flatten(1).all(1)


class Box(PerturbationSet):
    """{x : lower <= x <= upper}, elementwise; features with lower = upper are fixed.

    ``lower`` and ``upper`` are [batch, *shape] in the model's dtype. Raises ``InvalidInput`` if they are not finite,
    differ in shape, or lower > upper somewhere.
    """

    def __init__(self, lower: Float[Tensor, "batch *shape"], upper: Float[Tensor, "batch *shape"]) -> None:
        _check_points("lower", lower)
        _check_points("upper", upper)
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
        return _view(self, index)


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
        _check_points("center", center)
        if p not in (1, 2, torch.inf):
            raise InvalidInput(f"p = {p!r}", "p = 1, 2 or inf", "p=torch.inf for pixelwise perturbations")
        self.center, self.p = center.detach().clone(), float(p)  # the caller may write into its own tensor
        self.radius, self.clip = _radii(radius, center), clip
        reach = self.radius.view(-1, *[1] * (center.ndim - 1))
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
        radius = self.radius.to(a.dtype).view(-1, *[1] * (a.ndim - 1))
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
        taken = _view(self, index)
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
        return torch.where(inside.view(-1, *[1] * (x.ndim - 1)), landed, self.center)


def _view(domain: SetT, index: Tensor) -> SetT:
    """Shallow copy of ``domain`` with its per-sample tensors gathered."""
    taken = object.__new__(type(domain))
    taken.__dict__.update(domain.__dict__)
    taken.center, taken.hull = domain.center[index], domain.hull[index]
    if domain._ends is not None:
        taken._ends = domain._ends[0][index], domain._ends[1][index]
    return taken


def _taken(end: float | Tensor, center: Tensor, index: Tensor) -> float | Tensor:
    """An end of the data range for the samples ``index``: one of its own per sample, or the same for all."""
    per_sample = isinstance(end, Tensor) and end.ndim == center.ndim and len(end) == len(center)
    return end[index] if isinstance(end, Tensor) and per_sample else end


def _check_points(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InvalidInput(f"{name} of type {kind}", "a float32 or float64 tensor", f"{name}.float()")
    if x.ndim < 2 or x.numel() == 0:
        raise InvalidInput(
            f"{name} of shape {tuple(x.shape)}", "[batch, *shape], not empty", f"{name}.unsqueeze(0) for one"
        )
    if not bool(torch.isfinite(x).all()):
        raise InvalidInput(f"{name} holds NaN or infinities", "finite numbers", "clean the data first")


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


def _distance_exceeds(x: Tensor, center: Tensor, radius: Tensor) -> Tensor:
    """Return where |x - center| > radius, exactly: the float64 difference and its own error (two-sum)."""
    a, b = x.double(), center.double()
    reach = radius.view(-1, *[1] * (x.ndim - 1))
    s = a - b
    exceeds, equal = s.abs() > reach, s.abs() == reach
    if bool(equal.any()):  # then the rounding of the difference decides
        t = s - a
        error = (a - (s - t)) - (b + t)
        exceeds |= equal & (torch.where(s < 0, -error, error) > 0)
    return exceeds
