"""What may vary: perturbation sets. Norms live here and nowhere else.

A set is a batch of convex bodies, one per sample. ``hull`` is its bounding box in float64; an ``LpBall`` with
p = 1 or 2 that is clipped to the data range is the intersection of the ball with that box, and its support function
is exact (one sort), not the minimum of two.
"""

from certify.sets.ball import Clip, LpBall, Radius
from certify.sets.base import PerturbationSet
from certify.sets.box import Box, box_infimum

__all__ = ["Box", "Clip", "LpBall", "PerturbationSet", "Radius", "box_infimum"]
