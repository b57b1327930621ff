"""The other direction: the worst input of every row, and what it becomes when it is pushed forward through lines.

A row's bound is its value at one input x*, so the derivative of the bound by the coefficients over a node is the
node's value at x*. Values are kept without the constants that ride along (see state.py), as coefficients expect them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from certify.enclosures import Relaxation
from certify.graph import INPUT, Node
from certify.ops.base import Elementwise, inner
from certify.propagate.backward import Rows


def worst(rows: Rows, name: str, A: Tensor) -> Tensor:
    """Return where, in the domain or the box of the entry ``name``, each row's linear function is smallest."""
    domain = rows.knowledge.domain
    if name != INPUT or domain.is_box:
        hull, _ = rows.knowledge.hull(name)
        lower, upper = (rows.of_sample(name, end.to(A.dtype)) for end in (hull.lower, hull.upper))
        return torch.lerp(upper, lower, (A > 0).to(A.dtype))
    sample = rows.sample if rows.groups is None else rows.groups.sample
    every = domain.take(sample.repeat_interleave(A.shape[1]))
    return every.steepest(-A.flatten(0, 1)).unflatten(0, A.shape[:2])


def whole(rows: Rows, name: str, v: Tensor) -> Tensor:
    """Return the values of node ``name`` whose pulled-back part is v."""
    constant = rows.knowledge.rider(name).constant
    return v if constant is None else v + rows.of_sample(name, constant.to(v.dtype))


def met(rows: Rows, node: Node, values: dict[str, Tensor]) -> list[Tensor]:
    """Return what the coefficients of ``node`` met over its inputs: values, or their parts where constants ride on."""
    bare = node.rule.carries or isinstance(node.rule, Elementwise)
    return [values[name] if bare else whole(rows, name, values[name]) for name in node.inputs]


def on_lines(node: Node, A: Tensor, lines: Relaxation, v: Tensor) -> Tensor:
    """Return the values at v of the lines that the rows choose: d/dA of what ``pull_back`` makes of <A, y>."""
    with torch.enable_grad():
        A = A.detach().requires_grad_()
        (pulled,), constant = node.rule.pull_back(A, lines)
        total = inner(pulled, v).sum()
        return torch.autograd.grad(total if constant is None else total + constant.sum(), A)[0]
