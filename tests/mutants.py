"""Planted bugs of bound code: each replaces one attribute, and must be killed by the check beside it.

A mutant is (name, object, attribute, replacement maker, check). The check passes on the real code and raises
``AssertionError`` under the mutant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from strategies import convolutional, dense, inputs
from torch import nn
from zero_slack import check_bounds

import certify
import models
from certify import rounding, sets
from certify.activations import enclose, piecewise
from certify.enclosures import Interval, Relaxation
from certify.ops import arithmetic, base, conv, linear, pool
from certify.propagate import backward, methods, state
from certify.testing import check_activation, check_op, check_set


@dataclass(frozen=True)
class Mutant:
    """One planted bug: ``make(original)`` replaces ``target.attribute``; ``check`` must notice."""

    name: str
    target: Any
    attribute: str
    make: Callable[[Any], Any]
    check: Callable[[], None]


def _sound(model: nn.Module, shape: tuple[int, ...], radius: float = 0.05) -> Callable[[], None]:
    """Zero-slack soundness of a network, all methods."""

    def check() -> None:
        tally = check_bounds(model, certify.LpBall(inputs(shape), radius, clip=(0.0, 1.0)), count=4)
        assert tally.violations == 0, tally.examples[:3]

    return check


def _rounding_matters() -> None:
    """At radius 0 only the rounding terms separate the bounds from the network's own executions."""
    for radius in (0.0, 1e-9):
        _sound(dense("relu", (40, 60, 60, 4), seed=1), (40,), radius)()
        _sound(convolutional("relu", seed=1), (2, 5, 5), radius)()


def _affine_is_attained() -> None:
    check_op(nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 4)), (2, 6, 6))


def _max_pool() -> None:
    check_op(nn.Sequential(nn.MaxPool2d(3, 2, 1)), (2, 7, 7))


def _batch_norm() -> None:
    norm = nn.BatchNorm2d(2)
    norm.running_var.copy_(torch.tensor([0.1, 4.0]))
    check_op(nn.Sequential(norm), (2, 3, 3))


def _l2_and_l1_balls() -> None:
    for p in (1, 2):
        for clip in (None, (0.0, 1.0)):
            check_set(certify.LpBall(torch.rand(3, 5), 0.4, p=p, clip=clip))


def _relu_facts() -> None:
    check_activation(piecewise.ReLU((0.0,), (0.0, 1.0)))


def _kaf_facts() -> None:
    torch.manual_seed(0)
    check_activation(models.KAFFacts(models.KAF(4, init="elu").eval(), None, 2), 4, cases=60)


def _verdicts() -> None:
    model = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        model.weight.zero_()
    claim = certify.class_margins(torch.tensor([0]), 2)
    found = certify.prove(model, certify.LpBall(torch.rand(1, 2), 0.1), claim, arithmetic="real")
    assert found.verdicts == [certify.Verdict.UNKNOWN]


def _swapped(relaxation: Relaxation) -> Relaxation:
    r = relaxation
    return Relaxation(r.upper_slope, r.upper_offset, r.lower_slope, r.lower_offset)


def _nothing(*_: Any, **__: Any) -> None:
    return None


DENSE, CONV = _sound(dense("relu", seed=2), (6,)), _sound(convolutional("relu", seed=2), (2, 5, 5))

