"""What validation measures: accuracy on images as they are, attacked, and certified."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from certify.attacks import PGD, Attack
from certify.results import Verdict
from certify.specs import class_margins
from certify.verify import prove
from models.training.recipe import Threat

Images = Float[Tensor, "n *shape"]
Labels = Int[Tensor, "n"]

#: What validation attacks with. It starts at the image and draws nothing, so that its verdict depends on the weights
#: alone.
PROBE = PGD(steps=10, random_start=False)


def accuracy(model: nn.Module, x: Images, y: Labels, *, batch: int = 1000) -> float:
    """Return the share of samples whose largest logit is the true label's, in the model's current mode."""
    with torch.no_grad():
        hits = [
            (model(part).argmax(1) == labels).sum() for part, labels in zip(x.split(batch), y.split(batch), strict=True)
        ]
    return int(torch.stack(hits).sum()) / len(x)


def robust_accuracy(model: nn.Module, x: Images, y: Labels, threat: Threat, attack: Attack, *, classes: int) -> float:
    """Return the share of samples that are right and survive the attack."""
    result = attack(model, threat.ball(x), class_margins(y, classes, x.dtype))
    return float((result.margin.amin(1) > 0).double().mean())


def certified_accuracy(
    model: nn.Module, x: Images, y: Labels, threat: Threat, *, classes: int, method: str = "ibp", batch: int = 100
) -> float:
    """Return the share of samples that are right and proved, in real arithmetic: a guide for training, no verdict."""
    held = 0
    for part, labels in zip(x.split(batch), y.split(batch), strict=True):
        spec = class_margins(labels, classes, x.dtype)
        held += prove(model, threat.ball(part), spec, method, arithmetic="real").verdicts.count(Verdict.HOLDS)
    return held / len(x)
