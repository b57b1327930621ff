"""Penalties to train with: certified upper bounds of spectral norms that are differentiable in the weights.

Gram iteration: G <- G^H G doubles the exponent of every singular value, and ||G||_F bounds the largest one, so
||W|| <= ||G_t||_F^(1 / 2^t) at every step t, falling to ||W|| at least as fast as rank^(1 / 2^(t + 1)).
Reference: Delattre, Barthelemy, Araujo, Allauzen, "Efficient bound of Lipschitz constant for convolutional layers by
Gram iteration" (2023), arXiv 2305.16173.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64, Inexact
from torch import Tensor, nn

from certify.errors import InvalidInput
from certify.graph import Graph, trace
from certify.lipschitz.spectral import block_error, fourier_blocks, torus_phases
from certify.ops.conv import Conv, ConvTranspose
from certify.ops.linear import Linear
from certify.rounding import gamma
from certify.training import evaluating

#: Steps of Gram iteration: rank^(1 / 2^(t + 1)) is below 1.0042 for ranks up to 5000.
_STEPS = 10
#: Entries of Fourier blocks held at once.
_CHUNK = 2**19


def norm_penalty(model: nn.Module, input_shape: tuple[int, ...]) -> Float64[Tensor, ""]:
    """Return the sum of certified upper bounds of the spectral norms of all dense layers and convolutions.

    For ``loss + 1e-3 * certify.penalties.norm_penalty(model, (1, 28, 28))``: float64, differentiable in the weights.
    Each bound is within 1 % of the norm, for convolutions of that on a torus (``convolution_norm``), whatever the
    stride; a layer counts as often as the model applies it. The model may be in train mode. Raises ``InvalidInput``
    for a model without such layers, and what tracing the model raises.
    """
    example = next(model.parameters(), torch.zeros(()))
    with evaluating(model):
        graph = trace(model, example.detach().new_zeros((1, *input_shape)), live=torch.is_grad_enabled())
    found = [bound for name in graph.nodes if (bound := _layer(graph, name)) is not None]
    if not found:
        raise InvalidInput("a model without dense layers and convolutions", "one whose norms can be penalised")
    return torch.stack(found).sum()


def _layer(graph: Graph, name: str) -> Tensor | None:
    """The bound of a node, None for other operations; a transposed convolution has the norm of its adjoint."""
    node = graph.nodes[name]
    if isinstance(node.rule, Linear):
        return gram_bound(node.rule.weight.double()[None])
    if isinstance(node.rule, Conv | ConvTranspose):
        sizes = (node.shape if isinstance(node.rule, ConvTranspose) else graph.shape(node.inputs[0]))[1:]
        return _convolution(node.rule.weight.double(), sizes, node.rule.dilation, node.rule.groups)
    return None


def _convolution(weight: Tensor, sizes: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> Tensor:
    """The bound of the largest Fourier block; only that one is kept for the gradient."""
    kernel = tuple(weight.shape[2:])
    torus = [n + d * (k - 1) for n, d, k in zip(sizes, dilation, kernel, strict=True)]
    taps = weight.unflatten(0, (groups, -1)).flatten(3)
    chunk = max(1, _CHUNK // taps[..., 0].numel())
    best, place = -1.0, (torch.zeros(0), 0)
    with torch.no_grad():
        for phases in torus_phases(torus, dilation, kernel, chunk):
            top = _gram_bounds(fourier_blocks(taps, phases)).max(0)
            if float(top.values) > best:
                best, place = float(top.values), (phases[int(top.indices) // groups], int(top.indices) % groups)
        error = block_error(taps)
    return gram_bound(fourier_blocks(taps[place[1]][None], place[0][None])) + error


def gram_bound(blocks: Inexact[Tensor, "n rows columns"]) -> Float64[Tensor, ""]:
    """Return an upper bound of the largest singular value of all blocks, rounding included; differentiable."""
    return _gram_bounds(blocks).max()


def _gram_bounds(blocks: Inexact[Tensor, "n rows columns"]) -> Float64[Tensor, "n"]:
    """One bound per block.

    With ||G||_F = 1 before a product, what the product rounds is at most gamma, relative to a norm of 1 / rank or
    more; the roots make it rank gamma (1 + 1/2 + 1/4 + ...) in all.
    """
    size = float(blocks.detach().abs().max()) if blocks.numel() else 0.0
    if size == 0:
        return blocks.abs().sum((1, 2)) * 0
    unit = 2.0 ** math.frexp(size)[1]  # keeps squares away from overflow
    G = (blocks.mH if blocks.shape[1] < blocks.shape[2] else blocks) / unit
    power = torch.zeros(len(G), dtype=torch.float64, device=G.device)
    for step in range(_STEPS):
        norm = torch.linalg.matrix_norm(G).clamp(min=1e-150)
        power = power + norm.log() / 2**step
        G = G / norm[:, None, None]
        G = G.mH @ G
    power = power + torch.linalg.matrix_norm(G).clamp(min=1e-150).log() / 2**_STEPS
    rank = min(blocks.shape[1:])
    slack = 4 * rank * gamma(8 * max(blocks.shape[1:]) + 64, torch.float64)
    return power.exp() * (unit * (1 + slack))
