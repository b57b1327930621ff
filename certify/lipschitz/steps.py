"""The covariance recursion, step by step: values, gradients, and upper bounds that hold with all rounding.

A state z gathers the values that are alive at one place of the network. Its covariance P is a certificate: for two
inputs with ||x - x'|| <= 1 the difference dz satisfies dz dz^H <= P in the order of Hermitian matrices. Activations
u = c v + r w with |w| <= |v|, neuron by neuron, keep such certificates: for every T >= 0 with T^1/2 P_vv T^1/2 < I

    Cov(z) grows to  P + P_:v T^1/2 (I - T^1/2 P_vv T^1/2)^-1 T^1/2 P_v:,    w comes with covariance 1/T,

since dz^H P^-1 dz - sum_i T_i (|dv_i|^2 - |dw_i|^2) <= 1. S = 1/T are the multipliers of LipSDP-Neuron, so the best T
gives its optimum without a semidefinite solver. Linear maps act as P -> G P G^H. On a torus P has one block per
frequency and T is shared by all of them: states are [problems, blocks, k, k], T is [problems, neurons].

References: Fazlyab et al., LipSDP, arXiv 1906.04893; Xu and Sivaranjani, ECLipsE, arXiv 2404.04375.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64, Int, Num
from torch import Tensor

from certify.rounding import gamma

#: [problems, blocks, k, k]; k changes from step to step.
State = Num[Tensor, "_ _ _ _"]

INNER = 0.1  # a search begins at least this far, relatively, inside the feasible set
#: Relative rounding of a few float64 operations.
FEW = 2.0**-48


class Step(ABC):
    """P -> P'. ``forward`` returns P' and what ``pull`` needs to carry gradients back; ``bound`` rounds upward."""

    #: The node whose multipliers the step takes.
    name: str

    @property
    @abstractmethod
    def size(self) -> int:
        """How many logarithms log(S) the step consumes per problem."""

    @abstractmethod
    def forward(self, P: State, log_s: Float64[Tensor, "problems size"]) -> tuple[State, Any]:
        """Return P' and the step's memory."""

    @abstractmethod
    def pull(self, grad: State, memory: Any, weight: float) -> tuple[State, Float64[Tensor, "problems size"]]:
        """Return the gradients by P and log S of <grad, P'> - weight * barrier."""

    def barrier(self, memory: Any) -> Float64[Tensor, "problems"] | float:
        """Return log det (I - T^1/2 P_vv T^1/2), averaged over the blocks; -inf where that is not positive."""
        return 0.0

    @abstractmethod
    def bound(self, P: State, T: Float64[Tensor, "problems size"]) -> State:
        """Return a state that is above P' whatever exact state below P it was made from; infinite if T fails."""

    def centre(self, P: State) -> Float64[Tensor, "problems size"]:
        """Return log S inside the feasible set, in closed form."""
        return P.new_zeros(len(P), self.size, dtype=torch.float64)

    def absolute(self, P: State, log_s: Float64[Tensor, "problems size"]) -> Float64[Tensor, "problems size"]:
        """Return the multipliers S themselves."""
        return log_s.exp()

    def take(self, index: Int[Tensor, "n"]) -> Step:
        """Return the step for some of the problems."""
        return self


class Exact(Step):
    """A step without multipliers."""

    name = ""
    size = 0


