"""Hermitian matrices from above: how a state grows behind activations, its gradient, and what rounding adds.

Notation is that of steps.py. Bounds are matrices of floats above the exact ones in the order of Hermitian matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Num
from torch import Tensor

from certify.rounding import gamma

#: [problems, blocks, k, k]; k changes from step to step.
State = Num[Tensor, "_ _ _ _"]

#: Relative rounding of a few float64 operations.
FEW = 2.0**-48


def top(P: State) -> Float64[Tensor, "problems"]:
    """Return an upper bound of the largest eigenvalue of every problem's one block; infinite where P is."""
    k = P.shape[-1]
    if k == 1:
        return P[:, 0, 0, 0].real.nan_to_num(nan=torch.inf)
    known = torch.isfinite(P.abs()).flatten(1).all(1)
    P = torch.where(known[:, None, None], P[:, 0], torch.eye(k, dtype=P.dtype, device=P.device))
    level = torch.linalg.eigvalsh(P)[:, -1].clamp(min=1e-300)
    slack = torch.full_like(level, 4 * _rump(k))
    eye = torch.eye(k, dtype=P.dtype, device=P.device)
    while True:
        guess = level * (1 + slack)
        failed = torch.linalg.cholesky_ex((guess * (1 - _rump(k)))[:, None, None] * eye - P).info != 0
        if not bool(failed.any()):
            return torch.where(known, guess, torch.inf)
        slack = torch.where(failed, 2 * slack, slack)  # what rounding spoils is raised until it passes


def _rump(k: int) -> float:
    """Return s: if the float Cholesky of A - s c I succeeds, A >= 0, for Hermitian A of size k, diagonal below c.

    Reference: S. Rump, Verification of positive definiteness (2006), theorem 2.3, with the trace below k c.
    """
    return 1.01 * gamma(4 * k + 16, torch.float64) * k


def log_det(P: State, t: Float64[Tensor, "problems n"]) -> tuple[Tensor, Tensor]:
    """Return log det K averaged over the blocks, K = I - t P_vv t, -inf where it is not positive; and K^-1."""
    n, t = t.shape[1], t[:, None, :, None]
    K = torch.eye(n, dtype=P.dtype, device=P.device) - t * P[..., :n, :n] * t.mT
    factor, info = torch.linalg.cholesky_ex(K)
    found = 2 * factor.diagonal(dim1=-2, dim2=-1).real.log().sum(2)
    failed = (info != 0) | ~torch.isfinite(found)
    if bool(failed.any()):  # no value of the search: any factor will do
        factor = torch.where(failed[..., None, None], torch.eye(n, dtype=P.dtype, device=P.device), factor)
        found = torch.where(failed, -torch.inf, found)
    return found.mean(1), torch.cholesky_inverse(factor)


def log_det_pull(t: Tensor, inverse: Tensor, weight: float) -> tuple[State, Float64[Tensor, "problems n"]]:
    """Return the gradients of -weight * log det K by P_vv and log T."""
    each, t = weight / inverse.shape[1], t[:, None, :, None]
    slope = (inverse.diagonal(dim1=-2, dim2=-1).real - 1).sum(1)
    return each * t * inverse * t.mT, each * slope


def grow(P: State, t: Float64[Tensor, "problems n"], *, alone: bool) -> tuple[State, Tensor, Tensor]:
    """Return P + P_:v t K^-1 t P_v: with K = I - t P_vv t, log det K, and K^-1.

    Where the state is v ``alone`` and t > 0 it is (K^-1 - I) / (t t^T), without a product of matrices.
    """
    n, (found, inverse) = t.shape[1], log_det(P, t)
    t = t[:, None, :, None]
    if alone:
        grown = inverse.clone()
        grown.diagonal(dim1=-2, dim2=-1).sub_(1)
        return grown.div_(t * t.mT), found, inverse
    scaled = t * P[..., :n, :]
    return P + scaled.mH @ (inverse @ scaled), found, inverse


def grow_pull(
    grad: State, t: Tensor, P: State, inverse: Tensor, weight: float, *, alone: bool
) -> tuple[State, Float64[Tensor, "problems n"]]:
    """Return the gradients by P and log T; with H = I + e_v t K^-1 t P_v: it is H grad H^H for P."""
    n, (back, slope) = t.shape[1], log_det_pull(t, inverse, weight)
    t = t[:, None, :, None]
    if alone:  # H = t K^-1 / t
        outer = t * t.mT
        inner = grad / outer
        left = inverse @ inner
        both = left @ inverse
        grown, mixed, plain = (part.diagonal(dim1=-2, dim2=-1).real.sum(1) for part in (both, left, inner))
        return back + both * outer, slope + grown - 2 * mixed + plain
    H = t * (inverse @ (t * P[..., :n, :]))  # H - I in the rows of v
    rows = P[..., :n, :] + P[..., :n, :n] @ H  # of the grown state
    across = grad.clone()
    across[..., :n, :] += H @ grad
    whole = across.clone()
    whole[..., :n] += across @ H.mH
    whole[..., :n, :n] += back
    return whole, slope + (t[..., 0].square() * ((rows @ grad) * rows.conj()).sum(3).real).sum(1)


