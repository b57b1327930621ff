"""What an attack is: authors write ``search``, the final ``__call__`` re-validates and never trusts it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from certify.errors import InvalidInput, InvalidModel
from certify.results import AttackResult
from certify.rounding import ieee
from certify.sets import PerturbationSet
from certify.specs import Spec

#: A loss to be raised, per sample, from the rows that must stay positive.
Loss = Callable[[Float64[Tensor, "batch rows"]], Float64[Tensor, "batch"]]


def margin_loss(rows: Float64[Tensor, "batch rows"]) -> Float64[Tensor, "batch"]:
    """Return -min row: positive where the claim is broken."""
    return -rows.amin(1)


def cross_entropy(rows: Float64[Tensor, "batch rows"]) -> Float64[Tensor, "batch"]:
    """Return log sum exp(-rows), which rises exactly where cross-entropy log(1 + sum exp(-rows)) does.

    Its gradient has the same direction and never vanishes, however confident the network is.
    """
    return torch.logsumexp(-rows, 1)


LOSSES: dict[str, Loss] = {"margin": margin_loss, "ce": cross_entropy}


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
        self, x: Float[Tensor, "n *shape"], spec: Spec, loss: Loss
    ) -> tuple[Float64[Tensor, "n rows"], Float[Tensor, "n *shape"]]:
        """Return the rows at ``x`` and the gradient of the loss with respect to ``x`` alone."""
        with torch.inference_mode(False), torch.enable_grad():
            point = x.detach().clone().requires_grad_()
            rows = self._rows(point, spec)
            if not rows.requires_grad:  # constant outputs
                return rows, torch.zeros_like(point)
            (gradient,) = torch.autograd.grad(loss(rows).sum(), point, materialize_grads=True)
        return rows.detach(), gradient.nan_to_num(nan=0.0)

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
        self, objective: Objective, domain: PerturbationSet, spec: Spec, generator: torch.Generator | None
    ) -> Float[Tensor, "batch *shape"]:
        """Return one candidate per sample; the model is in eval mode. Nothing here is trusted."""

    @final
    def __call__(
        self,
        model: nn.Module,
        domain: PerturbationSet,
        spec: Spec,
        *,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Return the worse of the candidate and the centre of the set, per sample, re-evaluated in eval mode.

        A candidate outside the set counts as the centre; ``success`` needs a row < 0. The modules' modes come
        back also after an error, and gradients of the parameters are left alone. Raises ``InvalidInput`` if
        model, domain and spec do not fit each other, ``InvalidModel`` for outputs that are not finite.
        """
        _check_fit(model, domain, spec)
        objective = Objective(model)
        with evaluating(model):
            found = self.search(objective, domain, spec, generator).detach()
            candidate = _inside(found, domain, type(self).__name__)
            with torch.autocast(domain.center.device.type, enabled=False), ieee():
                center_rows = objective.rows(domain.center, spec)
                rows = objective.rows(candidate, spec)
        worse = rows.amin(1) < center_rows.amin(1)
        margin = torch.where(worse[:, None], rows, center_rows)
        witness = torch.where(_like(worse, candidate), candidate, domain.center)
        return AttackResult(witness, margin, margin.amin(1) < 0, objective.queries)


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
    points = torch.where(_like(domain.contains(found), found), found, domain.project(found))
    return torch.where(_like(domain.contains(points), points), points, domain.center)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """A per-sample mask in a shape that broadcasts against x."""
    return mask.view(-1, *[1] * (x.ndim - 1))


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