@dataclass(frozen=True, eq=False)
class Source(Step):
    """The first linear map: P' = G diag(d) G^H, d = 1 for the l2 norm of the input.

    For linf, d_i = places / q_i with q = softmax(-log S): |x_i| <= 1 at ``places`` positions per channel gives
    sum_i (q_i / places) |x_i|^2 <= 1. Reference: the dual of GeoLIP, Wang et al., arXiv 2207.05889.
    """

    G: Num[Tensor, "blocks m k"]
    error: Tensor | None
    places: int  # 0 stands for the l2 norm
    problems: int
    name: str = "input"

    @property
    def size(self) -> int:
        """One weight per input channel for linf, none for l2."""
        return self.G.shape[2] if self.places else 0

    def forward(self, P: State, log_s: Tensor) -> tuple[State, Any]:
        if not self.places:
            return self._plain[None].expand(self.problems, -1, -1, -1), None
        q = torch.softmax(-log_s, 1)
        d = self.places / q
        return (self.G * d[:, None, None]) @ self.G.mH, (d, q)

    def pull(self, grad: State, memory: Any, weight: float) -> tuple[State, Tensor]:
        if not self.places:
            return grad, grad.new_zeros(len(grad), 0, dtype=torch.float64)
        d, q = memory
        slope = ((grad @ self.G) * self.G.conj()).real.sum((1, 2)) * d  # by log d
        return grad, slope - q * slope.sum(1, keepdim=True)

    def bound(self, P: State, T: Tensor) -> State:
        if not self.places:
            d = torch.ones(1, self.G.shape[2], dtype=torch.float64, device=self.G.device)
        else:
            q = T / T.sum(1, keepdim=True) * (1 - FEW * T.shape[1])  # sums to at most 1 with all rounding
            d = torch.where((T > 0).all(1, keepdim=True), self.places / q * (1 + FEW), torch.inf)
        product = (self.G * d[:, None, None]) @ self.G.mH
        size = _Sizes(self.G, self.error)
        found = _settled(product, lambda w: size.around(lambda v: d[:, None] * v, w, 2 * self.G.shape[2]))
        return found.expand(self.problems, -1, -1, -1)

    def take(self, index: Tensor) -> Source:
        return replace(self, problems=len(index))

    @property
    def _plain(self) -> Tensor:
        return self.G @ self.G.mH


@dataclass(frozen=True, eq=False)
class Mix(Exact):
    """P' = G P G^H; the entries of the true G are within ``error`` of those given. G may differ by problem."""

    G: Num[Tensor, "*problems blocks m k"]
    error: Tensor | None = None

    def forward(self, P: State, log_s: Tensor) -> tuple[State, Any]:
        return self.G @ P @ self.G.mH, None

    def pull(self, grad: State, memory: Any, weight: float) -> tuple[State, Tensor]:
        return self.G.mH @ grad @ self.G, grad.new_zeros(len(grad), 0, dtype=torch.float64)

    def bound(self, P: State, T: Tensor) -> State:
        size, magnitude = _Sizes(self.G, self.error), P.abs()
        return _settled(
            self.G @ P @ self.G.mH, lambda w: size.around(lambda v: _times(magnitude, v), w, 4 * P.shape[-1])
        )

    def take(self, index: Tensor) -> Mix:
        return replace(self, G=self.G[index]) if self.G.ndim == 4 else self


@dataclass(frozen=True, eq=False)
class Fold(Exact):
    """The covariance on a coarser torus: the sum over the frequencies that a stride makes one.

    P'[i] = sum_j P[index[i, j]], conjugated where ``mirrored``: half of the frequencies stand for all.
    """

    index: Int[Tensor, "coarse aliases"]
    mirrored: Tensor  # bool, like index

    def forward(self, P: State, log_s: Tensor) -> tuple[State, Any]:
        parts = P[:, self.index]
        flip = self.mirrored[None, :, :, None, None]
        return torch.where(flip, parts.conj(), parts).sum(2), P.shape[1]

    def pull(self, grad: State, memory: Any, weight: float) -> tuple[State, Tensor]:
        parts = grad[:, :, None].expand(-1, -1, self.index.shape[1], -1, -1)
        parts = torch.where(self.mirrored[None, :, :, None, None], parts.conj(), parts).flatten(1, 2)
        back = grad.new_zeros(len(grad), memory, *grad.shape[2:]).index_add(1, self.index.flatten(), parts)
        return back, grad.new_zeros(len(grad), 0, dtype=torch.float64)

    def bound(self, P: State, T: Tensor) -> State:
        terms = self.index.shape[1]
        total = P.abs()[:, self.index].sum(2) * gamma(terms + 4, torch.float64)
        return _settled(self.forward(P, T)[0], lambda w: _times(total, w))


@dataclass(frozen=True, eq=False)
class Readout(Exact):
    """From a torus to plain neurons: P' = sum_f weights_f Re(G_f P_f G_f^H), one real block."""

    G: Num[Tensor, "blocks m k"]
    error: Tensor | None
    weights: Float64[Tensor, "blocks"]

    def forward(self, P: State, log_s: Tensor) -> tuple[State, Any]:
        parts = (self.G * self.weights[:, None, None]) @ P @ self.G.mH
        return parts.real.sum(1, keepdim=True), None

    def pull(self, grad: State, memory: Any, weight: float) -> tuple[State, Tensor]:
        back = (self.G.mH * self.weights[:, None, None]) @ grad.to(self.G.dtype) @ self.G
        return back, grad.new_zeros(len(grad), 0, dtype=torch.float64)

    def bound(self, P: State, T: Tensor) -> State:
        size, magnitude = _Sizes(self.G, self.error), P.abs()

        def errors(w: Tensor) -> Tensor:
            terms = 4 * P.shape[-1] + P.shape[1]
            parts = size.around(lambda v: _times(magnitude, v), w.expand(-1, P.shape[1], -1), terms)
            return (parts * self.weights[:, None]).sum(1, keepdim=True)

        return _settled(self.forward(P, T)[0], errors)


