"""Lower bounds: the largest Jacobian norm that a multi-start ascent meets.

A Jacobian at a differentiable point of the domain is a limit of difference quotients, so no Lipschitz constant lies
below its norm. Values extrapolated from samples are estimates: see clever.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from certify.errors import InvalidInput
from certify.graph import INPUT
from certify.lipschitz.estimate import Question
from certify.lipschitz.power import attained
from certify.registry import register_estimator
from certify.results import LipschitzEstimate
from certify.sets import PerturbationSet
from certify.shapes import beside
from certify.specs import Spec

#: Points are drawn back by this share towards their random start: off kinks and off the faces of the domain.
_INWARD = 1e-6


@register_estimator("jacobian")
@dataclass(frozen=True, kw_only=True)
class JacobianAscent:
    """A lower bound of the Lipschitz constant: a norm of the Jacobian, or of a spec row's gradient, actually met.

    ``starts`` random points per sample (from the domain, or normal ones of several sizes without one) climb for
    ``steps`` rounds along the norm's own gradient, or along its top input direction where that is 0 (piecewise
    linear networks), and by random moves; a move that does not help is undone and made smaller. Memory and time
    grow with the number of outputs. ``generator`` None means a fixed seed.
    """

    starts: int = 16
    steps: int = 30
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.starts < 1 or self.steps < 0:
            raise InvalidInput(f"starts={self.starts}, steps={self.steps}", "starts >= 1, steps >= 0")

    def estimate(self, question: Question) -> LipschitzEstimate:
        """Return the bound, side "lower"; ``rows`` are the best gradients met per sample.

        ``layers`` are lower bounds of the constants of the single nodes (see power.py), as those of "product" are
        upper ones.
        """
        generator = self.generator if self.generator is not None else torch.Generator().manual_seed(0)
        domain, spec, graph = question.domain, question.spec, question.graph
        x = _starts(question, self.starts, generator)
        climb = _Climb(graph.model, x, domain, question.p, claims(spec, len(x), self.starts, domain))
        for step in range(self.steps):
            climb.step(generator, follow=step % 3 != 2)
        layers = _layers(question, climb.x)
        best = climb.best.view(-1, self.starts, climb.best.shape[1]).amax(1)
        if spec is None:
            return LipschitzEstimate(float(best.max()), "lower", "jacobian", question.p, layers)
        best = best if domain is not None else best.amax(0).view(spec.batch, -1)
        rows = tuple(tuple(row) for row in best.tolist())
        return LipschitzEstimate(float(best.max()), "lower", "jacobian", question.p, layers, rows)


class _Climb:
    """Points [n, *shape] that climb side by side; ``best`` [n, quantities] are the norms met so far."""

    def __init__(self, model: nn.Module, x: Tensor, domain: PerturbationSet | None, p: float, C: Tensor | None) -> None:
        self.model, self.p, self.C = model, p, C
        self.origin, self.x = x, x
        self.domain = None if domain is None else domain.take(_owners(domain.batch, len(x)).to(x.device))
        spread = x.std().clamp(min=1e-3) if domain is None else _half_width(self.domain)
        self.reach = spread * torch.ones(len(x), dtype=x.dtype, device=x.device)
        self.norms, self.direction = self._norms(x)
        self.best = self.norms

    def step(self, generator: torch.Generator, *, follow: bool) -> None:
        """Move every point, keep the moves that raise its largest norm, shorten the others."""
        noise = torch.randn(self.x.shape, generator=generator, dtype=torch.float64, device=generator.device)
        direction = self.direction if follow else noise.to(self.x.device)
        length = direction.flatten(1).abs().amax(1).clamp(min=1e-300)
        trial = self.x + direction * beside(self.reach / length, self.x)
        if self.domain is not None:
            trial = self.domain.project(trial)
        trial = trial + _INWARD * (self.origin - trial)
        norms, directions = self._norms(trial)
        self.best = torch.fmax(self.best, norms)
        better = norms.amax(1) > self.norms.amax(1)
        self.x = torch.where(beside(better, trial), trial, self.x)
        self.norms = torch.where(better[:, None], norms, self.norms)
        self.direction = torch.where(beside(better, trial), directions, -self.direction)
        self.reach = torch.where(better, self.reach, self.reach * 0.7)

    def _norms(self, x: Tensor) -> tuple[Float64[Tensor, "n quantities"], Tensor]:
        """The norms at x, and a direction in which the largest one may grow."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            slopes = jacobian(self.model, x, self.C)
            norms = jacobian_norms(slopes, self.p, rows=self.C is not None)
            top = norms.amax(1).sum()
            uphill = _derivative(top, x)
        slopes = slopes.detach()
        strongest = slopes[torch.arange(len(x)), slopes.abs().sum(2).argmax(1)].view_as(x)
        uphill = torch.zeros_like(x) if uphill is None else uphill.nan_to_num(nan=0.0)
        flat = (uphill == 0).flatten(1).all(1)
        return norms.detach().nan_to_num(nan=0.0), torch.where(beside(flat, x), strongest, uphill)


