"""Affine maps on a torus: what a node's value is of the state, at every frequency, with the error of every entry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Num
from torch import Tensor

from certify.lipschitz.fourier import Torus
from certify.lipschitz.hermitian import FEW
from certify.ops.arithmetic import Scale, Sum
from certify.ops.base import Affine
from certify.ops.conv import Conv
from certify.ops.pool import Average
from certify.ops.shape import Concat, Select
from certify.rounding import gamma


class Narrow(Exception):
    """The torus that begins at ``origin`` needs these sizes."""

    def __init__(self, origin: str, size: tuple[int, ...]) -> None:
        self.origin, self.size = origin, size


@dataclass(frozen=True, eq=False)
class Basis:
    """What the entries of a state are: neurons, or channels on a torus that began with sizes ``base`` at ``origin``."""

    torus: Torus | None
    width: int
    device: torch.device
    origin: str = ""
    base: tuple[int, ...] = ()

    @property
    def blocks(self) -> int:
        """How many blocks the state has."""
        return 1 if self.torus is None else len(self.torus.frequencies)

    @property
    def dtype(self) -> torch.dtype:
        """Complex on a torus."""
        return torch.float64 if self.torus is None else torch.complex128


@dataclass(frozen=True, eq=False)
class Value:
    """A node's value in terms of the state: a slot of it, or ``matrix`` times it at every frequency."""

    shape: tuple[int, ...]
    torus: Torus | None = None
    start: int = 0
    matrix: Num[Tensor, "blocks m k"] | None = None
    error: Tensor | None = None
    clean: bool = True  # on a torus: zero outside the grid

    @property
    def size(self) -> int:
        """Entries of the state that the value needs: neurons, or channels."""
        return math.prod(self.shape) if self.torus is None else self.shape[0]


