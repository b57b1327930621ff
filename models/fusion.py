"""Compiled sums of Gaussians: one loop over x forward and one backward, where a compiler is at hand.

The formulas are those of models/recursion.py. The first call of a form compiles for some seconds, so modules ask for
it: see ``models.fuse``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from models import direct, recursion
from models.plan import Plan

#: Inductor would store E and t, which many outputs read, in memory of the size of x; to compute on is cheaper.
COUNTS = ("opcount", "reads", "opusers", "acc_reads")
OPTIONS: dict[str, Any] = {f"realize_{count}_threshold": 2**20 for count in COUNTS}

#: Compiled forms of a formula at most: sizes of 1, layouts, dtypes and groupings have forms of their own.
FORMS = 64

_broken: list[str] = []


def values(x: Tensor, terms: Tensor, plan: Plan) -> Tensor:
    """Return ``recursion.values``, compiled if that is possible."""
    out = torch.empty_like(x)
    done = _run(_values_into, x, out, terms, plan.numbers, plan.groups)
    return out if done else recursion.values(x, terms, plan)


def pull_back(grad: Tensor, x: Tensor, terms: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return ``recursion.pull_back``, compiled if that is possible: block by block, in a fixed order."""
    dx, sums = torch.empty_like(x), x.new_zeros(len(terms), x.shape[1])
    slopes = terms * plan.lean[:, None, None]
    for rows, columns, places in recursion.blocks(x):
        block = (rows, columns, places)
        part = sums[:, columns]
        a, b = ((v[:, columns] if v.shape[1] > 1 else v) for v in (terms, slopes))
        if not _run(_pull_back_into, grad[block], x[block], dx[block], part, a, b, plan.numbers, plan.groups):
            return recursion.pull_back(grad, x, terms, plan)
    return dx, sums


def direct_values(x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor) -> Tensor:
    """Return ``direct.values``, compiled if that is possible."""
    out = torch.empty_like(x)
    done = _run(_direct_values_into, x, out, alpha, dictionary, gamma)
    return out if done else direct.values(x, alpha, dictionary, gamma)


def direct_pull_back(
    grad: Tensor, x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor, *, needed: tuple[bool, ...]
) -> direct.Gradients:
    """Return ``direct.pull_back``, compiled if that is possible: block by block, in a fixed order."""
    dx, da, dd, dgamma = (torch.zeros_like(value) for value in (x, alpha, dictionary, gamma))
    for block in recursion.blocks(x):
        rows = block[1] if len(alpha) > 1 else slice(None)
        parts = (dx[block], da[rows], dd, dgamma)
        if not _run(_direct_pull_back_into, grad[block], x[block], alpha[rows], dictionary, gamma, *parts):
            return direct.pull_back(grad, x, alpha, dictionary, gamma, needed=needed)
    return dx, da, dd, dgamma


def _direct_values_into(x: Tensor, out: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor) -> None:
    out.copy_(direct.values_pure(x, alpha, dictionary, gamma))


def _direct_pull_back_into(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    dictionary: Tensor,
    gamma: Tensor,
    dx: Tensor,
    *sums: Tensor,
) -> None:
    found, *more = direct.pull_back_pure(grad, x, alpha, dictionary, gamma)
    dx.copy_(found)
    for total, part in zip(sums, more, strict=True):
        total.add_(part)


def _values_into(x: Tensor, out: Tensor, terms: Tensor, numbers: Tensor, groups: recursion.Groups) -> None:
    out.copy_(recursion.values_pure(x, terms, numbers, groups))


def _pull_back_into(
    grad: Tensor,
    x: Tensor,
    dx: Tensor,
    sums: Tensor,
    terms: Tensor,
    slopes: Tensor,
    numbers: Tensor,
    groups: recursion.Groups,
) -> None:
    found, more = recursion.pull_back_pure(grad, x, terms, slopes, numbers, groups)
    dx.copy_(found)
    sums.add_(more)


@cache
def _compiled(formula: Callable[..., None]) -> Callable[..., Any]:
    return torch.compile(formula, dynamic=True, fullgraph=True, options=OPTIONS)


def _run(formula: Callable[..., None], *arguments: Any) -> bool:
    """Run a compiled formula that writes its results; False, and one warning, where it cannot be compiled."""
    if _broken:
        return False
    plain = (value.detach() if isinstance(value, Tensor) else value for value in arguments)  # no .grad to guard
    try:
        with torch._dynamo.config.patch(recompile_limit=FORMS):
            _compiled(formula)(*plain)
    except Exception as error:  # compilers fail in many ways; the eager sum is the answer to all of them
        _broken.append(str(error))
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"fused KAFs run unfused, for torch.compile failed: {reason}", RuntimeWarning, stacklevel=2)
        return False
    return True
