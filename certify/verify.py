"""Ending questions: ``prove`` a claim or find its counterexample; ``certified_radius``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from certify.bounding import check_spec, outputs_at, prepare
from certify.enclosures import Interval
from certify.errors import InvalidInput, InvalidModel
from certify.graph import Graph
from certify.propagate.methods import BoundMethod, resolve_method
from certify.results import Certificate, Verdict
from certify.rounding import EXCLUSIONS, Arithmetic, FloatAnyOrder, ieee, resolve_arithmetic
from certify.sets import Clip, LpBall, PerturbationSet
from certify.shapes import beside
from certify.specs import Spec, class_margins

if TYPE_CHECKING:
    from certify.attacks import Attack


@ieee()
def prove(
    model: nn.Module,
    domain: PerturbationSet,
    spec: Spec,
    method: str | BoundMethod = "crown",
    *,
    attack: Attack | None = None,
    arithmetic: str = "float",
) -> Certificate:
    """Decide C model(x) + d > 0 for every x of the domain, sample by sample.

    HOLDS needs every lower bound > 0; VIOLATED needs a point of the domain, replayed through the model, with a row
    < 0 (the centre is tried first, so a misclassified input is its own witness; then ``attack``); 0 and NaN are
    UNKNOWN. ``method`` and ``arithmetic`` are those of ``bounds``.
    Raises ``InvalidModel``, ``UnsupportedOperation`` or ``InvalidInput``.
    """
    start = time.perf_counter()
    chosen = resolve_method(method)
    graph = prepare(model, domain)
    spec = check_spec(graph, domain, spec)
    semantics = resolve_arithmetic(arithmetic, graph.dtype)
    witness, upper = _falsify(model, domain, spec, attack)
    broken = (upper < 0).any(1)
    lower = torch.full_like(upper, -torch.inf)
    todo = (~broken).nonzero()[:, 0]
    if len(todo):
        lower[todo] = _lower_bounds(graph, chosen, domain.take(todo), spec.take(todo), semantics)
    holds = (lower > 0).all(1) & ~broken
    verdicts = [
        Verdict.VIOLATED if bad else Verdict.HOLDS if good else Verdict.UNKNOWN
        for bad, good in zip(broken.tolist(), holds.tolist(), strict=True)
    ]
    points = torch.where(beside(broken, witness), witness, torch.nan)
    return Certificate(
        verdicts,
        Interval(lower, upper),
        points,
        chosen.name,
        semantics.name,
        time.perf_counter() - start,
        EXCLUSIONS if isinstance(semantics, FloatAnyOrder) else (),
    )


@ieee()
def certified_radius(
    model: nn.Module,
    x: Float[Tensor, "batch *shape"],
    labels: Int[Tensor, "batch"],
    p: float = torch.inf,
    method: str | BoundMethod = "crown",
    *,
    clip: Clip | None = None,
    arithmetic: str = "float",
    steps: int = 14,
) -> Tensor:
    """Return, per sample, a radius [batch] (float64) at which ``prove`` succeeded; 0 for misclassified samples.

    The radius is doubled from 1e-3 while the proof succeeds, then bisected ``steps`` times: a verdict need not be
    monotone in the radius, so this is the largest radius tried that was proved, not a supremum.
    """
    probe = LpBall(x, 0.0, p=p, clip=clip)
    graph = prepare(model, probe)
    spec = check_spec(graph, probe, class_margins(labels, torch.Size(graph.shape(graph.output)).numel(), x.dtype))
    chosen, semantics = resolve_method(method), resolve_arithmetic(arithmetic, graph.dtype)

    def proved(radius: Tensor, index: Tensor) -> Tensor:
        ball = LpBall(x[index], radius, p=p, clip=clip)
        return (_lower_bounds(graph, chosen, ball, spec.take(index), semantics) > 0).all(1)

    rows = spec.rows(outputs_at(model, x))
    active = (rows > 0).all(1).nonzero()[:, 0]
    low = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    high = torch.full_like(low, 1e-3)
    growing = active
    for _ in range(20):
        if len(growing) == 0:
            break
        good = proved(high[growing], growing)
        growing = growing[good]
        low[growing] = high[growing]
        high[growing] *= 2
    for _ in range(steps):
        if len(active) == 0:
            break
        middle = (low[active] + high[active]) / 2
        good = proved(middle, active)
        low[active] = torch.where(good, middle, low[active])
        high[active] = torch.where(good, high[active], middle)
    return low


def _lower_bounds(
    graph: Graph, method: BoundMethod, domain: PerturbationSet, spec: Spec, arithmetic: Arithmetic
) -> Tensor:
    """The lower bounds [batch, rows] of a method, without gradients."""
    with torch.no_grad():
        return method.bound(graph, domain, spec, arithmetic)


def _falsify(model: nn.Module, domain: PerturbationSet, spec: Spec, attack: Attack | None) -> tuple[Tensor, Tensor]:
    """The worst point met per sample and the rows there: the centre, then the attack's witness."""
    outputs = outputs_at(model, domain.center)
    if not bool(torch.isfinite(outputs).all()):
        raise InvalidModel("the model's outputs hold NaN or infinities", "finite outputs", "check weights and inputs")
    witness, upper = domain.center, _certain(spec, outputs)
    if attack is not None:
        if not callable(attack):
            raise InvalidInput(f"attack {attack!r}", "an attack such as certify.attacks.PGD()")
        open_ = (upper >= 0).all(1).nonzero()[:, 0]
        if len(open_):
            found = attack(model, domain.take(open_), spec.take(open_))
            rows = _certain(spec.take(open_), outputs_at(model, found.witness))
            better = (rows.amin(1) < upper[open_].amin(1)) & domain.take(open_).contains(found.witness)
            chosen = open_[better]
            witness, upper = witness.clone(), upper.clone()
            witness[chosen], upper[chosen] = found.witness[better], rows[better]
    return witness, upper


def _certain(spec: Spec, outputs: Tensor) -> Tensor:
    """The rows at ``outputs``, rounded upward: what is below 0 here is below 0 in real arithmetic on the outputs."""
    y = outputs.double().flatten(1)
    size = torch.einsum("bro,bo->br", spec.C.double().abs(), y.abs()) + spec.d.double().abs()
    return spec.rows(outputs) + size * ((y.shape[1] + 4) * 2.0**-53)
