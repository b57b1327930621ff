"""Multipliers of a semidefinite program whose constraints are products of affine functions: an interior point method.

The program is  max <b, w>  with  Z = C - sum_i w_i A_i  positive semidefinite, A_i = sym(p_i q_i^T), and w_i >= 0 where
the form is not an equation. Its Newton system then consists of entrywise products of Gram matrices,

    4 tr(A_i X A_j Y) = (p_i X p_j)(q_i Y q_j) + (q_i X q_j)(p_i Y p_j)
                      + (p_i X q_j)(q_i Y p_j) + (q_i X p_j)(p_i Y q_j),

so that a step costs m^2 n + m^3 for m forms of order n; a solver that knows no more than the cone factorises a matrix
of its n^2 / 2 entries, which is n^6. Nothing here is rigorous: what is proposed is evaluated anew.
Reference: Helmberg, Rendl, Vanderbei, Wolkowicz (1996), SIAM J. Optim. 6(2), the direction; Mehrotra (1992), its steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

STEPS = 60
INSIDE = 0.95  # how far a step goes of what reaches the boundary


def propose(
    row: Float64[Tensor, "n"],
    p: Float64[Tensor, "m n"],
    q: Float64[Tensor, "m n"],
    equal: Bool[Tensor, "m"],
    tolerance: float = 1e-8,
) -> tuple[Tensor, Tensor, float] | None:
    """Return multipliers of 1 - z_j^2 >= 0 [n - 1] and of p_i q_i >= 0 (= 0 where ``equal``) [m], and gamma.

    gamma is, to about ``tolerance`` times sum |row|, the largest for which row(z) - gamma less the weighted forms is a
    positive semidefinite form of z = (1, z_1, ..). The multipliers are strictly feasible, so they prove gamma itself.
    None where numbers overflow.
    """
    n, m = len(row), len(p)
    size = float(row.abs().sum()) or 1.0
    eye = torch.eye(n, dtype=row.dtype, device=row.device)
    C = torch.zeros_like(eye)
    C[0] += row / (2 * size)
    C[:, 0] += row / (2 * size)
    # 1 - z_j^2 = (1 - z_j)(1 + z_j), and gamma stands at 1 * 1
    p, q = torch.cat([p, eye[:1] - eye[1:], eye[:1]]), torch.cat([q, eye[:1] + eye[1:], eye[:1]])
    signed = torch.ones(m + n, dtype=torch.bool, device=row.device)
    signed[:m] = ~equal
    signed[-1] = False
    b = torch.zeros(m + n, dtype=row.dtype, device=row.device)
    b[-1] = 1
    iterate = _Iterate(C, p, q, signed, b, _inside(C, p, q, signed), eye, signed.to(row.dtype))
    for _ in range(STEPS):
        if not iterate.improve() or iterate.gap < tolerance:
            break
    w = iterate.w * size
    return (w[m:-1], w[:m], float(w[-1])) if bool(torch.isfinite(w).all()) else None


def _inside(C: Tensor, p: Tensor, q: Tensor, signed: Tensor) -> Tensor:
    """Multipliers with Z positive definite: ranges large enough for a dominant diagonal, then gamma low enough."""
    n = len(C)
    w = signed.to(C.dtype)
    w[-n:] = 0
    half = (w[:, None] * p).T @ q
    Z = C - (half + half.T) / 2
    ranges = Z[1:].abs().sum(1) - Z.diagonal()[1:] + 1
    gamma = Z[0, 0] - ranges.sum() - Z[0, 1:].square().sum() - 1
    w[-n:] = torch.cat([ranges, gamma[None]])
    return w


@dataclass(eq=False)
class _Iterate:
    """Multipliers ``w`` inside the program, and the primal pair: X for the cone, x for the signs."""

    C: Float64[Tensor, "n n"]
    p: Float64[Tensor, "m n"]
    q: Float64[Tensor, "m n"]
    signed: Bool[Tensor, "m"]
    b: Float64[Tensor, "m"]
    w: Float64[Tensor, "m"]
    X: Float64[Tensor, "n n"]
    x: Float64[Tensor, "m"]  # 0 where there is no sign

    def combine(self, w: Tensor) -> Tensor:
        """sum_i w_i A_i."""
        half = (w[:, None] * self.p).T @ self.q
        return (half + half.T) / 2

    def pair(self, K: Tensor) -> Tensor:
        """tr(A_i K) for all i; the symmetric part of K counts."""
        return ((self.p @ ((K + K.T) / 2)) * self.q).sum(1)

    @property
    def gap(self) -> float:
        """What complementarity is short of, plus how far X is from feasible."""
        Z = self.C - self.combine(self.w)
        missing = (self.pair(self.X) - self.x - self.b).abs() * self.w.abs().clamp(max=1)
        return float((self.X * Z).sum() + self.x @ self.w + missing.sum())

    def improve(self) -> bool:
        """Take one predictor and corrector step; False where no step is left."""
        Z = self.C - self.combine(self.w)
        root, failed = torch.linalg.cholesky_ex(Z)
        if int(failed):
            return False
        Y = torch.cholesky_inverse(root)
        t = torch.where(self.signed, self.w, 1)
        system, failed = torch.linalg.cholesky_ex(self._system(Y, self.x / t))
        if int(failed):
            return False
        count = len(Z) + int(self.signed.sum())
        mu = float((self.X * Z).sum() + self.x @ t) / count

        def direction(target: float, second: Tensor, second_x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """X Z = target I to first order, less the second-order terms that were met."""
            inverse = torch.where(self.signed, (target - second_x) / t, 0)
            K = target * Y - second @ Y
            dw = torch.cholesky_solve((self.b - self.pair(K) + inverse)[:, None], system)[:, 0]
            dZ = -self.combine(dw)
            dX = K - self.X - self.X @ dZ @ Y
            dx = torch.where(self.signed, inverse - self.x - self.x / t * dw, 0)
            return dw, dZ, (dX + dX.T) / 2, dx

        none = torch.zeros_like(Z)
        dw, dZ, dX, dx = direction(0.0, none, torch.zeros_like(t))
        dual, primal = self._length(Z, dZ, dw, self.w), self._length(self.X, dX, dx, self.x)
        after = ((self.X + primal * dX) * (Z + dual * dZ)).sum() + (self.x + primal * dx) @ (
            torch.where(self.signed, self.w + dual * dw, 0)
        )
        centre = min(1.0, max(1e-6, float(after) / (count * mu))) ** 3
        dw, dZ, dX, dx = direction(centre * mu, dX @ dZ, torch.where(self.signed, dx * dw, 0))
        dual, primal = self._length(Z, dZ, dw, self.w), self._length(self.X, dX, dx, self.x)
        self.w, self.X, self.x = self.w + dual * dw, self.X + primal * dX, self.x + primal * dx
        return max(dual, primal) > 1e-6

    def _system(self, Y: Tensor, ratio: Tensor) -> Tensor:
        """tr(A_i X A_j Y), plus what the signs add."""
        px, qx, py, qy = self.p @ self.X, self.q @ self.X, self.p @ Y, self.q @ Y
        crossed = (px @ self.q.T) * (qy @ self.p.T)
        H = (px @ self.p.T) * (qy @ self.q.T) + (qx @ self.q.T) * (py @ self.p.T) + crossed + crossed.T
        H = (H + H.T) / 8
        H.diagonal().mul_(1 + 1e-13).add_(torch.where(self.signed, ratio, 0))
        return H

    def _length(self, M: Tensor, dM: Tensor, dx: Tensor, x: Tensor) -> float:
        """The share of a step that stays inside both the cone and the signs."""
        root, failed = torch.linalg.cholesky_ex(M)
        if int(failed) or not bool(torch.isfinite(dM).all()):
            return 0.0
        half = torch.linalg.solve_triangular(root, dM, upper=False)
        whole = torch.linalg.solve_triangular(root, half.T, upper=False)
        falls = [float(-torch.linalg.eigvalsh((whole + whole.T) / 2)[0])]
        if bool(self.signed.any()):
            falls.append(float((-dx / x)[self.signed].max()))
        return min(1.0, INSIDE / max(*falls, 1e-12))