def through(rule: Affine, inputs: list[Value | None], shape: tuple[int, ...], basis: Basis) -> Value | None:
    """Return an affine node's value of this ``shape``, or None where it is no map by frequency.

    Raises ``Narrow`` where the torus has too little room, or does not divide by a stride.
    """
    known = [value for value in inputs if value is not None and value.torus is not None]
    if len(known) < len(inputs) or len({value.torus for value in known}) > 1:
        return None
    value = known[0]
    if isinstance(rule, Conv):
        return _convolved(basis, value, shape, rule.weight, rule.stride, rule.padding, rule.dilation, rule.groups)
    if isinstance(rule, Average) and rule.window is not None:
        kernel, stride, padding = rule.window
        one = torch.full((value.size, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64, device=basis.device)
        return _convolved(basis, value, shape, one, stride, padding, (1,) * len(kernel), value.size)
    if isinstance(rule, Scale):
        return _scaled(basis, value, rule.scale)
    if isinstance(rule, Sum):
        return _added(basis, known, shape, rule.sign)
    if isinstance(rule, Concat) and rule.dim == 1:
        return _joined(basis, known, shape)
    if isinstance(rule, Select) and rule.index is None and shape == value.shape:
        return value
    if isinstance(rule, Select):
        return _moved(basis, value, rule)
    return None


def _convolved(
    basis: Basis, value: Value, shape: tuple[int, ...], weight: Tensor, stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...], groups: int,
) -> Value | None:  # fmt: skip
    torus = value.torus
    assert torus is not None
    assert basis.torus is not None
    kernel = weight.shape[2:]
    if len(kernel) != len(torus.grid):
        return None
    geometry = list(zip(torus.grid, torus.size, shape[1:], kernel, stride, padding, dilation, strict=True))
    after = [s * (m - 1) - p + d * (k - 1) - (n - 1) for n, _, m, k, s, p, d in geometry]
    if not value.clean and (max(after) > 0 or max(padding) > 0):
        return None
    needed = [max(n + max(p, a, 0), s * m) for (n, _, m, _, s, p, _), a in zip(geometry, after, strict=True)]
    if any(have < want or have % s for (_, have, _, _, s, _, _), want in zip(geometry, needed, strict=True)):
        _widen(basis, torus, needed, stride)
    blocks, error = torus.transfer(_dense_groups(weight, groups), basis.torus.frequencies, padding, dilation)
    root = math.sqrt(math.prod(stride))
    coarse = Torus(tuple(shape[1:]), tuple(n // s for n, s in zip(torus.size, stride, strict=True)))
    matrix, noise = on_value(basis, blocks / root, error / root * (1 + FEW) + blocks.abs() * FEW, value)
    return Value(shape, coarse, 0, matrix, noise, clean=False)


def _widen(basis: Basis, torus: Torus, needed: list[int], stride: tuple[int, ...]) -> None:
    """Begin again with a torus that is wide enough here and divisible by all strides up to here."""
    size = []
    for base, have, want, s in zip(basis.base, torus.size, needed, stride, strict=True):
        unit = base // have * s
        size.append(-(-max(base, want * base // have) // unit) * unit)
    raise Narrow(basis.origin, tuple(size))


def on_value(basis: Basis, blocks: Tensor, error: Tensor, value: Value) -> tuple[Tensor, Tensor]:
    """Return (blocks +- error) times the value, with its error."""
    if value.matrix is None:
        before = (0, 0) if value.start == 0 and value.size == basis.width else (
            value.start, basis.width - value.start - value.size)  # fmt: skip
        return torch.nn.functional.pad(blocks, before), torch.nn.functional.pad(error, before)
    magnitude = value.matrix.abs()
    noise = blocks.abs() @ magnitude * gamma(8 * blocks.shape[2] + 16, torch.float64)
    if value.error is None:
        return blocks @ value.matrix, noise + error @ magnitude
    return blocks @ value.matrix, noise + error @ (magnitude + value.error) + blocks.abs() @ value.error


def _scaled(basis: Basis, value: Value, scale: Tensor) -> Value | None:
    channels = value.shape[0]
    if scale.ndim == len(value.shape) and scale[0].numel() == 1:
        factor = scale.flatten().expand(channels)
    elif scale.numel() == 1:
        factor = scale.reshape(1).expand(channels)
    else:
        return None
    matrix, error = matrix_of(basis, value)
    scaled = matrix * factor[:, None]
    noise = scaled.abs() * FEW
    noise = noise if error is None else noise + error * factor.abs()[:, None] * (1 + FEW)
    return Value(value.shape, value.torus, 0, scaled, noise, value.clean)


def _added(basis: Basis, values: list[Value], shape: tuple[int, ...], sign: float) -> Value:
    (first, e), (second, f) = (matrix_of(basis, value) for value in values)
    matrix = first + sign * second
    noise = matrix.abs() * FEW
    for error in (e, f):
        noise = noise if error is None else noise + error
    return Value(shape, values[0].torus, 0, matrix, noise, all(value.clean for value in values))


def _joined(basis: Basis, values: list[Value], shape: tuple[int, ...]) -> Value:
    parts = [matrix_of(basis, value) for value in values]
    blocks = max(len(part) for part, _ in parts)
    matrix = torch.cat([part.expand(blocks, -1, -1) for part, _ in parts], 1)
    noise = torch.cat(
        [
            (torch.zeros_like(part.real) if error is None else error.expand_as(part)).expand(blocks, -1, -1)
            for part, error in parts
        ],
        1,
    )
    return Value(shape, values[0].torus, 0, matrix, noise, all(value.clean for value in values))


def _moved(basis: Basis, value: Value, rule: Select) -> Value | None:
    """Channels picked or added, places picked with a stride: a convolution with 1 x 1 kernels."""
    picked = _as_pick(rule)
    if picked is None:
        return None
    source, stride = picked
    weight = torch.zeros(len(source), value.size, dtype=torch.float64, device=basis.device)
    used = source >= 0
    weight[used.nonzero()[:, 0], source[used]] = 1
    ones = (1,) * len(stride)
    kernel = weight.view(*weight.shape, *ones)
    return _convolved(basis, value, rule.output_shape, kernel, stride, (0,) * len(stride), ones, 1)


def matrix_of(basis: Basis, value: Value) -> tuple[Tensor, Tensor | None]:
    """Return the value's matrix on the state [blocks or 1, size, width] with its error."""
    if value.matrix is not None:
        return value.matrix, value.error
    eye = torch.eye(basis.width, dtype=torch.float64, device=basis.device)
    return eye[None, value.start : value.start + value.size].to(torch.complex128), None


def _dense_groups(weight: Tensor, groups: int) -> Tensor:
    """The kernel [out, in, *kernel] of a grouped convolution as that of a plain one."""
    if groups == 1:
        return weight
    out, each = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], each * groups, *weight.shape[2:])
    for g in range(groups):
        full[g * out : (g + 1) * out, g * each : (g + 1) * each] = weight[g * out : (g + 1) * out]
    return full


def _as_pick(rule: Select) -> tuple[Tensor, tuple[int, ...]] | None:
    """(source channel per output channel, -1 for none; stride) if that is all that the rule does, else None."""
    (before,), after = rule.input_shapes, rule.output_shape
    if rule.index is None or rule.fill != 0 or len(before) != len(after) or len(before) < 2:
        return None
    index, places = rule.index.view(after[0], -1), math.prod(before[1:])
    stride = tuple(-(-n // m) for n, m in zip(before[1:], after[1:], strict=True))
    grid = torch.zeros(1, dtype=torch.long, device=index.device)
    for n, m, s in zip(before[1:], after[1:], stride, strict=True):
        if s * (m - 1) >= n:
            return None
        grid = (grid[:, None] * n + torch.arange(m, device=index.device) * s).flatten()
    source = torch.where(index[:, 0] < 0, -1, index[:, 0] // places)
    expected = torch.where(source[:, None] < 0, -1, source[:, None] * places + grid)
    return (source, stride) if torch.equal(index, expected) else None
