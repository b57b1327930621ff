"""How much memory the engine may use: ``certify.options(memory="2GB")``, or what suits the device.

On a CPU small blocks are fast ones (they stay in the cache), so a budget only ever makes them smaller.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from certify.errors import InvalidInput

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
CACHE = 3 << 20  # bytes of one coefficient tensor on a CPU: with its temporaries it stays in the last-level cache
LIVE = 10  # coefficient tensors, their temporaries and the library's scratch that are alive at once

#: What libraries below torch say of memory that ran out, in errors of no type of their own.
_SHORT = ("out of memory", "not enough memory", "allocate memory", "alloc_failed")

_budget: ContextVar[int | None] = ContextVar("memory", default=None)


@contextlib.contextmanager
def options(*, memory: str | int | None = None) -> Iterator[None]:
    """Within the block, bounds use at most ``memory`` for what grows with the number of rows.

    ``memory`` is a number of bytes or a text such as "500MB" or "2GiB"; None lets the device decide. Verdicts do not
    depend on it. The network, its intervals and its lines, which grow with the batch, come on top.
    """
    token = _budget.set(None if memory is None else _bytes(memory))
    try:
        yield
    finally:
        _budget.reset(token)


def block_bytes(device: torch.device) -> int:
    """Return how large one coefficient tensor of a block of rows should be."""
    budget = _budget.get()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] // 2
        return (free if budget is None else min(free, budget)) // LIVE
    return CACHE if budget is None else min(CACHE, budget // LIVE)


def _bytes(memory: str | int) -> int:
    text = str(memory).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match and match[2].upper() in UNITS else 0
    if size < 1:
        raise InvalidInput(f"memory={memory!r}", "a positive number of bytes", 'certify.options(memory="2GB")')
    return size


def is_shortage(error: BaseException) -> bool:
    """Return whether ``error`` says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORT)
