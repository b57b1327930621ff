"""``lipschitz_constant``: one question, several estimators, each saying on which side of the truth it stands."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from certify.errors import InvalidInput
from certify.graph import Graph, trace
from certify.registry import ESTIMATORS, lookup
from certify.results import LipschitzEstimate
from certify.sets import PerturbationSet
from certify.specs import Spec


@dataclass(frozen=True, eq=False)
class Question:
    """What an estimator is asked; everything in float64.

    ``graph`` is traced from a float64 copy of the model; ``domain`` None means the whole space, ``spec`` None the
    output vector.
    """

    graph: Graph
    p: float
    domain: PerturbationSet | None
    spec: Spec | None


@runtime_checkable
class Estimator(Protocol):
    """A way to estimate a Lipschitz constant."""

    def estimate(self, question: Question) -> LipschitzEstimate:
        """Return a value with its side."""
        ...


def lipschitz_constant(
    model: nn.Module,
    *,
    p: float = 2,
    domain: PerturbationSet | None = None,
    spec: Spec | None = None,
    method: str | Estimator = "recursion",
    input_shape: tuple[int, ...] | None = None,
) -> LipschitzEstimate:
    """Return an estimate of the least L with ||y(x) - y(x')||_p <= L ||x - x'||_p, p = 2 or inf.

    With ``domain`` for x, x' in the set of each sample (value: the largest of the batch), else everywhere on inputs
    of ``input_shape``. With ``spec`` |row(x) - row(x')| <= L ||x - x'||_p row by row (``rows`` [batch][rows]).
    ``method`` is a registered name ("recursion", "product": upper, "jacobian": lower, ...) or an instance with
    options. The constant is that of the real function with the model's weights, computed in float64. Raises
    ``InvalidInput`` for other p or a missing shape, and what tracing the model raises.
    """
    question = ask(model, p=p, domain=domain, spec=spec, input_shape=input_shape)
    return (lookup("method", ESTIMATORS, method)() if isinstance(method, str) else method).estimate(question)


def ask(
    model: nn.Module,
    *,
    p: float = 2,
    domain: PerturbationSet | None = None,
    spec: Spec | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Question:
    """Return the question of ``lipschitz_constant`` about a float64 copy of the model."""
    if p not in (2, torch.inf):
        raise InvalidInput(f"p = {p!r}", "p = 2 or inf", "p=2")
    shape = input_shape if domain is None else domain.shape
    if shape is None:
        raise InvalidInput("neither domain nor input_shape", "one of them", "input_shape=(1, 28, 28)")
    if domain is not None and spec is not None and domain.batch != spec.batch:
        raise InvalidInput(f"a spec for {spec.batch} samples and a domain of {domain.batch}", "one claim per sample")
    twin = copy.deepcopy(model).double()
    device = next((weight.device for weight in twin.parameters()), torch.device("cpu"))
    graph = trace(twin, torch.zeros((1, *shape), dtype=torch.float64, device=device))
    outputs = torch.Size(graph.shape(graph.output)).numel()
    if spec is not None and spec.C.shape[2] != outputs:
        raise InvalidInput(
            f"a spec for {spec.C.shape[2]} outputs and a model with {outputs}", "C [batch, rows, outputs]"
        )
    return Question(
        graph,
        float(p),
        None if domain is None else domain.double(),
        None if spec is None else spec.to(torch.float64, device),
    )
