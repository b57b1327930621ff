"""Checks that you can run on your own activations, operations and sets; each raises ``AssertionError`` with the point.

    certify.testing.check_activation(MyFacts(...), channels=4)
    certify.testing.check_op(MyLayer(), input_shape=(3, 8, 8))
    certify.testing.check_set(MySet(...))

A check states truths: bounds hold at corners, ends, their float neighbours and random points, with no slack but the
rounding of the check's own float64 arithmetic; affine maps and supports are attained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certify.activations.base import Activation
from certify.enclosures import Interval, Relaxation
from certify.graph import trace
from certify.sets import PerturbationSet

#: Rounding of the float64 reference, relative to 1 + the size of the values.
REFERENCE = 2.0**-36


def check_activation(facts: Activation, channels: int = 1, *, seed: int = 0, cases: int = 200) -> None:
    """Range, slope range, lines (best and for random alpha) and rounding error of ``facts`` hold on random intervals.

    Intervals have centres up to 300 and widths from 1e-5 to 1000, in both dtypes; ``channels`` is the count that the
    facts expect (dimension 1), 1 for any.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(cases, max(channels, 2), 1, dtype=torch.float64, generator=generator)

    sign = torch.where(draw(-1, 1) > 0, 1.0, -1.0)
    center, half = sign * 10 ** draw(-2, 2.5), 10 ** draw(-5, 3)
    if channels == 1:
        center, half = center[:, :1], half[:, :1]
    for dtype in (torch.float32, torch.float64):
        z = Interval((center - half).to(dtype), (center + half).to(dtype))
        shape = z.lower.shape
        alphas = [torch.rand(3, *shape, dtype=dtype, generator=generator) for _ in range(2)]
        for alpha in (None, (alphas[0], alphas[1])):
            _check_lines(facts, z, alpha)
        _check_range(facts, z)


def _points(z: Interval) -> Tensor:
    """Points of z in its dtype: even, near the ends, near 0."""
    low, high = z.lower.double(), z.upper.double()
    t = torch.linspace(0, 1, 301, dtype=torch.float64).view(-1, 1, 1, 1)
    middle = torch.sinh(12 * t - 6) / 40 + 0 * low
    points = torch.cat([low + (high - low) * t, middle, low * (1 - t**6) + high * t**6])
    points = torch.minimum(torch.maximum(points, low), high).to(z.lower.dtype)
    neighbours = [torch.nextafter(z.lower, z.upper)[None], torch.nextafter(z.upper, z.lower)[None]]
    return torch.cat([torch.minimum(torch.maximum(points, z.lower), z.upper), *neighbours])


def _check_lines(facts: Activation, z: Interval, alpha: tuple[Tensor, Tensor] | None) -> None:
    relaxation, switch = facts.relax(z, alpha), facts.rounding_error(z.double())
    for s in _points(z):
        x, y = s.double(), _values(facts, s)
        # The lines hold for the real function; f may switch formulas (softplus), which rounding_error states.
        slack = REFERENCE * (1 + y.abs()) + switch
        low = relaxation.lower_slope.double() * x + relaxation.lower_offset.double()
        high = relaxation.upper_slope.double() * x + relaxation.upper_offset.double()
        slack = slack + REFERENCE * 2.0**-14 * (low.abs() + high.abs())
        _require(facts, "lower line", s, y - low + slack)
        _require(facts, "upper line", s, high - y + slack)


def _check_range(facts: Activation, z: Interval) -> None:
    bounds, slopes, error = facts.range(z), facts.slope_range(z), facts.rounding_error(z)
    switch = facts.rounding_error(z.double())
    points = _points(z)
    previous = None
    for s in points:
        y = _values(facts, s)
        slack = REFERENCE * (1 + y.abs()) + switch
        _require(facts, "range, lower end", s, y - bounds.lower.double() + slack)
        _require(facts, "range, upper end", s, bounds.upper.double() - y + slack)
        _require(facts, "rounding error", s, error.double() - (facts.forward(s).double() - y).abs() + slack)
        if previous is not None:
            run, rise = s.double() - previous[0].double(), y - previous[1]
            sign = torch.where(run < 0, -1.0, 1.0)
            low, high = slopes.lower.double() * run.abs(), slopes.upper.double() * run.abs()
            _require(facts, "slope range, lower end", s, rise * sign - low + 2 * slack)
            _require(facts, "slope range, upper end", s, high - rise * sign + 2 * slack)
        previous = s, y


def _values(facts: Activation, s: Tensor) -> Tensor:
    return facts.forward(s.double())


def _require(subject: object, claim: str, point: Tensor, margin: Tensor) -> None:
    """Every ``margin`` must be >= 0; otherwise say where it is not."""
    if not bool((margin >= 0).all()):
        worst = int(margin.nan_to_num(nan=-torch.inf).argmin())
        value = point.expand_as(margin).flatten()[worst]
        raise AssertionError(
            f"{type(subject).__name__}: {claim} violated by {-float(margin.flatten()[worst]):.3g} "
            f"at {float(value)!r} (element {worst})"
        )


