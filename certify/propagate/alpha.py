"""alpha-CROWN as a method: CROWN, then slopes optimised per row, then intervals tightened where it pays."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.graph import Graph, Node
from certify.propagate.backward import Neurons, Rows, blocks, claim_rows, most_rows
from certify.propagate.methods import CROWN, Propagation, finite, sweep
from certify.propagate.optimize import optimize
from certify.propagate.state import Knowledge
from certify.registry import register_method
from certify.rounding import Arithmetic, step_down
from certify.sets import PerturbationSet
from certify.specs import Spec

COPIES = 4  # how many times the memory of a pull back one that climbs takes per row


@register_method("alpha-crown")
@dataclass(frozen=True)
class AlphaCROWN(Propagation):
    """CROWN with the slope of every line optimised per row; every step is sound and the best one is kept.

    ``steps`` of Adam with step length ``lr`` on the claim's rows. With ``intermediate="refine"``, the samples still
    open then have the intervals that their activations read tightened in the same way, ``inner_steps`` each, and the
    rows are optimised again; "fixed" keeps CROWN's intervals. Rows stop above ``goal``: 0 decides a claim, infinity
    asks for the best bounds. After ``time_limit`` seconds what has been reached is returned.
    Reference: Xu et al. 2021, arXiv 2011.13824.
    """

    name: ClassVar[str] = "alpha-crown"
    twice: ClassVar[bool] = True
    steps: int = 20
    lr: float = 0.4
    intermediate: str = "refine"
    inner_steps: int = 8
    time_limit: float = math.inf
    goal: float = 0.0

    def __post_init__(self) -> None:
        if self.intermediate not in ("fixed", "refine"):
            raise InvalidInput(f"intermediate={self.intermediate!r}", '"fixed" or "refine"')
        if min(self.steps, self.inner_steps) < 0 or not self.lr > 0 or not self.time_limit > 0:
            raise InvalidInput(
                f"steps={self.steps}, inner_steps={self.inner_steps}, lr={self.lr}, time_limit={self.time_limit}",
                "steps >= 0, lr > 0 and time_limit > 0",
            )

    def learn(self, graph: Graph, domain: PerturbationSet, arithmetic: Arithmetic) -> Knowledge:
        """Return CROWN's intervals, tightened unless they are to stay fixed."""
        knowledge, deadline = CROWN().learn(graph, domain, arithmetic), time.monotonic() + self.time_limit
        everything = torch.arange(domain.batch, device=graph.device)
        return knowledge if self.intermediate == "fixed" else self._refined(knowledge, everything, deadline)

    def bound(self, graph: Graph, domain: PerturbationSet, spec: Spec, arithmetic: Arithmetic) -> Tensor:
        """Return lower bounds of the rows, never worse than those of CROWN."""
        deadline = time.monotonic() + self.time_limit
        knowledge = CROWN().learn(graph, domain, arithmetic)
        margin = self._climb(knowledge, spec, self.rows(knowledge, spec), deadline)
        todo = (margin <= self.goal).any(1).nonzero()[:, 0]
        if self.intermediate == "refine" and len(todo) and time.monotonic() < deadline:
            tighter = self._refined(knowledge, todo, deadline)
            margin[todo] = self._climb(tighter, spec.take(todo), margin[todo], deadline)
        return finite(margin)

    def _refined(self, knowledge: Knowledge, samples: Tensor, deadline: float) -> Knowledge:
        """Tighten what activations read, from the input on, each node on top of the ones before it."""
        known = {name: interval[samples] for name, interval in knowledge.intervals.items()}
        fresh = Knowledge(knowledge.graph, knowledge.domain.take(samples), knowledge.arithmetic)
        return sweep(fresh, partial(self._tighten, deadline=deadline), known=known)

    def _climb(
        self, knowledge: Knowledge, spec: Spec, margin: Tensor, deadline: float
    ) -> Float64[Tensor, "batch rows"]:
        """Optimise the rows that are not above the goal."""
        sample, row = (margin <= self.goal).nonzero(as_tuple=True)
        C, d, margin = spec.C[sample, row], spec.d[sample, row].double(), margin.clone()
        for block in blocks(sample, most_rows(knowledge.graph, {}, COPIES)):
            found = optimize(
                knowledge,
                partial(_claim_part, knowledge, C[block], sample[block]),
                len(block),
                steps=self.steps,
                length=self.lr,
                goal=self.goal - d[block],
                deadline=deadline,
            )
            found = found + d[block] - 2.0**-50 * (d[block].abs() + found.abs())
            place = sample[block], row[block]
            margin[place] = torch.fmax(margin[place], found)
        return margin

    def _tighten(self, knowledge: Knowledge, node: Node, wanted: Tensor, deadline: float) -> Interval:
        """Bounds of neurons, each end with slopes of its own; nothing new after the deadline."""
        neurons = Neurons.of(knowledge, node, wanted)
        ends = torch.full((len(neurons.sample), 2), -torch.inf, dtype=torch.float64, device=wanted.device)
        for block in neurons.blocks(max(1, most_rows(knowledge.graph, neurons.frames, COPIES) // 2)):
            if time.monotonic() > deadline:
                break
            found = optimize(
                knowledge,
                partial(neurons.ends, block),
                2 * len(block),
                steps=self.inner_steps,
                length=self.lr,
                deadline=deadline,
            )
            ends[block] = found.view(-1, 2)
        return Interval(step_down(ends[:, 0]), -step_down(ends[:, 1]))


def _claim_part(knowledge: Knowledge, C: Tensor, sample: Tensor, index: Tensor) -> Rows:
    return claim_rows(knowledge, C[index], sample[index])
