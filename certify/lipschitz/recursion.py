"""``recursion``: LipSDP-Neuron at its optimum without a semidefinite solver; ``eclipse-fast``: its closed-form start.

The constant is that of the best multipliers found; they are the certificate, and ``recheck`` evaluates them anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from certify.enclosures import Interval
from certify.errors import InvalidInput, UnsupportedOperation
from certify.graph import Graph
from certify.lipschitz.chain import Chain
from certify.lipschitz.compile import compile_chain
from certify.lipschitz.estimate import Question
from certify.lipschitz.product import Walk
from certify.lipschitz.slopes import learned, slope_ranges
from certify.lipschitz.steps import Mix
from certify.propagate.methods import BoundMethod
from certify.registry import register_estimator
from certify.results import LipschitzEstimate, Multipliers

BYTES = 1 << 30  # of the states of problems that are solved side by side

#: Solves a chain within so many seconds: certified values and multipliers per step.
Solve = Callable[[Chain, float], tuple[Tensor, list[Tensor]]]


@register_estimator("recursion")
@dataclass(frozen=True, kw_only=True)
class Recursion:
    """An upper bound of the Lipschitz constant: the best multipliers of the covariance recursion (steps.py).

    Every neuron of a small layer, every channel of a large map, has its own; any slopes are fine, negative ones too.
    ``steps`` are those of one of nine stages, ``time_limit`` seconds are an aim for all: every iterate is a
    certificate, so less time gives a larger bound. With a domain the slopes are those on the intervals that
    ``intervals`` (a bound method) proves. Segments that the recursion cannot express count by their product bound.
    """

    steps: int = 60
    time_limit: float = 60.0
    intervals: str | BoundMethod = "crown"

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.time_limit > 0:
            raise InvalidInput(f"steps={self.steps}, time_limit={self.time_limit}", "steps >= 1, time_limit > 0")

    def estimate(self, question: Question) -> LipschitzEstimate:
        """Return the bound, side "upper", with its multipliers."""
        return answer("recursion", question, self.intervals, self.time_limit, self._solve)

    def _solve(self, chain: Chain, seconds: float) -> tuple[Tensor, list[Tensor]]:
        return chain.solve(self.steps, seconds)


@register_estimator("eclipse-fast")
@dataclass(frozen=True, kw_only=True)
class EclipseFast:
    """The closed form S = 2 lambda_max(M) of ECLipsE-Fast, and (1 + |c| / r) lambda_max(M) for slopes c - r to c + r.

    Side "upper". Reference: Xu and Sivaranjani, NeurIPS 2024, arXiv 2404.04375.
    """

    intervals: str | BoundMethod = "crown"

    def estimate(self, question: Question) -> LipschitzEstimate:
        """Return the bound, side "upper", with its multipliers."""
        return answer("eclipse-fast", question, self.intervals, math.inf, lambda chain, _: chain.solve(0, 0.0))


def recheck(question: Question, multipliers: Multipliers, intervals: str | BoundMethod = "crown") -> list[float]:
    """Return the constants [problems] that multipliers certify, in float64 with all rounding counted.

    Infinite where they are no certificate. Problems are rows of the spec sample by sample, or samples, as in the
    estimate that they come from.
    """
    with torch.no_grad():
        chain = _problems(question, chain_of(question, intervals))
        S = []
        for step in chain.steps:
            rows = torch.tensor(multipliers.get(step.name, ()) if step.size else (), dtype=torch.float64)
            if rows.numel() != chain.problems * step.size:
                raise InvalidInput(
                    f"multipliers of {step.name!r} of shape {tuple(rows.shape)}",
                    f"{chain.problems} times {step.size} of them",
                    "those of an estimate of the same question",
                )
            S.append(rows.view(chain.problems, step.size).to(question.graph.device))
        return chain.certify(S).tolist()


def answer(
    method: str, question: Question, intervals: str | BoundMethod, time_limit: float, solve: Solve
) -> LipschitzEstimate:
    """Return what ``solve`` finds for all problems of a question, in parts that fit into memory."""
    with torch.no_grad():
        chain = _problems(question, chain_of(question, intervals))
        end = time.monotonic() + time_limit
        values, multipliers = [], []
        parts = torch.arange(chain.problems, device=question.graph.device).split(_block(chain))
        for i, part in enumerate(parts):
            value, S = solve(chain.take(part), max(0.0, end - time.monotonic()) / (len(parts) - i))
            values.append(value)
            multipliers.append(S)
    found = torch.cat(values)
    kept: Multipliers = {
        step.name: tuple(tuple(row) for row in torch.cat([S[i] for S in multipliers]).tolist())
        for i, step in enumerate(chain.steps)
        if step.size
    }
    return LipschitzEstimate(float(found.max()), "upper", method, question.p, {}, _rows(question, found.tolist()), kept)


def chain_of(question: Question, intervals: str | BoundMethod) -> Chain:
    """Return the chain from the input to the outputs, a problem per sample."""
    slopes = slope_ranges(question.graph, learned(question.graph, question.domain, intervals))
    for name, slope in slopes.items():
        if not bool(torch.isfinite(slope.magnitude).all()):
            raise UnsupportedOperation(f"no finite slope range at {name!r}", "activations that are Lipschitz there")
    return compile_chain(question.graph, slopes, question.p, _between(question.graph, slopes))


def _between(graph: Graph, slopes: dict[str, Interval]) -> Callable[[str, str], Float64[Tensor, "samples"]]:
    samples = max((len(slope.lower) for slope in slopes.values()), default=1)

    def between(first: str, last: str) -> Tensor:
        walks = [Walk(graph, {name: s.magnitude[i] for name, s in slopes.items()}, 2, first) for i in range(samples)]
        return torch.tensor([walk.whole(last) for walk in walks], dtype=torch.float64, device=graph.device)

    return between


def _problems(question: Question, chain: Chain) -> Chain:
    """One problem per sample, or per sample and row: of the spec, or of the outputs for the linf norm."""
    C = _claims(question, chain.problems)
    if C is None:
        return chain
    sample = torch.arange(len(C), device=C.device).repeat_interleave(C.shape[1])
    sample = sample.clamp(max=chain.problems - 1)  # without a domain all samples share one chain
    wide = chain.take(sample)
    rows = C.flatten(0, 1)[:, None, None]
    return Chain((*wide.steps, Mix(rows)), len(sample))


def _claims(question: Question, samples: int) -> Tensor | None:
    """C [samples, rows, outputs], or None for the whole output."""
    if question.spec is not None:
        C = question.spec.C
        return _distinct(C)[0][None] if question.domain is None else C
    if question.p == 2:
        return None
    outputs = math.prod(question.graph.shape(question.graph.output))
    eye = torch.eye(outputs, dtype=torch.float64, device=question.graph.device)
    return eye.expand(samples, -1, -1)


def _distinct(C: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of all samples, up to their sign, and which of them each one is."""
    rows = C.flatten(0, 1)
    first = rows.gather(1, (rows != 0).int().argmax(1, keepdim=True))
    rows = rows * torch.where(first < 0, -1, 1)
    return torch.unique(rows, dim=0, return_inverse=True)


def _rows(question: Question, values: list[float]) -> tuple[tuple[float, ...], ...]:
    spec = question.spec
    if spec is None:
        return ()
    if question.domain is None:
        values = [values[i] for i in _distinct(spec.C)[1].tolist()]
    count = spec.C.shape[1]
    return tuple(tuple(values[i : i + count]) for i in range(0, len(values), count))


def _block(chain: Chain) -> int:
    """How many problems fit into ``BYTES``."""
    return max(1, int(BYTES // max(1, chain.bytes)))
