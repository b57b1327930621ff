"""A family of sound lines on either side of an activation, for optimisers that turn slopes.

Every convex combination of two lines above f is a line above f, so a few certified lines, ordered by slope, span a
family in which a slope costs an interpolation, not a search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certify.enclosures import Interval, Relaxation
from certify.rounding import unit_roundoff

#: Sound lines over an interval: with given (lower, upper) slopes, or with slopes of the activation's choice.
Lines = Callable[[Interval, tuple[Tensor, Tensor] | None], Relaxation]


@dataclass(frozen=True, eq=False)
class Fan:
    """lower_slope[i] s + lower_offset[i] <= f(s) <= upper_slope[j] s + upper_offset[j] for all i, j and every s in z.

    K lines on either side, slopes not decreasing; ``lower_start`` and ``upper_start`` in [0, 1] are the places of the
    two lines that ``Activation.relax`` gives for alpha = None. All in the network's dtype.
    """

    z: Interval
    lower_slope: Float[Tensor, "k *shape"]
    lower_offset: Float[Tensor, "k *shape"]
    upper_slope: Float[Tensor, "k *shape"]
    upper_offset: Float[Tensor, "k *shape"]
    lower_start: Float[Tensor, "*shape"]
    upper_start: Float[Tensor, "*shape"]

    def at(self, alpha: tuple[Tensor, Tensor]) -> Relaxation:
        """Return sound lines for EVERY alpha = (lower, upper), differentiable in it.

        0 is the first line, 1 the last; between two neighbours the line is their convex combination. alpha is clamped
        to [0, 1] and broadcast against z, with optional leading dimensions that the result then has.
        """
        lower_slope, lower_offset, low = _between(self.lower_slope, self.lower_offset, alpha[0], self.z.magnitude)
        upper_slope, upper_offset, up = _between(self.upper_slope, self.upper_offset, alpha[1], self.z.magnitude)
        return Relaxation(lower_slope, lower_offset - low, upper_slope, upper_offset + up)


def spread(z: Interval, slopes: Interval, lines: Lines, size: int) -> Fan:
    """Return ``size`` lines per side with slopes even over ``slopes``; the nearest one becomes the activation's choice.

    Where that is not finite, all lines are that one.
    """
    best = lines(z, None)
    lower, i = _knots(slopes, best.lower_slope, size)
    upper, j = _knots(slopes, best.upper_slope, size)
    found = lines(z, (lower, upper))
    low = _settle(z, (-lower, -found.lower_offset), (-best.lower_slope, -best.lower_offset), i)
    up = _settle(z, (upper, found.upper_offset), (best.upper_slope, best.upper_offset), j)
    return Fan(z, -low[0], -low[1], *up, i[0].to(lower) / (size - 1), j[0].to(upper) / (size - 1))


def _knots(slopes: Interval, best: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the slopes [size, *shape] with the best one among them, and its index [1, *shape]."""
    steps = torch.linspace(0, 1, size, dtype=best.dtype, device=best.device).view(-1, *[1] * best.dim())
    width = slopes.upper - slopes.lower
    index = ((best - slopes.lower) / width * (size - 1)).nan_to_num(0, 0, 0).round().long().clamp(0, size - 1)[None]
    knots = (slopes.lower + steps * width).scatter(0, index, best[None])
    return torch.where(torch.isfinite(width), knots, best), index


def _settle(
    z: Interval, lines: tuple[Tensor, Tensor], best: tuple[Tensor, Tensor], index: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the lines above f with the best one at ``index``, and in place of those that lie above it all over z.

    Those are all the lines on one side of it, or none: the best one then touches f at that end of z (a chord).
    """
    slope, offset = lines[0], lines[1].scatter(0, index, best[1][None])
    noise = 8 * unit_roundoff(slope.dtype) * (best[0].abs() * z.magnitude + best[1].abs())
    over = [(slope - best[0]) * end + (offset - best[1]) >= -noise for end in (z.lower, z.upper)]
    place = torch.arange(len(slope), device=slope.device).view(-1, *[1] * best[0].dim())
    useless = over[0] & over[1]
    left, right = (useless | (place >= index)).all(0), (useless | (place <= index)).all(0)
    replaced = torch.where(place < index, left, right) | ~torch.isfinite(best[1])
    return torch.where(replaced, best[0], slope), torch.where(replaced, best[1], offset)


def _between(slope: Tensor, offset: Tensor, alpha: Tensor, reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slope and offset at ``alpha``, and a bound of what rounding has moved that line over |s| <= reach.

    Each of the two is off by 5 u of the larger neighbour, and the caller's sum by one more; nothing where the
    neighbours are one line.
    """
    shape = torch.broadcast_shapes(alpha.shape, slope.shape[1:])
    place = alpha.expand(shape).reshape(-1, *slope.shape[1:]).clamp(0, 1) * (len(slope) - 1)
    first = place.detach().long().clamp(0, len(slope) - 2)
    weight, limits = place - first, torch.finfo(slope.dtype)

    def mix(values: Tensor) -> tuple[Tensor, Tensor]:
        a, b = values.gather(0, first), values.gather(0, first + 1)
        same = a == b  # also where both are infinite
        size = torch.maximum(a.abs(), b.abs()).clamp(min=limits.tiny / limits.eps)
        return a + weight * torch.where(same, 0, b - a), torch.where(same, 0, size)

    (slopes, steep), (offsets, high) = mix(slope), mix(offset)
    error = 8 * unit_roundoff(slope.dtype) * (steep * reach.clamp(max=limits.max) + high)
    return slopes.view(shape), offsets.view(shape), error.view(shape)
