"""What is asked of every network alike: perturbations, attack, methods, arithmetic, seed."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from analysis.records import Conditions
from certify import LpBall
from certify.attacks import PGD, Attack
from certify.draws import sample_seeds
from certify.errors import InvalidInput
from certify.propagate.methods import resolve_method
from certify.rounding import resolve_arithmetic


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is asked of every network alike: perturbations, methods, attack, arithmetic and seed.

    ``radii`` are in the units of x, ascending order is not needed; ``p`` is 1, 2 or inf; ``clip`` the data range.
    One attack per radius serves all ``methods``; without methods nothing is certified. ``arithmetic`` is that of
    ``certify.prove``. ``batch`` samples are computed together: they alone decide each other's last bits.
    ``sample_seconds`` is the time for one sample at all radii; with a finite one samples are computed one by one,
    and what is not finished in time says "timeout".
    Raises ``InvalidInput`` for empty, negative or infinite radii and unknown methods.
    """

    radii: tuple[Fraction, ...]
    p: float = torch.inf
    clip: tuple[float, float] | None = (0.0, 1.0)
    methods: tuple[str, ...] = ("crown",)
    attack: Attack = field(default_factory=PGD)
    arithmetic: str = "float"
    seed: int = 0
    batch: int = 100
    sample_seconds: float = math.inf

    def __post_init__(self) -> None:
        if not self.radii or not all(math.isfinite(radius) and radius >= 0 for radius in self.radii):
            raise InvalidInput(
                f"radii {tuple(map(str, self.radii))}", "finite numbers >= 0", "radii=(Fraction(8, 255),)"
            )
        if self.batch < 1:
            raise InvalidInput(f"batch {self.batch}", "at least 1", "batch=100")
        if not self.sample_seconds > 0:
            raise InvalidInput(f"{self.sample_seconds} seconds per sample", "more than 0", "sample_seconds=60")
        for method in self.methods:
            resolve_method(method)
        resolve_arithmetic(self.arithmetic, torch.float32)
        object.__setattr__(self, "radii", tuple(sorted({Fraction(radius) for radius in self.radii})))

    @property
    def norm(self) -> str:
        """The norm's name: linf, l2 or l1."""
        return "linf" if self.p == torch.inf else f"l{self.p:g}"

    def ball(self, x: Tensor, radius: Fraction) -> LpBall:
        """Return the perturbations of ``x`` [batch, *shape] within ``radius``."""
        return LpBall(x, radius, self.p, self.clip)

    def seeds(self, index: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Return one seed per sample: shards, order and memory cannot change what a sample is given."""
        return sample_seeds(self.seed, index)

    def work(self, samples: int) -> int:
        """Return how many (sample, task) pairs ``evaluate`` ticks off."""
        return samples * len(self.radii) * (1 + len(self.methods))

    def conditions(self, dtype: torch.dtype) -> Conditions:
        """Return in words and numbers what a network whose weights are of ``dtype`` is asked."""
        arithmetic = resolve_arithmetic(self.arithmetic, dtype).name
        attack = describe(self.attack)
        return Conditions(self.radii, self.norm, self.clip, self.methods, attack, arithmetic, self.seed)


def describe(attack: Attack) -> str:
    """Return the attack's name with its numbers of steps and restarts, and what differs from its defaults.

    Attacks inside it are described alike.
    """
    options = [(item, getattr(attack, item.name)) for item in fields(attack)]  # type: ignore[arg-type]
    shown = [
        f"{item.name}={_words(value)}"
        for item, value in options
        if item.name in ("steps", "restarts") or value != _default(item)
    ]
    return f"{type(attack).__name__}({', '.join(shown)})"


def _words(value: object) -> str:
    if isinstance(value, Attack):
        return describe(value)
    if isinstance(value, tuple) and any(isinstance(item, Attack) for item in value):
        return f"[{', '.join(map(_words, value))}]"
    return str(value)


def _default(item: Field[Any]) -> object:
    return item.default if item.default_factory is MISSING else item.default_factory()


def attack_name(described: str) -> str:
    """Return the attack's name alone, of what ``describe`` returned."""
    return described.partition("(")[0]
