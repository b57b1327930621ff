"""auto-lirpa as an independent oracle: the same questions, answered by another code.

For cross-checks in tests and benchmarks. It knows no float contract: its answers hold in real arithmetic. Activations
that it does not know are bounded on our lines (custom.py): there the propagation alone is independent.
Reference: Xu et al., "Automatic perturbation analysis for scalable certified robustness" (2020), version 0.3.
"""

from __future__ import annotations

import copy
import importlib
import traceback
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
from certify.errors import CertifyError, InvalidInput, UnsupportedOperation, unknown_name
from certify.graph import Graph
from certify.oracle.compat import auto_lirpa, gradients
from certify.oracle.custom import OPERATION, bound_class, with_stand_ins
from certify.registry import register_method
from certify.rounding import Arithmetic, Real
from certify.sets import LpBall, PerturbationSet
from certify.shapes import beside
from certify.specs import Spec

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")

#: Options of the attempts: the fast form, then a slow one of equal or better numbers where that fails, as it does
#: on grouped convolutions, convolutions after a division, and ReLU beside other activations. Sparse alphas crash
#: where most but not all neurons of a layer are unstable.
ATTEMPTS = (
    {"conv_mode": "patches", "sparse_features_alpha": False},
    {"conv_mode": "matrix", "sparse_features_alpha": False, "sparse_intermediate_bounds": False},
)


def margins(
    model: nn.Module, domain: PerturbationSet, spec: Spec, method: str = "crown", *, steps: int = 20
) -> Float[Tensor, "batch rows"]:
    """Return the oracle's lower bounds of the rows C y + d over the domain, in the model's dtype.

    Domains: ``Box``, ``LpBall`` with p = inf, or p = 2 without clip. ``steps`` are those of "alpha-crown". Raises
    ``InvalidInput`` for other domains and for unknown methods, ``MissingDependency`` without auto-lirpa,
    ``UnsupportedOperation`` with its reason where it fails.
    """
    return AutoLiRPA(method, steps).rows(model, domain, spec).lower


def output_bounds(model: nn.Module, domain: PerturbationSet, method: str = "crown") -> Interval:
    """Return the oracle's bounds of the outputs [batch, outputs]."""
    return AutoLiRPA(method).solve(model, domain, None)[1]


def intermediate_bounds(model: nn.Module, domain: PerturbationSet, method: str = "crown") -> list[Interval]:
    """Return the oracle's intervals [batch, *shape] of its activations' (and max-pools') inputs, in order."""
    network, _ = AutoLiRPA(method).solve(model, domain, None)
    base = importlib.import_module(type(network).__module__).BoundActivation
    read = [node.inputs[0] for node in network._modules.values() if isinstance(node, base)]
    return [Interval(node.lower.detach().clone(), node.upper.detach().clone()) for node in read]