@dataclass(frozen=True, eq=False)
class Gate(Step):
    """Activations on the first n entries of the state: u = c v + r w there, the other entries stay.

    Neurons with r = 0 are linear and have T = 0. ``log_s`` is relative to the mean of the diagonal of P_vv, which
    keeps deep networks well-conditioned: the scale of a layer does not disturb those behind it.
    """

    name: str
    c: Float64[Tensor, "problems n"]
    r: Float64[Tensor, "problems n"]

    @property
    def size(self) -> int:
        """One multiplier per neuron."""
        return self.c.shape[1]

    def forward(self, P: State, log_s: Tensor) -> tuple[State, Any]:
        n, live = self.size, self.r > 0
        S, scale = _absolute(P, log_s, live)
        t = torch.where(live, S.rsqrt(), 0)
        out, barrier, inverse = _grow(P, t)
        out[..., :n, :] *= self.c[:, None, :, None]
        out[..., :, :n] *= self.c[:, None, None, :]
        out.diagonal(dim1=-2, dim2=-1)[..., :n] += torch.where(live, self.r.square() * S, 0)[:, None]
        return out, (barrier, scale, S, t, P, inverse)

    def barrier(self, memory: Any) -> Tensor:
        return memory[0]

    def pull(self, grad: State, memory: Any, weight: float) -> tuple[State, Tensor]:
        n, live = self.size, self.r > 0
        _, scale, S, t, P, inverse = memory
        fresh = torch.where(live, self.r.square() * S * grad.diagonal(dim1=-2, dim2=-1)[..., :n].real.sum(1), 0)
        G = grad.clone()
        G[..., :n, :] *= self.c[:, None, :, None]
        G[..., :, :n] *= self.c[:, None, None, :]
        back, slope = _grow_pull(G, t, P, inverse, weight)
        slope = torch.where(live, fresh - slope, 0)  # by log S = -log T
        back.diagonal(dim1=-2, dim2=-1)[..., :n] += _share(slope, scale, live, grad.shape[1])
        return back, slope

    def bound(self, P: State, T: Tensor) -> State:
        n, live = self.size, self.r > 0
        grown = _grow_bound(P, torch.where(live, T, 0))
        c = torch.nn.functional.pad(self.c, (0, P.shape[-1] - n), value=1.0)[:, None]
        scaled = grown * c[..., :, None] * c[..., None, :]
        magnitude = scaled.abs() * FEW
        out = _settled(scaled, lambda w: _times(magnitude, w))
        r = self.r * (1 + FEW) + self.c.abs() * 2.0**-52  # c + [-r, r] holds the slopes whatever c was rounded to
        fresh = torch.where(live, torch.where(T > 0, r.square() / T * (1 + FEW), torch.inf), 0)
        out.diagonal(dim1=-2, dim2=-1)[..., :n] += fresh[:, None]
        out.diagonal(dim1=-2, dim2=-1).mul_(1 + FEW)
        return out

    def centre(self, P: State) -> Tensor:
        """lambda_max (1 + |c| / r), the best multiple: it turns P <= lambda_max into P' <= (|c| + r)^2 lambda_max."""
        ratio = (self.c.abs() / self.r.clamp(min=1e-300)).clamp(INNER, 1e6)
        return _log_top(P[..., : self.size, : self.size], self.r > 0)[:, None] + torch.log1p(ratio)

    def absolute(self, P: State, log_s: Tensor) -> Tensor:
        return torch.where(self.r > 0, _absolute(P, log_s, self.r > 0)[0], torch.inf)

    def take(self, index: Tensor) -> Gate:
        return replace(self, c=self.c[index], r=self.r[index])


