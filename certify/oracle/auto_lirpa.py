"""auto-lirpa as an independent oracle: the same questions, answered by another code.

For cross-checks in tests and benchmarks. It knows no float contract: its answers hold in real arithmetic.
Reference: Xu et al., "Automatic perturbation analysis for scalable certified robustness" (2020), version 0.3.
"""

from __future__ import annotations

import copy
import importlib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from certify.enclosures import Interval
from certify.errors import InvalidInput, UnsupportedOperation, unknown_name
from certify.graph import Graph
from certify.oracle.compat import auto_lirpa
from certify.registry import register_method
from certify.rounding import Arithmetic, Real
from certify.sets import LpBall, PerturbationSet
from certify.specs import Spec

METHODS = ("ibp", "crown-ibp", "crown")


def margins(
    model: nn.Module, domain: PerturbationSet, spec: Spec, method: str = "crown"
) -> Float[Tensor, "batch rows"]:
    """Return the oracle's lower bounds of the rows C y + d over the domain, in the model's dtype.

    Domains: ``Box``, ``LpBall`` with p = inf, or p = 2 without clip. Raises ``InvalidInput`` for others
    and for unknown methods, ``MissingDependency`` without auto-lirpa, ``UnsupportedOperation`` where it fails.
    """
    return _rows(model, domain, spec, method).lower


def output_bounds(model: nn.Module, domain: PerturbationSet, method: str = "crown") -> Interval:
    """Return the oracle's bounds of the outputs [batch, outputs]."""
    return _solve(model, domain, None, method)[1]


def intermediate_bounds(model: nn.Module, domain: PerturbationSet, method: str = "crown") -> list[Interval]:
    """Return the oracle's intervals [batch, *shape] of its activations' (and max-pools') inputs, in order."""
    network, _ = _solve(model, domain, None, method)
    base = importlib.import_module(type(network).__module__).BoundActivation
    read = [node.inputs[0] for node in network._modules.values() if isinstance(node, base)]
    return [Interval(node.lower.detach().clone(), node.upper.detach().clone()) for node in read]


@dataclass(frozen=True)
class AutoLiRPA:
    """The oracle as a bound method: "auto-lirpa/ibp", "auto-lirpa/crown-ibp" or "auto-lirpa/crown"."""

    method: str

    @property
    def name(self) -> str:
        """The registered name."""
        return f"auto-lirpa/{self.method}"

    def bound(self, graph: Graph, domain: PerturbationSet, spec: Spec, arithmetic: Arithmetic) -> Interval:
        """Return lower and upper bounds [batch, rows] of the spec's rows, float64.

        Raises ``InvalidInput`` for any arithmetic but ``Real``.
        """
        if not isinstance(arithmetic, Real):
            raise InvalidInput(
                f"method {self.name!r} with arithmetic {arithmetic.name!r}",
                "real arithmetic: auto-lirpa ignores rounding",
                f"arithmetic='real', or method={self.method!r} for the float contract",
            )
        return _rows(graph.model, domain, spec, self.method).double()


for _method in METHODS:
    register_method(f"auto-lirpa/{_method}")(partial(AutoLiRPA, _method))


def _rows(model: nn.Module, domain: PerturbationSet, spec: Spec, method: str) -> Interval:
    """Bounds of C y + d, lower and upper, from one pass with C merged into the last layer."""
    if spec.batch != domain.batch:
        raise InvalidInput(f"a spec for {spec.batch} samples and a domain of {domain.batch}", "one claim per sample")
    rows = _solve(model, domain, spec.C, method)[1]
    return Interval(rows.lower + spec.d, rows.upper + spec.d)


def _solve(model: nn.Module, domain: PerturbationSet, C: Tensor | None, method: str) -> tuple[Any, Interval]:
    """auto-lirpa's network after the computation, and the bounds of C y (of y for None).

    Its fast convolutions fail where they are grouped or follow a division; the dense form gives equal numbers.
    """
    if method not in METHODS:
        raise unknown_name("auto-lirpa method", method, METHODS)
    with auto_lirpa() as package, _default_dtype(domain.center.dtype), torch.no_grad():
        inputs = _perturbed(package, domain, method)
        try:
            return _attempt(package, model, inputs, C, method, "patches")
        except Exception:
            try:
                return _attempt(package, model, inputs, C, method, "matrix")
            except Exception as error:
                raise _failure(error) from error


def _attempt(
    package: types.ModuleType, model: nn.Module, inputs: Any, C: Tensor | None, method: str, conv_mode: str
) -> tuple[Any, Interval]:
    """Convert a copy (the conversion changes modes and prints about dropout) and bound it."""
    twin = _without_dropout(copy.deepcopy(model).eval())
    example, options = torch.zeros_like(inputs.data), {"conv_mode": conv_mode}
    network = package.BoundedModule(twin, example, bound_opts=options, device=example.device)
    lower, upper = network.compute_bounds(x=(inputs,), C=C, method=method)
    return network, Interval(lower.detach(), upper.detach())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """auto-lirpa's identity matrices follow torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _without_dropout(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _without_dropout(child))
    return nn.Identity() if isinstance(module, nn.modules.dropout._DropoutNd) else module


def _perturbed(package: types.ModuleType, domain: PerturbationSet, method: str) -> Any:
    """The domain as auto-lirpa's tensor. Its IBP takes l2 balls for points: it gets the box."""
    box = domain.interval()
    ball = isinstance(domain, LpBall) and domain.p == 2 and _whole(domain)
    if not (domain.is_box or ball):
        raise InvalidInput(
            f"a {type(domain).__name__} that auto-lirpa cannot express",
            "a Box, or an LpBall with p=inf, or p=2 without clip",
            "our own methods take every set",
        )
    if isinstance(domain, LpBall) and ball and method == "crown":
        radius = domain.radius.to(domain.center.dtype).view(-1, 1)
        norm = package.PerturbationLpNorm(norm=2, eps=radius)
    else:
        norm = package.PerturbationLpNorm(norm=torch.inf, x_L=box.lower, x_U=box.upper)
    return package.BoundedTensor(domain.center, norm)


def _whole(ball: LpBall) -> bool:
    """Whether the data range cuts nothing off the ball."""
    radius = ball.radius.view(-1, *[1] * (ball.center.ndim - 1))
    center = ball.center.double()
    return bool((ball.hull.lower <= center - radius).all() & (ball.hull.upper >= center + radius).all())


def _failure(error: Exception) -> UnsupportedOperation:
    text = str(error).splitlines()[0] if str(error) else "no message"
    return UnsupportedOperation(
        f"auto-lirpa fails on this model: {type(error).__name__}: {text[:200]}",
        "operations that version 0.3 knows",
        "method='crown' is our own and needs no auto-lirpa",
    )
