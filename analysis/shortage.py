"""When memory runs out: the same work in halves, down to one sample, which is then given up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from certify.memory import is_shortage

#: Tensors with one entry per sample.
Found = tuple[Tensor, ...]


def in_halves(
    work: Callable[[Tensor], Found],
    samples: Tensor,
    give_up: Callable[[Tensor], Found],
    notice: Callable[[Tensor], None],
) -> Found:
    """Return ``work(samples)``; where memory runs out, that of both halves, and ``give_up`` of one sample alone.

    ``notice`` hears of every set of samples that was too much. Other errors pass.
    """
    try:
        return work(samples)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
    # Outside of the handler: the error's frames hold the tensors that did not fit.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    notice(samples)
    if len(samples) == 1:
        return give_up(samples)
    middle = len(samples) // 2
    parts = (in_halves(work, half, give_up, notice) for half in (samples[:middle], samples[middle:]))
    return tuple(torch.cat(pair) for pair in zip(*parts, strict=True))
