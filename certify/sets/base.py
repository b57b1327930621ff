"""What every perturbation set can do."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from certify.draws import Draws, Source
from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.rounding import round_down, round_up

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


def view(domain: SetT, index: Tensor) -> SetT:
    """Return a shallow copy of ``domain`` with its per-sample tensors gathered."""
    taken = object.__new__(type(domain))
    taken.__dict__.update(domain.__dict__)
    taken.center, taken.hull = domain.center[index], domain.hull[index]
    if domain._ends is not None:
        taken._ends = domain._ends[0][index], domain._ends[1][index]
    return taken


def check_points(name: str, x: Tensor) -> None:
    """Raise ``InvalidInput`` unless ``x`` is a batch of finite floats."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InvalidInput(f"{name} of type {kind}", "a float32 or float64 tensor", f"{name}.float()")
    if x.ndim < 2 or x.numel() == 0:
        raise InvalidInput(
            f"{name} of shape {tuple(x.shape)}", "[batch, *shape], not empty", f"{name}.unsqueeze(0) for one"
        )
    if not bool(torch.isfinite(x).all()):
        raise InvalidInput(f"{name} holds NaN or infinities", "finite numbers", "clean the data first")