@dataclass(frozen=True, eq=False)
class Renew(Step):
    """A map that is only known by |du| <= gain |dv|, in groups: u comes fresh, with covariance gain^2 S.

    ``group`` [k] names the multiplier of every entry of v, ``blocks`` and ``fresh`` [k'] how often and in which order
    the multipliers stand in the new state. Max-pools (one group per channel) and whole segments (one group) end so.
    """

    name: str
    gain: Float64[Tensor, "problems"]
    group: Int[Tensor, "k"]
    fresh: Int[Tensor, "new"]
    blocks: int
    complex: bool

    @property
    def size(self) -> int:
        """One multiplier per group."""
        return int(self.group.max()) + 1

    def forward(self, P: State, log_s: Tensor) -> tuple[State, Any]:
        S, scale = _absolute(P, log_s[:, self.group], self._all(P))
        barrier, inverse = _barrier(P, S.rsqrt())
        alone = log_s.exp() * scale[:, None]
        return self._diagonal(self.gain.square()[:, None] * alone), (barrier, scale, alone, S, P, inverse)

    def _diagonal(self, variance: Tensor) -> Tensor:
        block = torch.diag_embed(variance[:, self.fresh])
        block = block.to(torch.complex128) if self.complex else block
        return block[:, None].expand(-1, self.blocks, -1, -1)

    def barrier(self, memory: Any) -> Tensor:
        return memory[0]

    def pull(self, grad: State, memory: Any, weight: float) -> tuple[State, Tensor]:
        _, scale, alone, S, P, inverse = memory
        variance = grad.diagonal(dim1=-2, dim2=-1).real.sum(1)
        fresh = torch.zeros_like(alone).index_add(1, self.fresh, variance)
        slope = fresh * self.gain.square()[:, None] * alone
        back, inner = _barrier_pull(S.rsqrt(), inverse, weight)
        slope = slope.index_add(1, self.group, -inner)
        back.diagonal(dim1=-2, dim2=-1).add_(_share(slope, scale, self._all(P), P.shape[1]))
        return back, slope

    def bound(self, P: State, T: Tensor) -> State:
        passed = torch.isfinite(_grow_bound(P, T[:, self.group]).diagonal(dim1=-2, dim2=-1).real).flatten(1).all(1)
        variance = self.gain.square()[:, None] / T * (1 + 4 * FEW)
        return self._diagonal(torch.where(passed[:, None] & (T > 0), variance, torch.inf))

    def centre(self, P: State) -> Tensor:
        return _log_top(P, self._all(P))[:, None].expand(-1, self.size) + math.log1p(INNER)

    def absolute(self, P: State, log_s: Tensor) -> Tensor:
        return log_s.exp() * _absolute(P, log_s[:, self.group], self._all(P))[1][:, None]

    def take(self, index: Tensor) -> Renew:
        return replace(self, gain=self.gain[index])

    @staticmethod
    def _all(P: State) -> Tensor:
        return torch.ones(len(P), P.shape[-1], dtype=torch.bool, device=P.device)


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


