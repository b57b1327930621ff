"""When memory runs out: the same work in halves, down to one sample, which is then given up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: What libraries below torch say, in errors of no type of their own.
_WORDS = ("out of memory", "not enough memory", "allocate memory", "alloc_failed")
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


def is_shortage(error: BaseException) -> bool:
    """Return whether ``error`` says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