def grow_bound(P: State, T: Float64[Tensor, "problems n"]) -> State:
    """Return a state above the grown one, for T as it stands; NaN where I - T^1/2 P_vv T^1/2 > 0 is not certain.

    With K = t^2/T - t P_vv t for powers of two t near T^1/2, all of it exact or rounded to the smaller side, any Z and
    R = t P_v: - K Z, the inverse is bounded by Z:  (t P_v:)^H K^-1 (t P_v:) = Z^H t P_v: + R^H Z + R^H K^-1 R.
    """
    n, live = T.shape[1], T > 0
    t = torch.where(live, torch.exp2((torch.where(live, T, 1).log2() / 2).round()), 0)
    wanted = torch.where(live, t.square() / torch.where(live, T, 1) * (1 - FEW), 1)
    t = t[:, None, :, None]
    scaled = t * P[..., :n, :]
    K = -(scaled[..., :n] * t.mT)
    K.diagonal(dim1=-2, dim2=-1).add_(wanted[:, None]).sub_(
        FEW * (wanted[:, None] + K.diagonal(dim1=-2, dim2=-1).abs())
    )
    K = torch.where(
        torch.isfinite(K.abs()).all(-1, keepdim=True).all(-2, keepdim=True), K, -torch.eye(n, dtype=K.dtype)
    )
    least = torch.linalg.eigvalsh(K)[..., 0] / 2
    shift = least + 4 * _rump(n)  # the diagonal of K is below 4
    eye = torch.eye(n, dtype=P.dtype, device=P.device)
    info = torch.linalg.cholesky_ex(K - shift[..., None, None] * (1 + FEW) * eye).info
    sure = (info == 0) & (least > 0)
    Z = torch.cholesky_solve(scaled, torch.linalg.cholesky_ex(K).L)
    magnitude, absolute = K.abs(), Z.abs()
    R = scaled - K @ Z
    noise = (scaled.abs() + magnitude @ absolute) * gamma(4 * n + 32, torch.float64)
    rest = R.abs() + noise
    product = P + Z.mH @ scaled + R.mH @ Z
    terms = gamma(8 * n + 32, torch.float64)

    def errors(w: Tensor) -> Tensor:
        zw, sw, rw, nw = (times(part, w) for part in (absolute, scaled.abs(), rest, noise))
        down = [part.mT for part in (scaled.abs(), absolute, rest, noise)]
        found = terms * (times(P.abs(), w) + times(down[0], zw) + times(down[1], sw))
        found += terms * (times(down[2], zw) + times(down[1], rw))
        found += times(down[3], zw) + times(down[1], nw)
        return found + times(down[2], rw) / least[..., None]

    grown = settled(product, errors)
    return torch.where(sure[..., None, None], grown, torch.nan)


@dataclass(frozen=True, eq=False)
class Sizes:
    """|G| and the error of G, for bounds of |G| |P| |G|^T w without that matrix."""

    G: Tensor
    error: Tensor | None

    def around(self, through: Callable[[Tensor], Tensor], w: Tensor, terms: int) -> Tensor:
        """Return an upper bound of E w, E the error of the float G P G^H; ``through(v)`` is |P| v."""
        G = self.G.abs()
        found = gamma(2 * terms + 32, torch.float64) * times(G, through(times(G.mT, w)))
        if self.error is not None:
            e = self.error
            found = found + times(e, through(times(G.mT, w) + times(e.mT, w))) + times(G, through(times(e.mT, w)))
        return found


def times(M: Tensor, v: Tensor) -> Tensor:
    """Return M v for stacks of matrices and vectors."""
    return (M @ v[..., None])[..., 0]


def settled(Q: State, errors: Callable[[Tensor], Tensor]) -> State:
    """Return a Hermitian state above every Hermitian matrix within E of Q entry by entry; ``errors(w)`` is E w.

    E <= diag(E w / w) for every w > 0, and w = diag(Q)^-1/2 leaves small entries small.
    """
    Q = torch.tril(Q) + torch.tril(Q, -1).mH
    diagonal = Q.diagonal(dim1=-2, dim2=-1).real
    floor = diagonal.amax((1, 2), keepdim=True) * 1e-30 + 1e-290
    w = diagonal.clamp(min=floor).rsqrt()
    raised = (diagonal + errors(w) / w * 1.01) * (1 + FEW)
    Q.diagonal(dim1=-2, dim2=-1).copy_(raised)
    return Q
