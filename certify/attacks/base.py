"""What an attack is: authors write ``search``, the final ``__call__`` re-validates and never trusts it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from certify.attacks.losses import Loss
from certify.draws import Draws, Source
from certify.errors import InvalidInput, InvalidModel
from certify.memory import is_shortage
from certify.results import AttackResult
from certify.rounding import ieee
from certify.sets import PerturbationSet
from certify.shapes import beside
from certify.specs import Spec


class Objective:
    """What a search may ask of the model; ``queries`` counts the forward passes of single samples."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.queries = model, 0

    def rows(self, x: Float[Tensor, "n *shape"], spec: Spec) -> Float64[Tensor, "n rows"]:
        """Return the rows of ``spec`` at the outputs for ``x``, without gradients.

        Raises ``InvalidModel`` if outputs are not finite, ``InvalidInput`` if ``spec`` does not fit them.
        """
        with torch.no_grad():
            return self._rows(x, spec)

    def gradient(
        self, x: Float[Tensor, "n *shape"], spec: Spec, loss: Loss, goal: Int[Tensor, "n"] | None = None
    ) -> tuple[Float64[Tensor, "n rows"], Float[Tensor, "n *shape"]]:
        """Return the rows at ``x`` and the gradient of the loss with respect to ``x`` alone.

        ``goal`` are the rows aimed at, -1 (and None) meaning all at once.
        """
        goal = spec.all_rows if goal is None else goal
        with torch.enable_grad():
            point = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            rows = self._rows(point, spec)
            if not rows.requires_grad:  # constant outputs
                return rows, torch.zeros_like(point)
            (gradient,) = torch.autograd.grad(loss(rows, goal).sum(), point, materialize_grads=True)
        return rows.detach(), gradient.nan_to_num_(nan=0.0)

    def _rows(self, x: Tensor, spec: Spec) -> Tensor:
        y = self.model(x)
        self.queries += len(x)
        if y[0].numel() != spec.C.shape[2]:
            raise InvalidInput(
                f"a model with {y[0].numel()} outputs and a spec for {spec.C.shape[2]}",
                "C of shape [batch, rows, outputs]",
                f"certify.class_margins(labels, classes={y[0].numel()})",
            )
        rows = spec.rows(y)
        if not bool(torch.isfinite(rows).all()):
            raise InvalidModel(
                "the model's outputs hold NaN or infinities",
                "finite outputs on the whole set",
                "check weights and input scale: an attack on such a model proves nothing",
            )
        return rows


class Attack(ABC):
    """A search for inputs of a set that break a spec. The spec carries the true labels; attacks take none."""

    @abstractmethod
    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        """Return one candidate per sample; the model is in eval mode. Nothing here is trusted.

        ``spec`` is in float64. ``draws`` hold one stream of random numbers per sample.
        """

    @final
    def __call__(
        self,
        model: nn.Module,
        domain: PerturbationSet,
        spec: Spec,
        *,
        generator: Source = None,
    ) -> AttackResult:
        """Return the worse of the candidate and the centre of the set, per sample, re-evaluated in eval mode.

        A candidate outside the set counts as the centre; ``success`` needs a row < 0, in the model's arithmetic and in
        float64: where float64 disagrees, its rows are the margin. ``generator`` may also be one integer seed per sample
        [batch]: a sample's random numbers then depend on nothing else. The modules' modes come back also after an
        error, and gradients of the parameters are left alone. Raises ``InvalidInput`` if model, domain and spec do not
        fit each other, ``InvalidModel`` for outputs that are not finite.
        """
        _check_fit(model, domain, spec)
        center, objective = domain.center, Objective(model)
        plain = torch.inference_mode(False), torch.no_grad(), torch.autocast(center.device.type, enabled=False)
        with evaluating(model), plain[0], plain[1], plain[2]:
            spec = Spec(spec.C.to(torch.float64, copy=True), spec.d.to(torch.float64, copy=True))
            draws = Draws(generator, domain.batch, center.device)
            candidate = _inside(self.search(objective, domain, spec, draws).detach(), domain, type(self).__name__)
            with ieee():
                center_rows, rows = objective.rows(center, spec), objective.rows(candidate, spec)
                worse = rows.amin(1) < center_rows.amin(1)
                margin = torch.where(worse[:, None], rows, center_rows)
                witness = torch.where(beside(worse, candidate), candidate, center)
                margin = _confirmed(objective, witness, margin, spec)
        return AttackResult(witness, margin, margin.amin(1) < 0, objective.queries)


def _confirmed(objective: Objective, witness: Tensor, margin: Tensor, spec: Spec) -> Tensor:
    """The margins, with those of float64 where a broken row is mended by it: rounding alone breaks no claim."""
    broken = (margin.amin(1) < 0).nonzero()[:, 0]
    if len(broken) == 0 or witness.dtype == torch.float64:
        return margin
    twin = Objective(copy.deepcopy(objective.model).double())
    try:
        rows = twin.rows(witness[broken].double(), spec.take(broken))
    except RuntimeError as error:
        if is_shortage(error):
            raise
        raise InvalidModel(
            f"the model does not run in float64: {error}"[:200],
            "a model without dtypes of its own: what an attack finds is confirmed in float64",
            "make tensors in forward with x.new_zeros, or like x",
        ) from None
    objective.queries += twin.queries
    mended = rows.amin(1) >= 0
    margin = margin.clone()
    margin[broken[mended]] = rows[mended]
    return margin


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and each one back as it was, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _inside(found: Tensor, domain: PerturbationSet, name: str) -> Tensor:
    """Points of the set: ``found`` where it lies inside, else its projection, else the centre."""
    if found.shape != domain.center.shape or found.dtype != domain.center.dtype:
        raise InvalidInput(
            f"{name}.search returned {tuple(found.shape)} {found.dtype}",
            f"{tuple(domain.center.shape)} {domain.center.dtype}",
            "return one candidate per sample",
        )
    inside = domain.contains(found)
    if bool(inside.all()):
        return found
    points = torch.where(beside(inside, found), found, domain.project(found))
    return torch.where(beside(domain.contains(points), points), points, domain.center)


def _check_fit(model: nn.Module, domain: PerturbationSet, spec: Spec) -> None:
    center = domain.center
    if spec.batch != domain.batch:
        raise InvalidInput(
            f"a spec for {spec.batch} samples and a domain of {domain.batch}",
            "one claim per sample",
            "spec.take(index) and domain.take(index) keep them together",
        )
    for weight in model.parameters():
        if weight.is_floating_point() and (weight.dtype, weight.device) != (center.dtype, center.device):
            raise InvalidInput(
                f"model in {weight.dtype} on {weight.device}, domain in {center.dtype} on {center.device}",
                "one dtype and device",
                "make the domain from x.to(weight.device, weight.dtype)",
            )
    if spec.C.device != center.device:
        raise InvalidInput(
            f"a spec on {spec.C.device}, a domain on {center.device}",
            "one device",
            "spec.to(x.dtype, x.device)",
        )
