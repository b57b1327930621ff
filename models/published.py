"""Kernel activation functions from weights that others published."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from certify.errors import InvalidInput
from models.kaf import CONVENTIONS, KAF


def from_authors(state: Mapping[str, Tensor]) -> KAF:
    """Return the KAF of a layer's state_dict as the authors' PyTorch code writes it.

    ``alpha`` is [1, channels, size], or [1, channels, 1, 1, size] for convolutions; ``dict`` has ``size`` points; the
    bandwidth is 1 / (8 step^2), their convention, unless there is a ``gamma``. Raises ``InvalidInput`` otherwise.
    """
    missing = [name for name in ("alpha", "dict") if name not in state]
    if missing:
        raise InvalidInput(f"a layer without {missing[0]!r}, with {sorted(state)}", "alpha and dict", "KAF(channels)")
    alpha, points = state["alpha"].detach(), state["dict"].detach().flatten()
    size = len(points)
    valid = alpha.ndim in (3, 5) and alpha.shape[0] == 1 and alpha.shape[-1] == size >= 2
    if not valid or alpha.numel() != alpha.shape[1] * size:
        raise InvalidInput(
            f"alpha of shape {tuple(alpha.shape)} with a dictionary of {size} points",
            "[1, channels, size] or [1, channels, 1, 1, size]",
            "one layer's part of the state_dict",
        )
    step = float((points[-1] - points[0]).abs()) / (size - 1)
    inverse = 1 / float(state["gamma"]) if "gamma" in state else CONVENTIONS["authors"].scale * step**2
    if not 0 < inverse < torch.inf:
        raise InvalidInput(f"1 / gamma = {inverse}", "a positive number", "a dictionary of different points")
    gamma = 1 / inverse
    kaf = KAF(alpha.shape[1], size=size, convention="authors", gamma=gamma).to(alpha.dtype)
    with torch.no_grad():
        kaf.alpha.copy_(alpha.reshape(-1, size))
        kaf.dictionary.copy_(points)
    return kaf
