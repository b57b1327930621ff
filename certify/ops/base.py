"""What a rule is: forward, interval, pull_back, rounding_error. Propagation never asks which kind a node is.

Rows are lower bounds in the making: with coefficients A over the outputs y of a node and everything else constant,

    sum <A, y> + rest  >=  sum <A_i, x_i> + offset + rest     for all inputs x_i in their intervals,

so ``pull_back`` moves A to the inputs. An affine rule has equality, for rows of either sign.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from certify.activations.base import Activation
from certify.enclosures import Interval, Relaxation
from certify.rounding import gamma, tiny

#: What a pull-back returns: coefficients per input, and the constants that it leaves behind (float64 [rows]).
Pulled = tuple[tuple[Tensor, ...], Tensor | None]


class Rule(ABC):
    """One operation with its bounds. Tensors carry a leading batch dimension, or one of rows."""

    #: Whether y is an affine function of the inputs.
    affine: bool = False
    #: Whether the map keeps boxes boxes: every output depends on one input element, none on two of them jointly.
    elementwise: bool = False

    @abstractmethod
    def forward(self, *xs: Tensor) -> Tensor:
        """Return the operation's value in the dtype of its inputs."""

    @abstractmethod
    def interval(self, *zs: Interval) -> Interval:
        """Return bounds of y for inputs in their intervals (rounding is the caller's: see ``rounding_error``)."""

    @abstractmethod
    def pull_back(self, A: Tensor, relaxation: Relaxation | None) -> Pulled:
        """Move the rows ``A`` [rows, *out] to the inputs (see the head of this module)."""

    @abstractmethod
    def rounding_error(self, *zs: Interval) -> Tensor | None:
        """Return e [batch, *out]: the float network's y is within e of the real one, and so is what the engine
        does with y (its products A W included) per unit of |A|. None where both are exact.
        """

    def relax(self, *zs: Interval) -> Relaxation | None:
        """Return what ``pull_back`` needs besides A."""
        return None

    def line_error(self, relaxation: Relaxation | None, *zs: Interval) -> Tensor | None:
        """Return what the engine's products with the relaxation round, per unit of |A|; None if nothing."""
        return None

    def undecided(self, z: Interval) -> Tensor:
        """Return where a tighter input interval could give tighter bounds."""
        return torch.zeros_like(z.lower, dtype=torch.bool)


