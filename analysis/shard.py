"""One of several parts of a run: every n-th unit of work, from the i-th on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from certify.errors import InvalidInput

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Shard:
    """Shard ``i`` of ``n``, with 1 <= i <= n; ``InvalidInput`` for others."""

    i: int
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.i <= self.n:
            raise InvalidInput(f"shard {self}", "i/n with 1 <= i <= n", "--shard 1/4")

    def __str__(self) -> str:
        return f"{self.i}/{self.n}"

    @classmethod
    def parse(cls, words: str) -> Shard:
        """Return the shard of "i/n"."""
        parts = words.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise InvalidInput(f"shard {words!r}", "i/n with 1 <= i <= n", "--shard 1/4")
        return cls(int(parts[0]), int(parts[1]))

    def take(self, units: Sequence[T]) -> Sequence[T]:
        """Return the shard's units."""
        return units[self.i - 1 :: self.n]
