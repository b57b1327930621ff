"""How the steps of a search shrink."""

from __future__ import annotations

import math


def annealed(step: int, steps: int) -> float:
    """Return half a cosine at 0 <= ``step`` <= ``steps``: from 1 down to 0.

    Reference: Loshchilov, Hutter, "SGDR" (2017), equation 5, without restarts.
    """
    return (1 + math.cos(math.pi * step / steps)) / 2
