"""Words of the command line to values; each refusal says what was expected."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from certify.attacks import Attack
from certify.errors import InvalidInput, unknown_name
from certify.registry import ATTACKS, lookup
from cli import theme
from models.training.fields import exact, exact_radius
from models.training.recipe import NORMS


def radii(text: str) -> tuple[Fraction, ...]:
    """Return the exact radii of a list such as "2/255,0.1"."""
    return tuple(exact_radius(word) for word in items(text, "radius", "2/255,8/255"))


def single(values: tuple[Fraction, ...], name: str) -> Fraction:
    """Return the only value; raises ``InvalidInput`` where there are more."""
    if len(values) != 1:
        words = [theme.radius(value) for value in values]
        raise InvalidInput(f"--{name} {','.join(words)}", f"one {name}", f"--{name} {words[0]}")
    return values[0]


def exponent(norm: str) -> float:
    """Return p for linf, l2 or l1."""
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    return NORMS[norm]


def numbers(text: str, name: str) -> tuple[float, ...]:
    """Return finite numbers separated by commas."""
    try:
        values = tuple(float(word) for word in items(text, name, "0.5,0.5,0.5"))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) for value in values):
        raise InvalidInput(f"--{name} {text!r}", "finite numbers separated by commas", f"--{name} 0.5,0.5,0.5")
    return values


def integers(text: str, name: str, example: str) -> tuple[int, ...]:
    """Return positive integers separated by commas."""
    found = items(text, name, example)
    if not all(word.isdecimal() and int(word) > 0 for word in found):
        raise InvalidInput(f"--{name} {text!r}", "positive integers separated by commas", f"--{name} {example}")
    return tuple(int(word) for word in found)


def items(text: str, name: str, example: str) -> tuple[str, ...]:
    """Return the words between commas, none of them empty."""
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise InvalidInput(f"--{name} {text!r}", "values separated by commas", f"--{name} {example}")
    return found


def distinct(text: str, name: str, example: str) -> tuple[str, ...]:
    """Return the words between commas, each of them once."""
    found = items(text, name, example)
    twice = next((word for word in found if found.count(word) > 1), None)
    if twice is not None:
        raise InvalidInput(f"--{name} {text}: {twice} twice", "each of them once", f"--{name} {example}")
    return found


def attack_of(name: str, **options: int | None) -> Attack:
    """Return the registered attack; options that are None keep its defaults (five restarts where it has some)."""
    kind: Any = lookup("attack", ATTACKS, name)
    fields = kind.__dataclass_fields__
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in fields:
            raise InvalidInput(f"--{key} for the attack {name!r}", f"options that {name} has", f"leave out --{key}")
    if "restarts" in fields:
        given.setdefault("restarts", 5)
    return kind(**given)


def share(text: str, name: str) -> Fraction:
    """Return the exact share in [0, 1] that "0.6", "3/5" or "60%" says."""
    word = text.strip()
    value = exact(word.removesuffix("%"))
    value = value / 100 if value is not None and word.endswith("%") else value
    if value is None or not 0 <= value <= 1:
        raise InvalidInput(f"--{name} {text!r}", "a share from 0 to 1", f"--{name} 0.6 or --{name} 60%")
    return value