def check_op(model: nn.Module, input_shape: tuple[int, ...], *, seed: int = 0) -> None:
    """Every rule of the traced model holds, in float64, on random boxes around random points.

    Intervals enclose; of affine rules the interval is attained and ``pull_back`` is an equality; of the others
    ``pull_back`` bounds from below, for coefficients of both signs.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    x = torch.randn((3, *input_shape), dtype=torch.float64, generator=generator)
    graph = trace(model, x)
    with torch.no_grad():
        samples = [x + torch.rand(x.shape, dtype=x.dtype, generator=generator) * 2 - 1 for _ in range(40)]
        values = [graph.forward(sample) for sample in samples]
        for node in graph.nodes.values():
            inputs = [torch.stack([v[name] for v in values]) for name in node.inputs]
            zs = [Interval(part.amin(0), part.amax(0)) for part in inputs]
            outputs = torch.stack([v[node.name] for v in values])
            _check_node(node.name, node.rule, zs, inputs, outputs)


def _check_node(name: str, rule: object, zs: list[Interval], inputs: list[Tensor], outputs: Tensor) -> None:
    from certify.ops.base import Rule

    assert isinstance(rule, Rule)
    box = rule.interval(*zs)
    slack = REFERENCE * (1 + outputs.abs().amax(0))
    for y in outputs:
        _require(rule, f"interval at {name!r}", y, torch.minimum(y - box.lower, box.upper - y) + slack)
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(outputs.shape[1:], dtype=outputs.dtype, generator=generator)
    lines = _per_row(rule.relax(*zs))
    pulled, constant = rule.pull_back(A[:, None], lines)
    rest = (A * rule.forward(*(torch.zeros_like(z.lower) for z in zs))).flatten(1).sum(1) if rule.affine else 0
    for k, y in enumerate(outputs):
        row = (A * y).flatten(1).sum(1)
        bound: Tensor | float = sum(
            (part[:, 0] * x[k]).flatten(1).sum(1) for part, x in zip(pulled, inputs, strict=True)
        )
        bound = bound + (rest if constant is None else constant[:, 0])
        pad = REFERENCE * (1 + (A * y).abs().flatten(1).sum(1))
        if rule.affine:
            _require(rule, f"equality of pull_back at {name!r}", row, pad - (row - bound).abs())
        else:
            _require(rule, f"lower bound of pull_back at {name!r}", row, row - bound + pad)
    if rule.affine:
        _check_attained(name, rule, zs, box)


def _per_row(r: Relaxation | None) -> Relaxation | None:
    """Lines with a dimension for the rows of a sample."""
    if r is None:
        return None
    parts = (r.lower_slope, r.lower_offset, r.upper_slope, r.upper_offset)
    return Relaxation(*(part[:, None] for part in parts))


def _check_attained(name: str, rule: object, zs: list[Interval], box: Interval) -> None:
    """The upper end of one output per sample is the value at the corner that its own coefficients choose."""
    from certify.ops.base import Affine

    assert isinstance(rule, Affine)
    flat = box.upper.flatten(1)
    for neuron in {0, flat.shape[1] // 2, flat.shape[1] - 1}:
        one = torch.zeros_like(flat)
        one[:, neuron] = 1
        pulled, _ = rule.pull_back(one.view_as(box.upper)[:, None], None)
        corner = [torch.where(a[:, 0] > 0, z.upper, z.lower) for a, z in zip(pulled, zs, strict=True)]
        reached = rule.forward(*corner).flatten(1)[:, neuron]
        gap = (flat[:, neuron] - reached).abs()
        _require(rule, f"attained upper end at {name!r}", gap, REFERENCE * (1 + reached.abs()) - gap)


def check_set(domain: PerturbationSet, *, seed: int = 0) -> None:
    """Support, steepest, project, sample, contains and interval of a set agree with each other."""
    generator = torch.Generator().manual_seed(seed)
    hull = domain.interval()
    points = list(domain.sample(20, generator))
    for _ in range(20):
        a = torch.randn(domain.center.shape, dtype=torch.float64, generator=generator).to(domain.center)
        support, best = domain.support(a), domain.steepest(a)
        reached = (a.double() * best.double()).flatten(1).sum(1)
        size = (a.double() * best.double()).abs().flatten(1).sum(1)
        _require(domain, "support attained by steepest", reached, reached - support + 1e-5 * (1e-2 + size))
        points += [best, domain.project(domain.center + a)]
        for x in points:
            value = (a.double() * x.double()).flatten(1).sum(1)
            _require(domain, "support", value, support - value + 2.0**-45 * (1e-300 + size))
    for x in [*points, domain.center]:
        if not bool(domain.contains(x).all()):
            raise AssertionError(f"{type(domain).__name__}: a projected or sampled point is not contained")
        _require(domain, "interval", x, torch.minimum(x - hull.lower, hull.upper - x))
        moved = (domain.project(x) - x).abs()
        _require(domain, "projection of a point of the set", x, 1e-5 * (1e-2 + hull.width) - moved)
