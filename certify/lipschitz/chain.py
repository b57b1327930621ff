"""A chain of steps from the input to rows or outputs: its optimum, and the bound that its multipliers certify."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify.lipschitz.barrier import WEIGHTS, descend
from certify.lipschitz.hermitian import FEW, top
from certify.lipschitz.steps import Mix, Readout, Source, Step

#: A stage ends where a step gains less than this part of its weight: from small chains to large ones.
PATIENCE = (1e-5, 1e-2)
SMALL = 4e6  # multiplications of a small chain
#: Added to a verified value, so that another order of summation verifies it again.
MARGIN = 1e-12


@dataclass(frozen=True, eq=False)
class Chain:
    """Steps for several problems of one shape; the first one is a ``Source``. L^2 is the top of the last state."""

    steps: tuple[Step, ...]
    problems: int

    @property
    def size(self) -> int:
        """The number of multipliers of one problem."""
        return sum(step.size for step in self.steps)

    @property
    def bytes(self) -> int:
        """Roughly what the states of one problem and their gradients hold at once."""
        return sum(10 * G.element_size() * G.shape[-3] * G.shape[-2] ** 2 for G in self._maps)

    @property
    def _maps(self) -> list[Tensor]:
        return [step.G for step in self.steps if isinstance(step, (Source, Mix, Readout))]

    def take(self, index: Int[Tensor, "n"]) -> Chain:
        """Return the chain of some problems."""
        return Chain(tuple(step.take(index) for step in self.steps), len(index))

    def start(self) -> Float64[Tensor, "problems size"]:
        """Return log S of the closed form S = (1 + |c| / r) lambda_max(P_vv), layer by layer.

        For slopes in [0, 1] it is ECLipsE-Fast: Xu and Sivaranjani, arXiv 2404.04375, proposition 3.
        """
        P, found = self._nothing(self.problems), []
        for step in self.steps:
            log_s = torch.zeros(self.problems, step.size, dtype=torch.float64)
            if step.size and not isinstance(step, Source):
                log_s = step.centre(P)
            P, _ = step.forward(P, log_s.to(self._device))
            found.append(log_s)
        return torch.cat(found, 1).to(self._device)

    def objective(self, x: Tensor, problems: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Return log L - weight * barrier, and its gradient; log L is smoothed over the top 1/weight eigenvalues."""
        steps = self.take(problems).steps if len(problems) < self.problems else self.steps
        P, barrier, memories = self._nothing(len(x)), x.new_zeros(len(x)), []
        for step, log_s in zip(steps, self._split(x), strict=True):
            P, memory = step.forward(P, log_s)
            memories.append(memory)
            barrier = barrier + step.barrier(memory)
        feasible = torch.isfinite(barrier) & torch.isfinite(P.abs()).flatten(1).all(1)
        eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
        values, vectors = torch.linalg.eigh(torch.where(feasible[:, None, None], P[:, 0], eye))
        logs = values.clamp(min=1e-300).log()
        value = 0.5 * weight * torch.logsumexp(logs / weight, 1) - weight * barrier
        share = 0.5 * torch.softmax(logs / weight, 1) / logs.exp()
        grad = ((vectors * share[:, None]) @ vectors.mH)[:, None]
        slopes = []
        for step, memory in zip(reversed(steps), reversed(memories), strict=True):
            grad, slope = step.pull(grad, memory, weight)
            slopes.append(slope)
        gradient = torch.cat(slopes[::-1], 1)
        feasible &= torch.isfinite(value) & torch.isfinite(gradient).all(1)
        return torch.where(feasible, value, torch.inf), torch.where(feasible[:, None], gradient, 0)

    def solve(self, steps: int, seconds: float) -> tuple[Float64[Tensor, "problems"], list[Tensor]]:
        """Return certified constants and their multipliers S per step, after ``steps`` iterations a stage.

        Of the last stages the best counts, back to the first that is no better: near the boundary of what is feasible
        rounding costs most. ``seconds`` are shared by the stages.
        """
        trail, end = [self.start()], time.monotonic() + seconds
        for i, weight in enumerate(WEIGHTS if steps and self.size else ()):
            now = time.monotonic()
            share = now + (end - now) / (len(WEIGHTS) - i)
            objective = partial(self.objective, weight=weight)
            trail.append(descend(objective, self._ahead(trail, i), steps, weight * self._patience, share))
        value = torch.full((self.problems,), torch.inf, dtype=torch.float64, device=self._device)
        multipliers: list[Tensor] = []
        for x in reversed(trail):
            S = self.multipliers(x)
            found = self.certify(S)
            better = (found < value)[:, None]
            value = torch.minimum(value, found)
            multipliers = [torch.where(better, new, old) for new, old in zip(S, multipliers or S, strict=True)]
            if bool(torch.isfinite(value).all()) and (not bool(better.any()) or time.monotonic() > end):
                break
        return value, multipliers

    def _ahead(self, trail: list[Tensor], stage: int) -> tuple[Tensor, ...]:
        """Where a stage may begin: at the last optimum, or where the path of optima leads, nearly linear in weight."""
        if stage < 2:
            return (trail[-1],)
        far, near, here = WEIGHTS[stage - 2 : stage + 1]
        return trail[-1], trail[-1] + (trail[-1] - trail[-2]) * ((near - here) / (far - near))

    @property
    def _patience(self) -> float:
        work = sum(G.shape[-3] * G.shape[-2] ** 3 for G in self._maps)
        return min(PATIENCE[1], PATIENCE[0] * max(1.0, work / SMALL) ** 2)

    def multipliers(self, x: Tensor) -> list[Tensor]:
        """Return S per step, [problems, size]."""
        P, found = self._nothing(self.problems), []
        for step, log_s in zip(self.steps, self._split(x), strict=True):
            found.append(step.absolute(P, log_s))
            P, _ = step.forward(P, log_s)
        return found

    def certify(self, multipliers: Sequence[Tensor]) -> Float64[Tensor, "problems"]:
        """Return L for which the multipliers S are a certificate, rounding included; infinite if they are none."""
        P = self._nothing(self.problems)
        for step, S in zip(self.steps, multipliers, strict=True):
            P = step.bound(P, 1 / S)
        return top(P).sqrt() * (1 + FEW + MARGIN)

    def _nothing(self, problems: int) -> Tensor:
        """The state before the source."""
        return torch.empty(problems, 1, 0, 0, dtype=torch.float64, device=self._device)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split([step.size for step in self.steps], 1)

    @property
    def _device(self) -> torch.device:
        first = self.steps[0]
        assert isinstance(first, Source)
        return first.G.device
