"""Values per sample beside points."""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor


def beside(value: Shaped[Tensor, "n"], x: Shaped[Tensor, "n *shape"]) -> Shaped[Tensor, "n *ones"]:
    """Return one value per sample in a shape that broadcasts against x."""
    return value.view(-1, *[1] * (x.ndim - 1))
