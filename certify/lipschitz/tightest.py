"""``tightest``: the least of all upper bounds, row by row."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from certify.errors import UnsupportedOperation
from certify.lipschitz.clarke import CrownJacobian
from certify.lipschitz.estimate import Estimator, Question
from certify.lipschitz.product import ProductBound
from certify.lipschitz.recursion import Recursion
from certify.propagate.methods import BoundMethod
from certify.registry import register_estimator
from certify.results import LipschitzEstimate


@register_estimator("tightest")
@dataclass(frozen=True, kw_only=True)
class Tightest:
    """The least of the recursion, the Jacobian bounds and the product bound; side "upper".

    With a domain the recursion on the whole space counts too, so a local constant is never above that global one.
    What a method cannot express is left out; ``layers`` are those of the product bound.
    """

    recursion: Recursion = field(default_factory=Recursion)
    intervals: str | BoundMethod = "crown"

    def estimate(self, question: Question) -> LipschitzEstimate:
        """Return the bound. Raises ``UnsupportedOperation`` where no method has one."""
        recursion = replace(self.recursion, intervals=self.intervals)
        asked: list[tuple[Estimator, Question]] = [
            (ProductBound(self.intervals), question),
            (recursion, question),
            (CrownJacobian(self.intervals), question),  # holds the interval bound
        ]
        if question.domain is not None:
            asked.append((recursion, replace(question, domain=None)))
        found: list[LipschitzEstimate] = []
        reason: UnsupportedOperation | None = None
        for estimator, each in asked:
            try:
                found.append(estimator.estimate(each))
            except UnsupportedOperation as error:
                reason = error
        if not found:
            assert reason is not None
            raise reason
        rows = tuple(
            tuple(map(min, *same)) if len(found) > 1 else same[0]
            for same in zip(*(estimate.rows for estimate in found), strict=True)
        )
        value = max(map(max, rows)) if rows else min(estimate.value for estimate in found)
        return LipschitzEstimate(value, "upper", "tightest", question.p, found[0].layers, rows)
