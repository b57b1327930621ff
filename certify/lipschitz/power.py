"""Lower bounds of the constants of single nodes, each attained: the other end of every layer's bracket."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from certify.enclosures import Interval
from certify.graph import Graph, Node
from certify.ops.arithmetic import Scale
from certify.ops.base import Affine, Elementwise
from certify.ops.pool import MaxPool
from certify.rounding import gamma

WIDTH = 8  # vectors of the subspace that the power iteration moves
STEPS = 100  # of it at most
SETTLED = 1e-9  # it stops where a step gains less than this, relatively
LINE = torch.linspace(-6, 6, 241, dtype=torch.float64)  # where slopes are looked at if no inputs are given


def attained(graph: Graph, node: Node, p: float, x: Float64[Tensor, "n *shape"] | None) -> float:
    """Return a slope ||node(a) - node(b)|| / ||a - b|| that the node of one input comes arbitrarily close to, or less.

    With inputs ``x`` of the node activations and max-poolings are taken where these are, else wherever they may be.
    """
    shape = graph.shape(node.inputs[0])
    if isinstance(node.rule, Elementwise):
        places = LINE.to(graph.device).view(-1, *[1] * len(shape)).expand(-1, *shape) if x is None else x
        z = node.rule.facts.slope_range(Interval(places, places))
        return float(torch.minimum(z.lower.abs(), z.upper.abs()).where(z.lower * z.upper > 0, 0).amax())
    if isinstance(node.rule, MaxPool):
        return math.sqrt(_followers(node.rule, x)) * (1 - 1e-15) if p == 2 else 1.0
    if isinstance(node.rule, Affine):
        return affine_norm(node.rule, shape, p, graph.device)
    return 0.0


def affine_norm(rule: Affine, shape: tuple[int, ...], p: float, device: torch.device) -> float:
    """||W v|| / ||v|| <= ||W||_p, rounded down: for p = 2 a v from subspace iteration, for p = inf the best one."""
    ones = torch.ones((1, *shape), dtype=torch.float64, device=device)
    error = gamma(math.prod(shape) + 16, torch.float64)
    if isinstance(rule, Scale):
        return float(rule.absolute(ones).max()) * (1 - error)
    if p != 2:
        return float(rule.absolute(ones).max()) * (1 - 2 * error)
    generator = torch.Generator().manual_seed(0)
    size = min(WIDTH, math.prod(shape))
    v = torch.randn((size, *shape), dtype=torch.float64, generator=generator).to(device)
    best = 0.0
    for _ in range(STEPS):
        turn, _, _ = torch.linalg.svd(rule.linear(v).flatten(1), full_matrices=False)
        v = torch.einsum("ij,i...->j...", turn, v)  # the first one is now the best of the subspace
        found = _quotient(rule, v[:1], error)
        if found <= best * (1 + SETTLED):
            return max(best, found)
        best = found
        basis = torch.linalg.qr(rule.transpose(rule.linear(v))[0].flatten(1).T)[0]
        v = basis.T.reshape(v.shape)
    return best


def _quotient(rule: Affine, v: Tensor, error: float) -> float:
    """||W v|| / ||v||, rounded down; W v is within ``error`` |W| |v| of what is computed."""
    y, length = rule.linear(v), float(torch.linalg.vector_norm(v))
    lost = float(torch.linalg.vector_norm(rule.absolute(v.abs()))) * 2 * error
    rounded = gamma(y.numel() + v.numel() + 32, torch.float64)
    return (float(torch.linalg.vector_norm(y)) - lost) / length * (1 - 2 * rounded) if length > 0 else 0.0


def _followers(rule: MaxPool, x: Tensor | None) -> int:
    """How many windows move with one input at most: those of the inputs x that it is the largest of, or could be."""
    windows = rule.windows
    if x is None:
        return int(windows[windows >= 0].bincount().max())
    windows = windows.to(x.device)
    first = x.flatten(1)[:, windows].masked_fill(windows < 0, -torch.inf).argmax(2)
    leaders = windows[torch.arange(len(windows), device=x.device), first]
    return max(int(row.bincount().max()) for row in leaders)
