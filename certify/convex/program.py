"""A linear program over bounded variables, and lower bounds from multipliers that need not be right.

    minimise <cost, z>  subject to  A_ub z <= b_ub,  A_eq z = b_eq + delta with |delta| <= slack,  lower <= z <= upper

where the first variables, the inputs, lie in a perturbation set. For all multipliers lam >= 0 and mu

    <cost, z> >= min over z of <cost + A_ub^T lam + A_eq^T mu, z>  -  <lam, b_ub> - <mu, b_eq> - <|mu|, slack>

so a solver only proposes; what is reported is this right side, evaluated in float64 with all errors subtracted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from certify.rounding import gamma
from certify.sets import LpBall, PerturbationSet

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

ROUNDS = 8  # of tangents, for balls that are no boxes
TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class Program:
    """One sample's constraints (see the head of this module); all bounds are finite. ``domain`` has one sample."""

    domain: PerturbationSet
    lower: np.ndarray
    upper: np.ndarray
    A_ub: sparse.csr_matrix
    b_ub: np.ndarray
    A_eq: sparse.csr_matrix
    b_eq: np.ndarray
    slack: np.ndarray

    @property
    def inputs(self) -> int:
        """The number of inputs."""
        return math.prod(self.domain.shape)

    @property
    def magnitude(self) -> np.ndarray:
        """The largest |z| per variable."""
        return np.maximum(np.abs(self.lower), np.abs(self.upper))

    def minimum(self, cost: np.ndarray) -> float:
        """Return a lower bound of <cost, z>: the best one met, that without a solver among them."""
        if not all(np.isfinite(part).all() for part in (cost, self.A_eq.data, self.b_eq, self.A_ub.data, self.b_ub)):
            return -math.inf
        best = self.lagrangian(cost, np.zeros(len(self.b_ub)), np.zeros(len(self.b_eq)))
        touched = self._first_points()
        for _ in range(ROUNDS):
            found = self._solve(cost, touched)
            if found is None:
                break
            lam, mu = -found.ineqlin.marginals[: len(self.b_ub)], -found.eqlin.marginals
            best = max(best, self.lagrangian(cost, lam, mu))
            # The solver's ball is a little too large: its minimum lies below ours until the tangents are right.
            if not touched or abs(found.fun - best) <= 1e-6 * (1 + abs(best)):
                break
            touched.append(self._unit(found.x[: self.inputs]))
        return best

    def lagrangian(self, cost: np.ndarray, lam: np.ndarray, mu: np.ndarray) -> float:
        """Return a lower bound of <cost, z> for ANY multipliers; -inf where they are no numbers."""
        lam = np.maximum(lam, 0)
        if not (np.isfinite(lam).all() and np.isfinite(mu).all()):
            return -math.inf
        with np.errstate(all="ignore"):
            bound = self._evaluated(cost, lam, mu)
        return bound if math.isfinite(bound) else -math.inf

    def _evaluated(self, cost: np.ndarray, lam: np.ndarray, mu: np.ndarray) -> float:
        n, many = self.inputs, len(self.lower) + len(lam) + len(mu)
        reduced, magnitude = self._reduced(cost, lam, mu), self.magnitude
        size = np.abs(cost) + abs(self.A_ub).T @ lam + abs(self.A_eq).T @ np.abs(mu)
        ends = np.minimum(reduced[n:] * self.lower[n:], reduced[n:] * self.upper[n:])
        point = torch.from_numpy(reduced[:n].copy()).view(1, *self.domain.shape).to(self.domain.center.device)
        entry = float(self.domain.infimum(point))  # rounded downward
        total = ends.sum() + entry - lam @ self.b_ub - mu @ self.b_eq
        terms = np.abs(ends).sum() + abs(entry) + lam @ np.abs(self.b_ub) + np.abs(mu) @ np.abs(self.b_eq)
        # A reduced cost sums at most ``many`` products; so do the total and the losses themselves.
        g = gamma(2 * many + 16, torch.float64)
        loss = g * (size @ magnitude + terms) + np.abs(mu) @ self.slack
        flushed = TINY * many * many * (1 + magnitude.sum())
        return float(total - (loss * (1 + 2 * g) + flushed + g * abs(total)))

    def _reduced(self, cost: np.ndarray, lam: np.ndarray, mu: np.ndarray) -> np.ndarray:
        return cost + self.A_ub.T @ lam + self.A_eq.T @ mu

    def _solve(self, cost: np.ndarray, touched: list[np.ndarray]) -> OptimizeResult | None:
        """A solver's opinion, None where it has none."""
        from scipy.optimize import linprog  # slow to import

        A, b, A_eq, lower, upper = self.A_ub, self.b_ub, self.A_eq, self.lower, self.upper
        if touched:
            A, b, extra = self._with_ball(touched)
            A_eq = sparse.hstack([A_eq, sparse.csr_matrix((A_eq.shape[0], extra))])
            cost, lower, upper = (
                np.append(old, np.full(extra, end)) for old, end in ((cost, 0), (lower, 0), (upper, 1))
            )
        box = np.stack([lower, upper], 1)
        found = linprog(cost, A_ub=A, b_ub=b, A_eq=A_eq, b_eq=self.b_eq, bounds=box, method="highs")
        if found.status != 0 or found.x is None or not math.isfinite(found.fun):
            return None
        return found

    def _first_points(self) -> list[np.ndarray]:
        """Where tangents touch at first; none for a box, and for a set whose shape is not known here."""
        if self.domain.is_box or not isinstance(self.domain, LpBall) or not float(self.domain.radius) > 0:
            return []
        typical = self.inputs ** -(1 / self.domain.p)
        return [np.full(self.inputs, sign * s) for s in (1.0, typical, typical / 3) for sign in (1, -1)]

    def _unit(self, x: np.ndarray) -> np.ndarray:
        """u = (x - center) / radius: the ball is sum |u_j|^p <= 1."""
        assert isinstance(self.domain, LpBall)
        return (x - self.domain.center.double().flatten().cpu().numpy()) / float(self.domain.radius)

    def _with_ball(self, touched: list[np.ndarray]) -> tuple[sparse.csr_matrix, np.ndarray, int]:
        """Rows with one variable t_j >= |u_j|^p per input more: sum t <= 1, and tangents of the power at ``touched``.

        They only help the solver: in ``lagrangian`` the set itself takes their place.
        """
        assert isinstance(self.domain, LpBall)
        n, p, m = self.inputs, self.domain.p, len(self.lower)
        blocks = [sparse.hstack([self.A_ub, sparse.csr_matrix((len(self.b_ub), n))])]
        blocks.append(sparse.csr_matrix((np.ones(n), (np.zeros(n, dtype=int), m + np.arange(n))), shape=(1, m + n)))
        limits = [self.b_ub, np.ones(1)]
        offset = self._unit(np.zeros(n))
        for s in touched:
            slope = p * np.abs(s) ** (p - 1) * np.sign(s)
            parts = [sparse.diags(slope / float(self.domain.radius)), sparse.csr_matrix((n, m - n)), -sparse.eye(n)]
            blocks.append(sparse.hstack(parts))
            limits.append((p - 1) * np.abs(s) ** p - slope * offset)
        return sparse.vstack(blocks).tocsr(), np.concatenate(limits), n