def _absolute(P: State, log_s: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """S and its unit: the mean of the live neurons' diagonal of P."""
    diagonal = P.diagonal(dim1=-2, dim2=-1)[..., : live.shape[1]].real.mean(1)
    scale = (diagonal * live).sum(1) / live.sum(1).clamp(min=1)
    scale = scale.clamp(min=1e-300)
    return log_s.exp() * scale[:, None], scale


def _log_top(P: State, live: Tensor) -> Float64[Tensor, "problems"]:
    """log of the largest eigenvalue of the live part, in units of its mean diagonal."""
    used = P * (live[:, None, :, None] & live[:, None, None, :])
    used = torch.where(torch.isfinite(used.abs()), used, 0)  # what overflows is certified by nothing
    largest = torch.linalg.eigvalsh(used)[..., -1].amax(1).clamp(min=1e-300)
    return (largest / _absolute(P, live.double(), live)[1]).log()


def _share(slope: Tensor, scale: Tensor, live: Tensor, blocks: int) -> Tensor:
    """The gradient of the diagonal [problems, 1, n] through the unit of S."""
    each = slope.sum(1) / scale / live.sum(1).clamp(min=1) / blocks
    return (each[:, None] * live)[:, None]


def _barrier(P: State, t: Float64[Tensor, "problems n"]) -> tuple[Tensor, Tensor]:
    """log det K averaged over the blocks, K = I - t P_vv t; and K^-1."""
    n, t = t.shape[1], t[:, None, :, None]
    K = torch.eye(n, dtype=P.dtype, device=P.device) - t * P[..., :n, :n] * t.mT
    factor, info = torch.linalg.cholesky_ex(K)
    failed = (info != 0) | ~torch.isfinite(factor.abs()).flatten(2).all(2)
    if bool(failed.any()):  # no value of the search: any factor will do
        factor = torch.where(failed[..., None, None], torch.eye(n, dtype=P.dtype, device=P.device), factor)
    barrier = 2 * factor.diagonal(dim1=-2, dim2=-1).real.log().sum(2)
    return torch.where(failed, -torch.inf, barrier).mean(1), torch.cholesky_inverse(factor)


def _barrier_pull(t: Tensor, inverse: Tensor, weight: float) -> tuple[State, Float64[Tensor, "problems n"]]:
    """The gradients of -weight * barrier by P_vv and log T."""
    each, t = weight / inverse.shape[1], t[:, None, :, None]
    slope = (inverse.diagonal(dim1=-2, dim2=-1).real - 1).sum(1)
    return each * t * inverse * t.mT, each * slope


def _grow(P: State, t: Float64[Tensor, "problems n"]) -> tuple[State, Tensor, Tensor]:
    """P + P_:v t K^-1 t P_v: with K = I - t P_vv t, the barrier, and K^-1.

    Where the state is v alone and t > 0 it is (K^-1 - I) / (t t^T), without a product of matrices.
    """
    n, (barrier, inverse) = t.shape[1], _barrier(P, t)
    t = t[:, None, :, None]
    if _alone(P, t):
        grown = inverse.clone()
        grown.diagonal(dim1=-2, dim2=-1).sub_(1)
        return grown.div_(t).div_(t.mT), barrier, inverse
    scaled = t * P[..., :n, :]
    return P + scaled.mH @ (inverse @ scaled), barrier, inverse


def _alone(P: State, t: Tensor) -> bool:
    return P.shape[-1] == t.shape[2] and bool((t > 0).all())


def _grow_pull(
    grad: State, t: Tensor, P: State, inverse: Tensor, weight: float
) -> tuple[State, Float64[Tensor, "problems n"]]:
    """The gradients by P and log T; with H = I + e_v t K^-1 t P_v: it is H grad H^H for P."""
    n, (back, slope) = t.shape[1], _barrier_pull(t, inverse, weight)
    t = t[:, None, :, None]
    if _alone(P, t):  # H = t K^-1 / t
        inner = grad / t / t.mT
        left = inverse @ inner
        both = left @ inverse
        grown = (both - 2 * left + inner).diagonal(dim1=-2, dim2=-1).real
        return back + both * t * t.mT, slope + grown.sum(1)
    H = t * (inverse @ (t * P[..., :n, :]))  # H - I in the rows of v
    rows = P[..., :n, :] + P[..., :n, :n] @ H  # of the grown state
    across = grad.clone()
    across[..., :n, :] += H @ grad
    whole = across.clone()
    whole[..., :n] += across @ H.mH
    whole[..., :n, :n] += back
    return whole, slope + (t[..., 0].square() * ((rows @ grad) * rows.conj()).sum(3).real).sum(1)


def _grow_bound(P: State, T: Float64[Tensor, "problems n"]) -> State:
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
        zw, sw, rw, nw = (_times(part, w) for part in (absolute, scaled.abs(), rest, noise))
        down = [part.mT for part in (scaled.abs(), absolute, rest, noise)]
        found = terms * (_times(P.abs(), w) + _times(down[0], zw) + _times(down[1], sw))
        found += terms * (_times(down[2], zw) + _times(down[1], rw))
        found += _times(down[3], zw) + _times(down[1], nw)
        return found + _times(down[2], rw) / least[..., None]

    grown = _settled(product, errors)
    return torch.where(sure[..., None, None], grown, torch.nan)


@dataclass(frozen=True, eq=False)
class _Sizes:
    """|G| and the error of G, for bounds of |G| |P| |G|^T w without that matrix."""

    G: Tensor
    error: Tensor | None

    def around(self, through: Any, w: Tensor, terms: int) -> Tensor:
        """Return an upper bound of E w, E the error of the float G P G^H; ``through(v)`` is |P| v."""
        G = self.G.abs()
        found = gamma(2 * terms + 32, torch.float64) * _times(G, through(_times(G.mT, w)))
        if self.error is not None:
            e = self.error
            found = found + _times(e, through(_times(G.mT, w) + _times(e.mT, w))) + _times(G, through(_times(e.mT, w)))
        return found


def _times(M: Tensor, v: Tensor) -> Tensor:
    """M v for stacks of matrices and vectors."""
    return (M @ v[..., None])[..., 0]


def _settled(Q: State, errors: Any) -> State:
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
