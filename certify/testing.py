"""Checks for your own activations, operations, sets and estimators: each raises ``AssertionError`` with the point.

    certify.testing.check_activation(MyFacts(...), channels=4)
    certify.testing.check_op(MyLayer(), input_shape=(3, 8, 8))
    certify.testing.check_set(MySet(...))
    certify.testing.check_estimator(MyEstimator(), model, input_shape=(5,))
    certify.testing.check_lipschitz(model, estimate, input_shape=(5,))

A check states truths: bounds hold at corners, ends, their float neighbours and random points, with no slack but the
rounding of the check's own float64 arithmetic; affine maps and supports are attained. The message holds the claim,
by how much it is violated, and where. A check that passes is evidence from some thousand points, not a proof.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from certify.activations.base import Activation
from certify.enclosures import Interval, Relaxation
from certify.errors import UnsupportedOperation
from certify.graph import trace
from certify.lipschitz.estimate import Estimator, ask, lipschitz_constant
from certify.lipschitz.recursion import recheck
from certify.ops.base import Affine, Rule
from certify.propagate.methods import BoundMethod
from certify.registry import ESTIMATORS, lookup
from certify.results import LipschitzEstimate
from certify.sets import LpBall, PerturbationSet
from certify.specs import Spec

#: Rounding of the float64 reference, relative to 1 + the size of the values.
REFERENCE = 2.0**-36

#: Slopes and offsets of lines, broadcastable against z, with optional leading dimensions: so many lines.
Lines = tuple[Tensor, Tensor]


def check_activation(facts: Activation, channels: int = 1, *, seed: int = 0, cases: int = 200) -> None:
    """Range, slope range, lines (best, for random alpha, the fan's) and rounding error hold on random intervals.

    The reference is ``facts.forward`` in float64.

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
            r = facts.relax(z, alpha)
            _check_lines(facts, z, (r.lower_slope, r.lower_offset), (r.upper_slope, r.upper_offset))
        fan = facts.fan(z)
        _check_lines(facts, z, (fan.lower_slope, fan.lower_offset), (fan.upper_slope, fan.upper_offset))
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


def _check_lines(facts: Activation, z: Interval, lower: Lines, upper: Lines) -> None:
    """Every lower line is below f and every upper one above it, on points of z."""
    switch = facts.rounding_error(z.double())
    for s in _points(z):
        x, y = s.double(), _values(facts, s)
        low, high = (slope.double() * x + offset.double() for slope, offset in (lower, upper))
        # The lines hold for the real function; f may switch formulas (softplus), which rounding_error states.
        slack = REFERENCE * (1 + y.abs()) + switch + REFERENCE * 2.0**-14 * (low.abs() + high.abs())
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
    """Every ``margin`` must be >= 0; otherwise say where it is not: at an element of ``point``, or at one sample."""
    if not bool((margin >= 0).all()):
        worst = int(margin.nan_to_num(nan=-torch.inf).argmin())
        where = point[worst] if margin.ndim < point.ndim else point.expand_as(margin).flatten()[worst]
        shown = where.tolist() if where.numel() <= 64 else where  # torch shortens large tensors
        amount = -float(margin.flatten()[worst])
        raise AssertionError(
            f"{type(subject).__name__}: {claim} violated by {amount:.3g} at {shown!r} (element {worst})"
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


def _check_node(name: str, rule: Rule, zs: list[Interval], inputs: list[Tensor], outputs: Tensor) -> None:
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
            _require(rule, f"equality of pull_back at {name!r}", y, pad - (row - bound).abs())
        else:
            _require(rule, f"lower bound of pull_back at {name!r}", y, row - bound + pad)
    if isinstance(rule, Affine):
        _check_attained(name, rule, zs, box)


def _per_row(r: Relaxation | None) -> Relaxation | None:
    """Lines with a dimension for the rows of a sample."""
    if r is None:
        return None
    parts = (r.lower_slope, r.lower_offset, r.upper_slope, r.upper_offset)
    return Relaxation(*(part[:, None] for part in parts))


def _check_attained(name: str, rule: Affine, zs: list[Interval], box: Interval) -> None:
    """Both ends of some outputs are the values at the corners that their own coefficients choose."""
    size = box.upper[0].numel()
    for neuron, (sign, end) in itertools.product({0, size // 2, size - 1}, ((1, "upper"), (-1, "lower"))):
        one = torch.zeros_like(box.upper)
        one.flatten(1)[:, neuron] = sign
        pulled, _ = rule.pull_back(one[:, None], None)
        corner = [torch.where(a[:, 0] > 0, z.upper, z.lower) for a, z in zip(pulled, zs, strict=True)]
        reached = rule.forward(*corner).flatten(1)[:, neuron]
        gap = (getattr(box, end).flatten(1)[:, neuron] - reached).abs()
        _require(rule, f"attained {end} end at {name!r}", corner[0], REFERENCE * (1 + reached.abs()) - gap)


def check_set(domain: PerturbationSet, *, seed: int = 0) -> None:
    """Support, steepest, project, sample, contains and interval of a set agree with each other."""
    generator = torch.Generator().manual_seed(seed)
    hull = domain.interval()
    noise = torch.randn((20, *domain.center.shape), dtype=torch.float64, generator=generator)
    directions = list(noise.to(domain.center))
    points = [domain.center, *domain.sample(20, generator)]
    points += [x for a in directions for x in (domain.steepest(a), domain.project(domain.center + a))]
    for x in points:
        _require(domain, "membership of a projected or sampled point", x, domain.contains(x).double() - 1)
        _require(domain, "interval", x, torch.minimum(x - hull.lower, hull.upper - x))
        moved = (domain.project(x) - x).abs()
        _require(domain, "projection of a point of the set", x, 1e-5 * (1e-2 + hull.width) - moved)
    for a in directions:
        support, best = domain.support(a), domain.steepest(a)
        parts = (a.double() * best.double()).flatten(1)
        slack = 1e-5 * (1e-2 + parts.abs().sum(1))
        _require(domain, "support attained by steepest along", a, parts.sum(1) - support + slack)
        for x in points:
            value = (a.double() * x.double()).flatten(1).sum(1)
            _require(domain, "support", x, support - value + 2.0**-45 * (1e-300 + parts.abs().sum(1)))


def check_estimator(
    estimator: str | Estimator, model: nn.Module, input_shape: tuple[int, ...], *, seed: int = 0, count: int = 30
) -> None:
    """Upper estimates are not below, and lower ones not above, what is met in ``model``.

    Met are Jacobian norms at random points and difference quotients between random pairs. A lower estimate must
    not exceed the product bound, nor the Jacobian's norm if the model is affine; an "estimate" claims nothing.
    Asked for p = 2 and inf, on the whole space and on balls, for the outputs and for every output alone; a question
    may be refused by ``UnsupportedOperation``, but not all of them.
    """
    chosen = lookup("method", ESTIMATORS, estimator)() if isinstance(estimator, str) else estimator
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).double().eval()
    center = torch.randn((2, *input_shape), dtype=torch.float64, generator=generator)
    graph = trace(model, center)
    outputs = torch.Size(graph.shape(graph.output)).numel()
    single = Spec(torch.eye(outputs, dtype=torch.float64).expand(2, -1, -1), torch.zeros(2, outputs).double())
    answers = 0
    for p, local, spec in itertools.product((2.0, torch.inf), (False, True), (None, single)):
        domain = LpBall(center, 0.3, p=p) if local else None
        try:
            found, product = (
                lipschitz_constant(model, p=p, domain=domain, spec=spec, method=method, input_shape=input_shape)
                for method in (chosen, "product")
            )
        except UnsupportedOperation:
            continue
        answers += 1
        values, above = (torch.tensor(e.rows or ((e.value,),) * 2, dtype=torch.float64) for e in (found, product))
        slack = 2.0**-26 * (1 + values)  # quotients over short steps round
        claim = f"{found.side} value, p={p:g}, domain {domain and type(domain).__name__}, rows {spec is not None}: "
        for _ in range(count):
            x, y = _pair(center, domain, generator)
            slope, quotient = _slopes(model, x, y, p, single=spec is not None)
            if found.side == "upper":
                _require(chosen, claim + "Jacobian", x, (values - slope + slack).amin(1))
                _require(chosen, claim + "difference quotient", x, (values - quotient + slack).amin(1))
            if found.side == "lower" and all(node.rule.affine for node in graph.nodes.values()):
                _require(chosen, claim + "Jacobian of an affine model", x, (slope - values + slack).amin(1))
        if found.side == "lower":
            _require(chosen, claim + "product bound", center, (above - values + slack).amin(1))
    if not answers:
        raise AssertionError(f"{type(chosen).__name__}: refuses every question about this model")


def _pair(center: Tensor, domain: PerturbationSet | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two points of the domain (of a neighbourhood of ``center`` without one), from near to far."""
    noise = torch.randn((2, *center.shape), dtype=torch.float64, generator=generator)
    step = 10 ** (-3 * torch.rand((), dtype=torch.float64, generator=generator))
    x = center + noise[0] if domain is None else domain.sample(1, generator)[0]
    y = x + step * noise[1]
    return x, y if domain is None else domain.project(y)


def _slopes(model: nn.Module, x: Tensor, y: Tensor, p: float, *, single: bool) -> tuple[Tensor, Tensor]:
    """Norm of the Jacobian at x and difference quotient from x to y, [batch, 1], or [batch, outputs] if ``single``."""
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x).flatten(1).sum(0), x).flatten(2).transpose(0, 1)
    with torch.no_grad():
        change = (model(x) - model(y)).flatten(1)
    run = torch.linalg.vector_norm((x - y).flatten(1), ord=p, dim=1)[:, None]
    if single:
        return torch.linalg.vector_norm(jacobian, ord=2 if p == 2 else 1, dim=2), change.abs() / run
    rise = torch.linalg.vector_norm(change, ord=p, dim=1)[:, None]
    return torch.linalg.matrix_norm(jacobian, ord=p)[:, None], rise / run


def check_lipschitz(
    model: nn.Module,
    estimate: LipschitzEstimate,
    *,
    domain: PerturbationSet | None = None,
    spec: Spec | None = None,
    input_shape: tuple[int, ...] | None = None,
    intervals: str | BoundMethod = "crown",
) -> None:
    """The multipliers of an estimate certify its values: evaluated anew in float64, rounding counted.

    ``domain``, ``spec``, ``input_shape`` and ``intervals`` are those it was made with. Raises ``InvalidInput`` for
    multipliers that do not belong to the question, and ``AssertionError`` where a value is not certified.
    """
    question = ask(model, p=estimate.p, domain=domain, spec=spec, input_shape=input_shape)
    found = recheck(question, estimate.multipliers, intervals)
    if not max(found) <= estimate.value:
        raise AssertionError(f"the multipliers certify {max(found):.12g}, not {estimate.value:.12g}")