@dataclass(frozen=True)
class AutoLiRPA:
    """The oracle as a bound method: "auto-lirpa/ibp", ".../crown-ibp", ".../crown" or ".../alpha-crown".

    ``steps`` and ``lr_alpha`` belong to alpha-CROWN, which optimises the lower bounds of the rows alone, the
    intermediate bounds included; the upper ends of its intervals are infinite.
    """

    method: str
    steps: int = 20
    lr_alpha: float = 0.5

    @property
    def name(self) -> str:
        """The registered name."""
        return f"auto-lirpa/{self.method}"

    @property
    def optimizes(self) -> bool:
        """Whether gradients are needed."""
        return self.method == "alpha-crown"

    def bound(self, graph: Graph, domain: PerturbationSet, spec: Spec, arithmetic: Arithmetic) -> Tensor:
        """Return lower bounds [batch, rows] of the spec's rows, float64.

        Raises ``InvalidInput`` for any arithmetic but ``Real``.
        """
        if not isinstance(arithmetic, Real):
            raise InvalidInput(
                f"method {self.name!r} with arithmetic {arithmetic.name!r}",
                "real arithmetic: auto-lirpa ignores rounding",
                f"arithmetic='real', or method={self.method!r} for the float contract",
            )
        return self.rows(graph.model, domain, spec).lower.double()

    def rows(self, model: nn.Module, domain: PerturbationSet, spec: Spec) -> Interval:
        """Return bounds of C y + d, from one pass with C merged into the last layer."""
        if spec.batch != domain.batch:
            raise InvalidInput(
                f"a spec for {spec.batch} samples and a domain of {domain.batch}", "one claim per sample"
            )
        rows = self.solve(model, domain, spec.C)[1]
        return Interval(rows.lower + spec.d, rows.upper + spec.d)

    def solve(self, model: nn.Module, domain: PerturbationSet, C: Tensor | None) -> tuple[Any, Interval]:
        """Return auto-lirpa's network after the computation, and the bounds of C y (of y for None)."""
        if self.method not in METHODS:
            raise unknown_name("auto-lirpa method", self.method, METHODS)
        with auto_lirpa() as package, _default_dtype(domain.center.dtype), torch.no_grad():
            inputs = _perturbed(package, domain, self.method)
            for options in ATTEMPTS:
                try:
                    return self._attempt(_converted(package, model, inputs, options), inputs, C)
                except CertifyError:
                    raise
                except Exception as error:
                    last = error
            raise _failure(last) from last

    def _attempt(self, network: Any, inputs: Any, C: Tensor | None) -> tuple[Any, Interval]:
        """Bound the rows; alpha-CROWN bounds both ends of the outputs, and the lower ends alone of rows."""
        if not self.optimizes:
            lower, upper = network.compute_bounds(x=(inputs,), C=C, method=self.method)
            return network, Interval(lower.detach(), upper.detach())
        if network.custom_ops:
            raise UnsupportedOperation(
                f"{self.name!r} on activations that auto-lirpa knows from our lines alone",
                "networks of ReLU, sigmoid and tanh",
                "method='auto-lirpa/crown'",
            )
        options = {"iteration": self.steps, "lr_alpha": self.lr_alpha, "early_stop_patience": self.steps}
        network.set_bound_opts({"optimize_bound_args": options})
        with gradients():
            lower, upper = network.compute_bounds(x=(inputs,), C=C, method="CROWN-Optimized", bound_upper=C is None)
        return network, Interval(lower.detach(), torch.full_like(lower, torch.inf) if C is not None else upper.detach())


for _method in METHODS:
    register_method(f"auto-lirpa/{_method}")(partial(AutoLiRPA, _method))


def _converted(package: types.ModuleType, model: nn.Module, inputs: Any, options: dict[str, Any]) -> Any:
    """auto-lirpa's network of a copy: the conversion changes modes, and prints about dropout."""
    twin = _without_dropout(copy.deepcopy(model)).eval().requires_grad_(False)
    example = torch.zeros_like(inputs.data)
    twin, table = with_stand_ins(twin, example)
    custom = {OPERATION: bound_class(package.bound_ops.BoundActivation, table)} if table else {}
    return package.BoundedModule(twin, example, bound_opts=dict(options), device=example.device, custom_ops=custom)


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
    if isinstance(domain, LpBall) and ball and method in ("crown", "alpha-crown"):
        radius = domain.radius.to(domain.center.dtype).view(-1, 1)
        norm = package.PerturbationLpNorm(norm=2, eps=radius)
    else:
        norm = package.PerturbationLpNorm(norm=torch.inf, x_L=box.lower, x_U=box.upper)
    return package.BoundedTensor(domain.center, norm)


def _whole(ball: LpBall) -> bool:
    """Whether the data range cuts nothing off the ball."""
    radius = beside(ball.radius, ball.center)
    center = ball.center.double()
    return bool((ball.hull.lower <= center - radius).all() & (ball.hull.upper >= center + radius).all())


def _failure(error: Exception) -> UnsupportedOperation:
    """Say what failed: the message, or for a bare assertion its source line."""
    text = str(error).splitlines()[0] if str(error) else traceback.extract_tb(error.__traceback__)[-1].line or ""
    return UnsupportedOperation(
        f"auto-lirpa fails on this model: {type(error).__name__}: {text[:200]}",
        "operations that version 0.3 knows",
        "method='crown' is our own and needs no auto-lirpa",
    )