class Affine(Rule):
    """y = W x + bias. Authors write ``linear`` (W x) and, where W may be negative, ``absolute`` (|W| x).

    ``fan_in`` and ``fan_out`` are the longest sums in W x and W^T a. The adjoint comes from autograd where no
    better one is written.
    """

    affine = True
    fan_in: int = 1
    fan_out: int = 1
    bias: Tensor | None = None  # broadcastable against one sample of y
    input_shapes: tuple[tuple[int, ...], ...] = ()

    @abstractmethod
    def linear(self, *xs: Tensor) -> Tensor:
        """Return W x."""

    def absolute(self, *xs: Tensor) -> Tensor:
        """Return |W| x; the default is for W >= 0."""
        return self.linear(*xs)

    def transpose(self, A: Tensor) -> tuple[Tensor, ...]:
        """Return W^T A per input."""
        with torch.inference_mode(False), torch.enable_grad():
            zeros = [A.new_zeros((len(A), *shape), requires_grad=True) for shape in self.input_shapes]
            return torch.autograd.grad(self.linear(*zeros), zeros, A)

    def rows(self, neuron: Int[Tensor, "rows"], shape: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        """Return W^T of the unit vectors of some outputs (flat positions in ``shape``); None if no short cut exists."""
        return None

    def forward(self, *xs: Tensor) -> Tensor:
        y = self.linear(*xs)
        return y if self.bias is None else y + self.bias

    def interval(self, *zs: Interval) -> Interval:
        middle = self.forward(*((z.lower + z.upper) / 2 for z in zs))
        radius = self.absolute(*((z.upper - z.lower) / 2 for z in zs))
        return Interval(middle - radius, middle + radius).sanitized()

    def pull_back(self, A: Tensor, relaxation: Relaxation | None) -> Pulled:
        return self.transpose(A), None if self.bias is None else inner(A, self.bias)

    def rounding_error(self, *zs: Interval) -> Tensor | None:
        """(gamma_{fan-in + 1} + gamma_{fan-out + 8}) (|W| |z| + |b|) + underflow.

        The first gamma is the network's sum, the second the engine's (row products, and the centre and radius of
        ``interval``); |W| |z| + |b| is itself computed with a relative error below gamma_{fan-in + 2}.
        """
        dtype = zs[0].lower.dtype
        size = self.absolute(*(z.magnitude for z in zs))
        factor = gamma(self.fan_in + 1, dtype) + gamma(max(self.fan_in, self.fan_out) + 8, dtype)
        if self.bias is not None:
            size = size + self.bias.abs() * (1 + inner_error(size[0].numel(), dtype) / factor)
        return size * (factor * (1 + 2 * gamma(self.fan_in + 8, dtype))) + (self.fan_in + 1) * tiny(dtype)


class Elementwise(Rule):
    """The rule of an activation: everything comes from its facts."""

    elementwise = True

    def __init__(self, facts: Activation) -> None:
        self.facts = facts

    def forward(self, *xs: Tensor) -> Tensor:
        return self.facts.forward(xs[0])

    def interval(self, *zs: Interval) -> Interval:
        return self.facts.range(zs[0])

    def relax(self, *zs: Interval) -> Relaxation | None:
        return self.facts.relax(zs[0])

    def undecided(self, z: Interval) -> Tensor:
        return self.facts.undecided(z)

    def pull_back(self, A: Tensor, relaxation: Relaxation | None) -> Pulled:
        """Positive coefficients take the lower line, negative ones the upper line.

        The constants are <A, lower> + <min(A, 0), upper - lower>.
        """
        assert relaxation is not None
        r = relaxation
        pulled = torch.where(A >= 0, r.lower_slope, r.upper_slope).mul_(A)
        offset = inner(A.clamp(max=0), r.upper_offset - r.lower_offset)
        if bool((r.lower_offset != 0).any()):
            offset = offset + inner(A, r.lower_offset)
        return (pulled,), offset

    def rounding_error(self, *zs: Interval) -> Tensor | None:
        """The function's own error; what the engine rounds is in ``line_error``."""
        return self.facts.rounding_error(zs[0])

    def line_error(self, relaxation: Relaxation | None, *zs: Interval) -> Tensor | None:
        """One product with a slope, and the sums of the offsets with their difference rounded once."""
        assert relaxation is not None
        z, dtype = zs[0], zs[0].lower.dtype
        steep = torch.maximum(relaxation.lower_slope.abs(), relaxation.upper_slope.abs())
        high = torch.maximum(relaxation.lower_offset.abs(), relaxation.upper_offset.abs())
        sums = 3 * inner_error(z.lower[0].numel(), dtype) + gamma(8, dtype)
        return steep * z.magnitude * gamma(4, dtype) + high * sums + 2 * tiny(dtype)


BLOCK = 32  # products summed in the network's dtype before the float64 sum takes over


def inner(A: Float[Tensor, "rows *out"], v: Tensor) -> Float64[Tensor, "rows"]:
    """Return <A, v> per row; ``v`` broadcasts against A (a bias, one vector for all rows, or one per row).

    Blocks of BLOCK products are summed in the dtype of A, the blocks in float64: the error is below
    (gamma_{BLOCK + 1} + the float64 one) <|A|, |v|>, see ``inner_error``.
    """
    flat = A.flatten(1)
    v = v.expand(A.shape[1:]).reshape(1, -1) if v.ndim < A.ndim else v.expand(len(v), *A.shape[1:]).flatten(1)
    if len(v) > 1:  # a vector per row
        return (flat * v).sum(1, dtype=torch.float64)
    whole = flat.shape[1] // BLOCK * BLOCK
    total = flat[:, whole:] @ v[0, whole:] if whole < flat.shape[1] else flat.new_zeros(len(flat))
    total = total.double()
    if whole:
        blocks = flat[:, :whole].unflatten(1, (-1, BLOCK)).transpose(0, 1)
        parts = torch.bmm(blocks, v[0, :whole].view(-1, BLOCK, 1))
        total = total + parts[..., 0].double().sum(0)
    return total


def inner_error(size: int, dtype: torch.dtype) -> float:
    """Return g with |inner(A, v) - <A, v>| <= g <|A|, |v|> for rows of ``size`` elements."""
    return gamma(BLOCK + 1, dtype) + gamma(size + 8, torch.float64)
