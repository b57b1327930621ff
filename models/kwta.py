"""k-winners-take-all: an activation that hides gradients. It can be trained and attacked, and not be certified."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from certify import register_activation
from certify.errors import InvalidInput, UnsupportedOperation
from certify.graph import Call


class KWTA(nn.Module):
    """Keep the ceil(ratio n) largest of a sample's n values, and put zeros for the others.

    A layer's values compete over all channels and pixels of the sample. Reference: Xiao, Zhong, Zheng, "Enhancing
    adversarial defense by k-winners-take-all" (2020), arXiv 1905.10510, equation 3; ratio .1 as for its ResNet18. Its
    robustness was shown to be gradient masking (Tramer et al., "On adaptive attacks to adversarial example defenses",
    2020).
    """

    def __init__(self, ratio: float = 0.1) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise InvalidInput(f"ratio = {ratio!r}", "a share of winners in (0, 1]", "KWTA(0.1)")
        self.ratio = ratio

    def forward(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Return x where it wins, else 0; of equal values the first ones win."""
        flat = x.flatten(1)
        values, places = flat.topk(math.ceil(self.ratio * flat.shape[1]), dim=1)
        return torch.zeros_like(flat).scatter(1, places, values).view_as(x)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}"


@register_activation(KWTA)
class KWTAFacts:
    """The refusal: kWTA jumps wherever winners change."""

    @classmethod
    def from_call(cls, call: Call) -> None:
        """Raise ``UnsupportedOperation``."""
        raise UnsupportedOperation(
            f"k-winners-take-all at {call.name!r} jumps wherever its winners change",
            "a continuous activation: no Lipschitz constant and no useful linear bound holds across a jump",
            "attack it (`certify attack`), or train with another activation (see `certify ops`)",
        )

    @classmethod
    def examples(cls) -> list[tuple[object, int]]:
        """Return none: there are no facts."""
        return []
