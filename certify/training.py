"""Bounds to train with: ``training_margins``, differentiable in the model's parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from certify.bounding import check_spec, prepare
from certify.errors import InvalidInput, InvalidModel
from certify.propagate.methods import IBP, BoundMethod, CrownIBP, resolve_method
from certify.rounding import Real
from certify.sets import PerturbationSet
from certify.specs import Spec


def training_margins(
    model: nn.Module, domain: PerturbationSet, spec: Spec, method: str | BoundMethod = "ibp"
) -> Float64[Tensor, "batch rows"]:
    """Return margins <= C model(x) + d for every x of the domain, in real arithmetic, to train with.

    The values are those of ``prove(..., arithmetic="real")``; they are differentiable in the parameters, and in the
    centre of an l-infinity ball:

        loss = F.cross_entropy(model(x), y) + F.softplus(-certify.training_margins(model, ball, spec)).mean()

    ``method`` is "ibp" or "crown-ibp". Bounds are those of the model in eval mode, in which it is traced, whatever mode
    it is in; only layers whose modes compute different functions must be in eval mode themselves: batch normalisation
    is bounded with its running statistics, dropout as switched off. Matrix products follow the caller's precision
    settings: prove a trained model, do not trust these margins.

    Raises ``InvalidInput`` for other methods, ``InvalidModel`` for batch normalisation or dropout in train mode, and
    what ``prove`` raises.
    """
    chosen = resolve_method(method)
    if not isinstance(chosen, (IBP, CrownIBP)):
        raise InvalidInput(f"method {chosen.name!r} for training", "ibp or crown-ibp")
    _check_modes(model)
    with evaluating(model):
        graph = prepare(model, domain, live=True)
    return chosen.bound(graph, domain, check_spec(graph, domain, spec), Real())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode, and back, what is in train mode."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _check_modes(model: nn.Module) -> None:
    """Refuse layers in train mode that compute something else there."""
    for name, module in model.named_modules():
        if module.training and isinstance(module, (_BatchNorm, _DropoutNd)):
            raise InvalidModel(
                f"{type(module).__name__} at {name!r} is in train mode",
                "eval mode: bounds hold for running statistics, and without dropout",
                "module.eval() for such layers after model.train()",
            )
