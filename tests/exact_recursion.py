"""The covariance recursion in as many digits as mpmath works with: what certificates are audited by."""

from __future__ import annotations

from collections.abc import Sequence

import mpmath


def exact_gate(P: mpmath.matrix, c: Sequence[float], r: Sequence[float], T: Sequence[float]) -> mpmath.matrix:
    """Return the state behind activations u = c v + r w on its first entries, by the formula itself."""
    n, k = len(c), P.rows
    live = [i for i in range(n) if r[i] > 0]
    K = mpmath.matrix(len(live), len(live))
    for i, a in enumerate(live):
        for j, b in enumerate(live):
            K[i, j] = (1 / mpmath.mpf(T[a]) if a == b else 0) - P[a, b]
    rows = mpmath.matrix(len(live), k)
    for i, a in enumerate(live):
        for j in range(k):
            rows[i, j] = P[a, j]
    grown = P + rows.T * mpmath.inverse(K) * rows
    for i in range(k):
        for j in range(k):
            grown[i, j] *= (c[i] if i < n else 1) * (mpmath.mpf(c[j]) if j < n else 1)
    for i in live:
        grown[i, i] += mpmath.mpf(r[i]) ** 2 / mpmath.mpf(T[i])
    return grown


def exact_square(
    weights: Sequence[Sequence[Sequence[float]]], slopes: tuple[float, float], multipliers: Sequence[Sequence[float]]
) -> mpmath.mpf:
    """Return L^2 that S certifies for a dense network with one slope range; raises if some S - M is not positive."""
    c, r = (slopes[0] + slopes[1]) / 2, (slopes[1] - slopes[0]) / 2
    first = mpmath.matrix(weights[0])
    P = first * first.T
    for weight, S in zip(weights[1:], multipliers, strict=True):
        gap = mpmath.diag([mpmath.mpf(s) for s in S]) - P
        mpmath.cholesky(gap)  # raises where it is not positive definite
        inverse = mpmath.inverse(gap)
        grown = P + P * inverse * P
        cov = grown * mpmath.mpf(c) ** 2
        for i, s in enumerate(S):
            cov[i, i] += mpmath.mpf(r) ** 2 * mpmath.mpf(s)
        W = mpmath.matrix(weight)
        P = W * cov * W.T
    return max(mpmath.eigsy(P, eigvals_only=True)) if P.rows > 1 else P[0, 0]
