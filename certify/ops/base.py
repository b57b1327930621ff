"""What a rule is: forward, interval, pull_back, rounding_error. Propagation never asks which kind a node is.

Rows are lower bounds in the making: with coefficients A over the outputs y of a node and everything else constant,

    sum <A, y> + rest  >=  sum <A_i, x_i> + offset + rest     for all inputs x_i in their intervals,

so ``pull_back`` moves A to the inputs. An affine rule has equality, for rows of either sign, up to <A, forward(0)>:
constants and errors ride along (see ``certify.propagate.state.Rider``). Coefficients are [groups, rows, *out], the
rows of a group sharing one sample, or one window onto a sample's map (see certify/propagate/frames.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from certify.activations.base import Activation
from certify.enclosures import Interval, Relaxation
from certify.frames import Frame
from certify.rounding import gamma, tiny

#: What a pull-back returns: coefficients per input, and the constants that it leaves behind (float64 [groups, rows]).
Pulled = tuple[tuple[Tensor, ...], Tensor | None]


class Rule(ABC):
    """One operation with its bounds. Tensors carry a leading batch dimension, or one of rows."""

    #: Whether y is an affine function of the inputs.
    affine: bool = False
    #: Whether the map keeps boxes boxes: every output depends on one input element, none on two of them jointly.
    elementwise: bool = False
    #: Whether the map takes constants and errors of its inputs along instead of having them settled before it.
    carries: bool = False

    @abstractmethod
    def forward(self, *xs: Tensor) -> Tensor:
        """Return the operation's value in the dtype of its inputs."""

    @abstractmethod
    def interval(self, *zs: Interval) -> Interval:
        """Return bounds of y for inputs in their intervals (rounding is the caller's: see ``rounding_error``)."""

    @abstractmethod
    def pull_back(self, A: Float[Tensor, "groups rows *out"], relaxation: Relaxation | None) -> Pulled:
        """Move the rows ``A`` to the inputs (see the head of this module); the lines have a dimension for the rows."""

    def reach(self, frame: Frame) -> Frame | None:
        """Return which part of every input's map a window of the output depends on; None if windows must end here."""
        return None

    def pull_window(self, A: Float[Tensor, "groups rows *window"], relaxation: Relaxation | None) -> Pulled:
        """Move rows on a window to the inputs' windows (``reach``); rules that know windows write it."""
        raise NotImplementedError(type(self).__name__)

    def absolute(self, *xs: Tensor) -> Tensor:
        """Return |W| x of an affine map."""
        raise NotImplementedError(type(self).__name__)

    @abstractmethod
    def rounding_error(self, *zs: Interval) -> Tensor | None:
        """Return e [batch, *out]: the float network's y is within e of the real one, and so is what the engine
        does with y (its products A W included) per unit of |A|. None where both are exact.
        """

    def relax(self, *zs: Interval) -> Relaxation | None:
        """Return what ``pull_back`` needs besides A."""
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
        again = torch.is_grad_enabled()  # whoever trains differentiates the adjoint in A and in the weights
        with torch.inference_mode(False), torch.enable_grad():
            zeros = [A.new_zeros((len(A), *shape), requires_grad=True) for shape in self.input_shapes]
            return torch.autograd.grad(self.linear(*zeros), zeros, A, create_graph=again)

    def forward(self, *xs: Tensor) -> Tensor:
        y = self.linear(*xs)
        return y if self.bias is None else y + self.bias

    def interval(self, *zs: Interval) -> Interval:
        middle = self.forward(*((z.lower + z.upper) / 2 for z in zs))
        radius = self.absolute(*((z.upper - z.lower) / 2 for z in zs))
        return Interval(middle - radius, middle + radius).sanitized()

    def pull_back(self, A: Tensor, relaxation: Relaxation | None) -> Pulled:
        return tuple(part.unflatten(0, A.shape[:2]) for part in self.transpose(A.flatten(0, 1))), None

    def pull_window(self, A: Tensor, relaxation: Relaxation | None) -> Pulled:
        return self.pull_back(A, relaxation)

    def push_window(self, *xs: Tensor) -> Tensor:
        """Return what ``pull_window`` is the adjoint of: W x on windows."""
        return self.linear(*xs)

    def rounding_error(self, *zs: Interval) -> Tensor | None:
        """(gamma_{fan-in + 1} + gamma_{fan-out + 8}) (|W| |z| + |b|) + underflow.

        The first gamma is the network's sum, the second the engine's (row products, and the centre and radius of
        ``interval``); |W| |z| + |b| is itself computed with a relative error below gamma_{fan-in + 2}.
        """
        dtype = zs[0].lower.dtype
        size = self.absolute(*(z.magnitude for z in zs))
        if self.bias is not None:
            size = size + self.bias.abs()
        factor = gamma(self.fan_in + 1, dtype) + gamma(max(self.fan_in, self.fan_out) + 8, dtype)
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

    def reach(self, frame: Frame) -> Frame:
        return frame

    def pull_back(self, A: Tensor, relaxation: Relaxation | None) -> Pulled:
        """Positive coefficients take the lower line, negative ones the upper line."""
        assert relaxation is not None
        r = relaxation
        if r.lower_slope is r.upper_slope:  # lines that were chosen already
            return (A * r.lower_slope,), inner(A, r.lower_offset)
        negative = A.clamp(max=0)
        positive = A - negative
        offset = inner(positive, r.lower_offset) + inner(negative, r.upper_offset)
        return (torch.addcmul(positive * r.lower_slope, negative, r.upper_slope),), offset

    def pull_window(self, A: Tensor, relaxation: Relaxation | None) -> Pulled:
        return self.pull_back(A, relaxation)

    def rounding_error(self, *zs: Interval) -> Tensor | None:
        """The function's own error; what the engine rounds is charged where the lines are made ready."""
        return self.facts.rounding_error(zs[0])


BLOCK = 64  # products summed in the network's dtype before the float64 sum takes over


def inner(A: Float[Tensor, "groups rows *out"], v: Tensor) -> Float64[Tensor, "groups rows"]:
    """Return <A, v> per row; ``v`` [groups or 1, 1, *out] broadcasts against A.

    Blocks of BLOCK products are summed in the dtype of A, the blocks in float64: the error is below
    ``inner_error`` times <|A|, |v|>.
    """
    products = (A * v).flatten(2)
    whole = products.shape[2] // BLOCK * BLOCK
    total = products[..., whole:].sum(2).double()
    if whole:
        total = total + products[..., :whole].unflatten(2, (-1, BLOCK)).sum(3).double().sum(2)
    return total


def inner_error(size: int, dtype: torch.dtype) -> float:
    """Return g with |inner(A, v) - <A, v>| <= g <|A|, |v|> for rows of ``size`` elements."""
    return gamma(BLOCK + 1, dtype) + gamma(size + 8, torch.float64)
