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
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float64, Int, Num
from torch import Tensor

from certify.lipschitz.hermitian import (
    FEW,
    Sizes,
    State,
    grow,
    grow_bound,
    grow_pull,
    log_det,
    log_det_pull,
    settled,
    times,
)
from certify.rounding import gamma

INNER = 0.1  # a search begins at least this far, relatively, inside the feasible set


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
            return self._gram[None].expand(self.problems, -1, -1, -1), None
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
        size = Sizes(self.G, self.error)
        found = settled(product, lambda w: size.around(lambda v: d[:, None] * v, w, 2 * self.G.shape[2]))
        return found.expand(self.problems, -1, -1, -1)

    def take(self, index: Tensor) -> Source:
        return replace(self, problems=len(index))

    @cached_property
    def _gram(self) -> Tensor:
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
        size, magnitude = Sizes(self.G, self.error), P.abs()
        return settled(self.G @ P @ self.G.mH, lambda w: size.around(lambda v: times(magnitude, v), w, 4 * P.shape[-1]))

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
        return settled(self.forward(P, T)[0], lambda w: times(total, w))


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
        size, magnitude = Sizes(self.G, self.error), P.abs()

        def errors(w: Tensor) -> Tensor:
            terms = 4 * P.shape[-1] + P.shape[1]
            parts = size.around(lambda v: times(magnitude, v), w.expand(-1, P.shape[1], -1), terms)
            return (parts * self.weights[:, None]).sum(1, keepdim=True)

        return settled(self.forward(P, T)[0], errors)


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

    @cached_property
    def live(self) -> Tensor:
        """The neurons that are not linear."""
        return self.r > 0

    @cached_property
    def _all_live(self) -> bool:
        return bool(self.live.all())

    def _alone(self, P: State) -> bool:
        """Whether the state is these neurons and nothing else, all with multipliers."""
        return P.shape[-1] == self.size and self._all_live

    def forward(self, P: State, log_s: Tensor) -> tuple[State, Any]:
        n, live = self.size, self.live
        S, scale = _in_units(P, log_s, live)
        t = torch.where(live, S.rsqrt(), 0)
        out, barrier, inverse = grow(P, t, alone=self._alone(P))
        out[..., :n, :] *= self.c[:, None, :, None]
        out[..., :, :n] *= self.c[:, None, None, :]
        out.diagonal(dim1=-2, dim2=-1)[..., :n] += torch.where(live, self.r.square() * S, 0)[:, None]
        return out, (barrier, scale, S, t, P, inverse)

    def barrier(self, memory: Any) -> Tensor:
        return memory[0]

    def pull(self, grad: State, memory: Any, weight: float) -> tuple[State, Tensor]:
        n, live = self.size, self.live
        _, scale, S, t, P, inverse = memory
        fresh = torch.where(live, self.r.square() * S * grad.diagonal(dim1=-2, dim2=-1)[..., :n].real.sum(1), 0)
        G = grad.clone()
        G[..., :n, :] *= self.c[:, None, :, None]
        G[..., :, :n] *= self.c[:, None, None, :]
        back, slope = grow_pull(G, t, P, inverse, weight, alone=self._alone(P))
        slope = torch.where(live, fresh - slope, 0)  # by log S = -log T
        back.diagonal(dim1=-2, dim2=-1)[..., :n] += _share(slope, scale, live, grad.shape[1])
        return back, slope

    def bound(self, P: State, T: Tensor) -> State:
        n, live = self.size, self.live
        grown = grow_bound(P, torch.where(live, T, 0))
        c = torch.nn.functional.pad(self.c, (0, P.shape[-1] - n), value=1.0)[:, None]
        scaled = grown * c[..., :, None] * c[..., None, :]
        magnitude = scaled.abs() * FEW
        out = settled(scaled, lambda w: times(magnitude, w))
        r = self.r * (1 + FEW) + self.c.abs() * 2.0**-52  # c + [-r, r] holds the slopes whatever c was rounded to
        fresh = torch.where(live, torch.where(T > 0, r.square() / T * (1 + FEW), torch.inf), 0)
        out.diagonal(dim1=-2, dim2=-1)[..., :n] += fresh[:, None]
        out.diagonal(dim1=-2, dim2=-1).mul_(1 + FEW)
        return out

    def centre(self, P: State) -> Tensor:
        """lambda_max (1 + |c| / r), the best multiple: it turns P <= lambda_max into P' <= (|c| + r)^2 lambda_max."""
        ratio = (self.c.abs() / self.r.clamp(min=1e-300)).clamp(INNER, 1e6)
        return _log_top(P[..., : self.size, : self.size], self.live)[:, None] + torch.log1p(ratio)

    def absolute(self, P: State, log_s: Tensor) -> Tensor:
        return torch.where(self.live, _in_units(P, log_s, self.live)[0], torch.inf)

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
        S, scale = _in_units(P, log_s[:, self.group], self._all(P))
        barrier, inverse = log_det(P, S.rsqrt())
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
        back, inner = log_det_pull(S.rsqrt(), inverse, weight)
        slope = slope.index_add(1, self.group, -inner)
        back.diagonal(dim1=-2, dim2=-1).add_(_share(slope, scale, self._all(P), P.shape[1]))
        return back, slope

    def bound(self, P: State, T: Tensor) -> State:
        passed = torch.isfinite(grow_bound(P, T[:, self.group]).diagonal(dim1=-2, dim2=-1).real).flatten(1).all(1)
        variance = self.gain.square()[:, None] / T * (1 + 4 * FEW)
        return self._diagonal(torch.where(passed[:, None] & (T > 0), variance, torch.inf))

    def centre(self, P: State) -> Tensor:
        return _log_top(P, self._all(P))[:, None].expand(-1, self.size) + math.log1p(INNER)

    def absolute(self, P: State, log_s: Tensor) -> Tensor:
        return log_s.exp() * _in_units(P, log_s[:, self.group], self._all(P))[1][:, None]

    def take(self, index: Tensor) -> Renew:
        return replace(self, gain=self.gain[index])

    @staticmethod
    def _all(P: State) -> Tensor:
        return torch.ones(len(P), P.shape[-1], dtype=torch.bool, device=P.device)


def _in_units(P: State, log_s: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
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
    return (largest / _in_units(P, live.double(), live)[1]).log()


def _share(slope: Tensor, scale: Tensor, live: Tensor, blocks: int) -> Tensor:
    """The gradient of the diagonal [problems, 1, n] through the unit of S."""
    each = slope.sum(1) / scale / live.sum(1).clamp(min=1) / blocks
    return (each[:, None] * live)[:, None]