MUTANTS = [
    Mutant("rows take the wrong line", base.Elementwise, "pull_back",
           lambda real: lambda self, A, r: real(self, A, _swapped(r)), DENSE),
    Mutant("missing |W| in dense intervals", linear.Linear, "absolute", lambda _: linear.Linear.linear, DENSE),
    Mutant("missing |W| in convolution intervals", conv.Conv, "absolute", lambda _: conv.Conv.linear, CONV),
    Mutant("forgotten bias in pull_back", base.Affine, "pull_back",
           lambda real: lambda self, A, r: (real(self, A, r)[0], None), _affine_is_attained),
    Mutant("transposed weight misread", linear.Linear, "transpose",
           lambda real: lambda self, A: (-real(self, A)[0],), _affine_is_attained),
    Mutant("kernel written into the wrong place", conv.Conv, "rows",
           lambda real: lambda self, n, shape: (real(self, n, shape)[0].roll(1, -1),), CONV),
    Mutant("a fork overwritten instead of added", backward.Rows, "add",
           lambda _: lambda self, name, A: self.pending.__setitem__(name, A), CONV),
    Mutant("second operand of a difference keeps its sign", arithmetic.Sum, "transpose",
           lambda _: lambda self, A: (A, A),
           lambda: check_op(_Difference(), (5,))),
    Mutant("max-pool lines swapped", pool.MaxPool, "pull_back",
           lambda real: lambda self, A, r: real(self, A, _swapped(r)), _max_pool),
    Mutant("max-pool forgets overlapping windows", pool.MaxPool, "interval",
           lambda _: lambda self, z: Interval(self.run(z.lower), self.run(z.lower)), _max_pool),
    Mutant("batch norm pulled back without its scale", arithmetic.Scale, "transpose",
           lambda _: lambda self, A: (A,), _batch_norm),
    Mutant("l2 support forgets the radius", sets, "_l2_dual", lambda real: lambda m, c, r: 0.9 * real(m, c, r),
           _l2_and_l1_balls),
    Mutant("l1 support with the wrong dual", sets, "_l1_dual", lambda real: lambda m, c, r: 0.9 * real(m, c, r),
           _l2_and_l1_balls),
    Mutant("box support by the centre alone", sets, "_box_support",
           lambda real: lambda a, hull, sign=1.0: real(a, Interval(hull.lower, hull.lower), sign), DENSE),
    Mutant("no sag between grid points", enclose._Cells, "ceiling",
           lambda _: lambda self, a: torch.maximum(self.fp - a * self.p, self.fq - a * self.q), _kaf_facts),
    Mutant("lines through the ends only", piecewise.PiecewiseLinear, "_vertices",
           lambda real: lambda self, z: tuple(part[[0, -1]] for part in real(self, z)), _relu_facts),
    Mutant("offsets not rounded outward", piecewise, "outward",
           lambda _: lambda dtype, low, up: Relaxation(*(part.to(dtype) for part in (*low, *up))),
           lambda: _chords_are_above()),
    Mutant("no rounding error of affine layers", base.Affine, "rounding_error",
           lambda _: _nothing, _rounding_matters),
    Mutant("intervals not widened for the float network", state.Knowledge, "forward_interval",
           lambda _: lambda self, node: node.rule.interval(*self.inputs(node)), _rounding_matters),
    Mutant("rows lose nothing to rounding", backward.Rows, "lose", lambda _: _nothing, lambda: _rows_alone()),
    Mutant("directed rounding to nearest", rounding, "round_down", lambda _: lambda x, dtype: x.to(dtype),
           lambda: _round_down_is_below()),
    Mutant("only half of the rows are negated", backward.Rows, "halve",
           lambda real: lambda self: (real(self), setattr(self, "offset", self.offset.abs()))[0], DENSE),
    Mutant("ties count as proofs", methods.Propagation, "bound",
           lambda real: lambda self, *a: Interval(real(self, *a).lower + 1e-6, real(self, *a).upper), _verdicts),
]  # fmt: skip


class _Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) - self.b(x)


def _chords_are_above() -> None:
    """In exact arithmetic, at both ends of many float32 intervals."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(0)
    z = Interval(-torch.rand(1, 300, generator=generator), torch.rand(1, 300, generator=generator))
    r = piecewise.ReLU((0.0,), (0.0, 1.0)).relax(z)
    columns = (z.lower[0], z.upper[0], r.upper_slope[0], r.upper_offset[0])
    for low, high, slope, offset in zip(*(column.tolist() for column in columns), strict=True):
        for end in (low, high):
            assert Fraction(slope) * Fraction(end) + Fraction(offset) >= max(Fraction(end), 0)


def _rows_alone() -> None:
    """CROWN rows at radius 0, without the help of interval bounds, against the network's own value."""
    model, x = dense("relu", (40, 60, 60, 4), seed=1), inputs((40,), 8)
    domain = certify.LpBall(x, 0.0)
    graph = certify.graph.trace(model, x)
    eye = torch.eye(4).expand(8, -1, -1)
    with torch.no_grad():
        knowledge = certify.CROWN().learn(graph, domain, rounding.FloatAnyOrder(torch.float32))
        found = methods.spec_rows(knowledge, certify.Spec(eye, torch.zeros(8, 4)), relax=True)
        for y in (model(x), torch.cat([model(part) for part in x.split(1)])):
            assert bool(((found.lower <= y.double()) & (y.double() <= found.upper)).all())


def _round_down_is_below() -> None:
    x = torch.rand(1000, dtype=torch.float64)
    assert bool((rounding.round_down(x, torch.float32).double() <= x).all())
