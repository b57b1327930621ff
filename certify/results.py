"""Answers: verdicts, certificates, Lipschitz estimates, attack results. Frozen, and plain data on request."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.notebook import table


class Verdict(Enum):
    """The answer for one sample; ``value`` is the word, ``explanation`` says what it means and what to do next."""

    HOLDS = "holds"
    VIOLATED = "violated"
    UNKNOWN = "unknown"

    @property
    def explanation(self) -> str:
        """One sentence for people."""
        return {
            Verdict.HOLDS: "proved: every row is positive for every input of the set",
            Verdict.VIOLATED: "falsified: the witness lies in the set and breaks a row; the model needs training",
            Verdict.UNKNOWN: "neither proved nor falsified: try a tighter method or a stronger attack",
        }[self]


@dataclass(frozen=True, eq=False)
class Certificate:
    """What ``prove`` found, per sample.

    ``margin`` [batch, rows]: certified lower ends, and upper ends attained by a point of the set where one was
    evaluated. ``witness`` [batch, *shape] holds NaN where no counterexample was found. ``arithmetic`` names the
    contract and ``exclusions`` what it does not cover.
    """

    verdicts: list[Verdict]
    margin: Interval
    witness: Float[Tensor, "batch *shape"]
    method: str
    arithmetic: str
    seconds: float
    exclusions: tuple[str, ...] = ()

    @property
    def holds(self) -> Bool[Tensor, "batch"]:
        """Where the claim is proved."""
        return torch.tensor([verdict is Verdict.HOLDS for verdict in self.verdicts])

    @property
    def violated(self) -> Bool[Tensor, "batch"]:
        """Where the claim is falsified."""
        return torch.tensor([verdict is Verdict.VIOLATED for verdict in self.verdicts])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "verdicts": [verdict.value for verdict in self.verdicts],
            "margin_lower": _plain(self.margin.lower),
            "margin_upper": _plain(self.margin.upper),
            "witness": _plain(self.witness),
            "method": self.method,
            "arithmetic": self.arithmetic,
            "seconds": self.seconds,
            "exclusions": list(self.exclusions),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Certificate:
        """Rebuild what ``to_dict`` wrote."""
        return cls(
            verdicts=[Verdict(word) for word in data["verdicts"]],
            margin=Interval(_tensor(data["margin_lower"]), _tensor(data["margin_upper"])),
            witness=_tensor(data["witness"]),
            method=data["method"],
            arithmetic=data["arithmetic"],
            seconds=data["seconds"],
            exclusions=tuple(data["exclusions"]),
        )

    def _repr_html_(self) -> str:
        counts = ", ".join(f"{self.verdicts.count(verdict)} {verdict.value}" for verdict in Verdict)
        lower = self.margin.lower.amin(1).tolist()
        rows = ((place, verdict.value, lower[place]) for place, verdict in enumerate(self.verdicts))
        caption = f"{self.method}, {self.arithmetic}: {counts}"
        return table(caption, ("sample", "verdict", "smallest margin, at least"), rows)


#: Multipliers of a Lipschitz certificate: node name -> [problems][neurons or channels].
Multipliers = dict[str, tuple[tuple[float, ...], ...]]

Side = Literal["upper", "lower", "estimate"]


@dataclass(frozen=True)
class LipschitzEstimate:
    """A number about the Lipschitz constant that says on which side of it it stands.

    ``side`` is "upper" (certified: |f(x) - f(y)| <= value ||x - y||), "lower" (attained by a Jacobian) or
    "estimate" (neither). ``layers`` maps node names to their own values where the method has them; ``rows`` are the
    values per spec row, in the order of the spec, where one was given. ``multipliers`` are the certificate of the
    recursion: ``certify.testing.check_lipschitz`` evaluates it anew.
    """

    value: float
    side: Side
    method: str
    p: float = 2.0
    layers: dict[str, float] = field(default_factory=dict)
    rows: tuple[tuple[float, ...], ...] = ()
    multipliers: Multipliers = field(default_factory=dict)

    def __post_init__(self) -> None:
        if math.isnan(self.value) or self.value < 0:
            raise InvalidInput(f"a Lipschitz value of {self.value}", "a number >= 0", "check the weights for NaN")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "value": _finite(self.value),
            "side": self.side,
            "method": self.method,
            "p": _finite(self.p),
            "layers": {name: _finite(value) for name, value in self.layers.items()},
            "rows": _table(self.rows),
            "multipliers": {name: _table(rows) for name, rows in self.multipliers.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LipschitzEstimate:
        """Rebuild what ``to_dict`` wrote."""
        return cls(
            value=float(data["value"]),
            side=data["side"],
            method=data["method"],
            p=float(data["p"]),
            layers={name: float(value) for name, value in data["layers"].items()},
            rows=_numbers(data["rows"]),
            multipliers={name: _numbers(rows) for name, rows in data.get("multipliers", {}).items()},
        )

    def _repr_html_(self) -> str:
        sign = {"upper": "<=", "lower": ">=", "estimate": "~"}[self.side]
        rows = [("network", f"{sign} {self.value:.4g}")]
        rows += [(name, f"{sign} {value:.4g}") for name, value in self.layers.items()]
        return table(f"Lipschitz constant by {self.method} (l{self.p:g}), {self.side}", ("of", "value"), rows)


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack found: the worst point met per sample, re-evaluated outside the search.

    ``witness`` [batch, *shape] lies in the set for every sample. ``margin`` [batch, rows] (float64) are the spec's
    rows there. ``success`` says where some row is below 0. ``queries`` counts forward passes of single samples.
    """

    witness: Float[Tensor, "batch *shape"]
    margin: Float[Tensor, "batch rows"]
    success: Bool[Tensor, "batch"]
    queries: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "witness": _plain(self.witness),
            "margin": _plain(self.margin),
            "success": self.success.tolist(),
            "queries": self.queries,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttackResult:
        """Rebuild what ``to_dict`` wrote."""
        return cls(
            witness=_tensor(data["witness"]),
            margin=_tensor(data["margin"]),
            success=torch.tensor(data["success"], dtype=torch.bool),
            queries=data["queries"],
        )

    def _repr_html_(self) -> str:
        rows = enumerate(zip(self.success.tolist(), self.margin.amin(1).tolist(), strict=True))
        caption = f"{int(self.success.sum())} of {len(self.success)} samples broken, {self.queries} queries"
        lines = ((place, "broken" if broken else "stands", margin) for place, (broken, margin) in rows)
        return table(caption, ("sample", "outcome", "smallest margin met"), lines)


def _finite(value: float) -> float | str:
    """JSON has no infinities: they travel as words that ``float`` reads."""
    return value if math.isfinite(value) else str(value)


def _table(rows: tuple[tuple[float, ...], ...]) -> list[list[float | str]]:
    return [[_finite(value) for value in row] for row in rows]


def _numbers(rows: list[list[float | str]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in rows)


def _plain(x: Tensor) -> dict[str, Any]:
    """A tensor as shape, dtype and flat numbers; NaN and infinities as words."""
    values = [_finite(value) for value in x.detach().cpu().flatten().tolist()]
    return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "values": values}


def _tensor(data: dict[str, Any]) -> Tensor:
    dtypes = {"float32": torch.float32, "float64": torch.float64}
    values = [float(value) for value in data["values"]]
    return torch.tensor(values, dtype=dtypes[data["dtype"]]).view(data["shape"])
