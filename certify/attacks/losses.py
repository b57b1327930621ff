"""What attacks raise: losses of the rows that must stay positive.

A loss takes rows [points, rows] and goals [points]: the row that a point aims at, or -1 for all of them at once. Logits
up to a constant are (0, -rows), the true class first, so that classification's losses need no labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify.errors import InvalidInput

#: A loss to be raised, per point, from its rows and its goal.
Loss = Callable[[Float64[Tensor, "points rows"], Int[Tensor, "points"]], Float64[Tensor, "points"]]

#: Keeps quotients finite where logits tie.
TINY = 1e-12


def margin(rows: Float64[Tensor, "points rows"], goal: Int[Tensor, "points"]) -> Float64[Tensor, "points"]:
    """Return -min row, or minus the goal's row: positive where the claim is broken."""
    return -torch.where(goal < 0, rows.amin(1), _aimed_at(rows, goal))


def cross_entropy(rows: Float64[Tensor, "points rows"], goal: Int[Tensor, "points"]) -> Float64[Tensor, "points"]:
    """Return log sum exp(-rows), which rises exactly where cross-entropy log(1 + sum exp(-rows)) does.

    Its gradient has the same direction and never vanishes, however confident the network is.
    """
    return torch.where(goal < 0, torch.logsumexp(-rows, 1), -_aimed_at(rows, goal))


def logits_ratio(rows: Float64[Tensor, "points rows"], goal: Int[Tensor, "points"]) -> Float64[Tensor, "points"]:
    """Return the difference of logits ratio: minus the row over the spread of the largest logits.

    It does not change when logits are shifted or scaled. Without a goal the spread is z1 - z3, with one
    z1 - (z3 + z4) / 2, for the sorted logits z1 >= z2 >= ... Raises ``InvalidInput`` for fewer than two rows.
    Reference: Croce, Hein, "Reliable evaluation of adversarial robustness ..." (2020), equations 6 and 7.
    """
    if rows.shape[1] < 2:
        raise InvalidInput("the loss 'dlr' for a claim of one row", "two rows (three classes) or more", "loss='margin'")
    top = torch.cat([torch.zeros_like(rows[:, :1]), -rows], 1).topk(min(4, rows.shape[1] + 1), 1).values
    free = top[:, 0] - top[:, 2]
    aimed = top[:, 0] - (top[:, 2] + top[:, -1]) / 2
    return margin(rows, goal) / (torch.where(goal < 0, free, aimed) + TINY)


LOSSES: dict[str, Loss] = {"margin": margin, "ce": cross_entropy, "dlr": logits_ratio}


def _aimed_at(rows: Tensor, goal: Tensor) -> Tensor:
    return rows.gather(1, goal.clamp(min=0)[:, None])[:, 0]