def _derivative(top: Tensor, x: Tensor) -> Tensor | None:
    """The derivative of ``top``, one of a derivative itself; None where there is none, in mathematics or in torch."""
    if not top.requires_grad:
        return None
    try:
        return torch.autograd.grad(top, x, allow_unused=True)[0]
    except RuntimeError as error:
        if "is not implemented" in str(error):  # the second derivative of torch's hardsigmoid
            return None
        raise


def jacobian(
    model: nn.Module, x: Float64[Tensor, "n *shape"], C: Float64[Tensor, "n rows outputs"] | None
) -> Float64[Tensor, "n rows features"]:
    """Return the Jacobian of the outputs at every x, or of the rows C of a spec; differentiable in x."""
    y = model(x).flatten(1)
    y = y if C is None else torch.einsum("nro,no->nr", C, y)
    rows = []
    for i in range(y.shape[1]):
        (row,) = torch.autograd.grad(y[:, i].sum(), x, create_graph=True)
        rows.append(row.flatten(1))
    return torch.stack(rows, 1)


def jacobian_norms(
    slopes: Float64[Tensor, "n rows features"], p: float, *, rows: bool
) -> Float64[Tensor, "n quantities"]:
    """Return the constants of every Jacobian: of its rows, or the one of the whole output."""
    if rows:
        return torch.linalg.vector_norm(slopes, ord=2 if p == 2 else 1, dim=2)
    if p == 2:
        return torch.linalg.matrix_norm(slopes, ord=2)[:, None]
    return slopes.abs().sum(2).amax(1, keepdim=True)


def _layers(question: Question, x: Tensor) -> dict[str, float]:
    """What the nodes of one input attain: on the domain at the values that x gives, else anywhere."""
    graph = question.graph
    with torch.no_grad():
        values = None if question.domain is None else {INPUT: x, **graph.forward(x)}
        return {
            name: attained(graph, node, question.p, None if values is None else values[node.inputs[0]])
            for name, node in graph.nodes.items()
            if len(node.inputs) == 1
        }


def _starts(question: Question, n: int, generator: torch.Generator) -> Float64[Tensor, "n *shape"]:
    """Random points, those of one sample together."""
    graph, domain = question.graph, question.domain
    if domain is not None:
        return domain.sample(n, generator).transpose(0, 1).flatten(0, 1).to(graph.device)
    draws = torch.randn((n, *graph.input_shape), generator=generator, dtype=torch.float64, device=generator.device)
    sizes = torch.tensor([0.1, 0.3, 1.0, 3.0], dtype=torch.float64).repeat(n // 4 + 1)[:n]
    return (draws * beside(sizes.to(draws.device), draws)).to(graph.device)


def claims(spec: Spec | None, points: int, starts: int, domain: PerturbationSet | None) -> Tensor | None:
    """C per point: its own sample's rows with a domain, the rows of all samples without."""
    if spec is None:
        return None
    if domain is not None:
        return spec.C.repeat_interleave(starts, 0)
    return spec.C.flatten(0, 1).expand(points, -1, -1)


def _owners(batch: int, points: int) -> Tensor:
    return torch.arange(batch).repeat_interleave(points // batch)


def _half_width(domain: PerturbationSet | None) -> Tensor:
    assert domain is not None
    return (domain.hull.width / 2).flatten(1).amax(1)
