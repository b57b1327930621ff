"""Gates: exact shares of all images, and equality is enough."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import RADII, made_up

from analysis.gates import QUANTITIES, Gate, GateResult, judge
from analysis.records import Evaluation, Rate
from certify.errors import InvalidInput


@pytest.fixture(scope="module")
def found() -> Evaluation:
    return made_up(("net",), 300, layers=0).networks[0].evaluation


def one(quantity: str, wanted: Fraction, found: Evaluation, place: int = 0) -> GateResult:
    results = judge("net", found, [Gate(quantity, wanted)])  # type: ignore[arg-type]
    return results[place]


def test_each_radius_has_a_result_and_clean_accuracy_has_one(found: Evaluation) -> None:
    gates = [Gate("certified", Fraction(1, 2)), Gate("clean", Fraction(9, 10)), Gate("attacked", Fraction(0))]
    results = judge("net", found, gates)
    places = [(result.quantity, result.radius) for result in results]
    both = [(quantity, radius) for radius in RADII for quantity in ("certified", "attacked")]
    assert places == [("clean", None), *both]
    assert {result.network for result in results} == {"net"}


def test_the_measured_shares_are_naive_counts_over_all_images(found: Evaluation) -> None:
    for place in range(len(RADII)):
        certified = attacked = 0
        for sample in found.samples:
            outcome = sample.outcomes[place]
            attacked += sample.margin > 0 and not outcome.attacked
            lower = [bound for bound in outcome.lower.values() if bound is not None]
            certified += sample.margin > 0 and not outcome.attacked and any(bound > 0 for bound in lower)
        assert one("certified", Fraction(0), found, place).measured == Rate(certified, 300)
        assert one("attacked", Fraction(0), found, place).measured == Rate(attacked, 300)
    clean = sum(sample.margin > 0 for sample in found.samples)
    assert clean < 300
    assert one("clean", Fraction(0), found).measured == Rate(clean, 300)


def test_the_best_method_per_image_counts(found: Evaluation) -> None:
    for place, row in enumerate(found.rows):
        best = max(rate.count for rate in row.certified.values())
        assert one("certified", Fraction(0), found, place).measured.count >= best


@given(total=st.integers(1, 10_000), data=st.data())
def test_equality_passes_and_a_hair_more_fails(total: int, data: st.DataObject) -> None:
    rate = Rate(data.draw(st.integers(0, total)), total)
    share, hair = Fraction(rate.count, total), Fraction(1, 10**30)
    assert GateResult("net", None, "clean", share, rate).passed
    assert not GateResult("net", None, "clean", share + hair, rate).passed
    assert GateResult("net", None, "clean", share - hair, rate).passed


def test_nothing_wanted_always_passes_and_all_wanted_needs_every_image() -> None:
    assert GateResult("net", None, "clean", Fraction(0), Rate(0, 7)).passed
    assert GateResult("net", None, "clean", Fraction(1), Rate(7, 7)).passed
    assert not GateResult("net", None, "clean", Fraction(1), Rate(6, 7)).passed


@pytest.mark.parametrize("wanted", [math.nan, math.inf, -math.inf, Fraction(-1, 100), Fraction(101, 100)])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_what_is_no_share_is_refused(quantity: str, wanted: Fraction) -> None:
    with pytest.raises(InvalidInput, match="threshold") as error:
        Gate(quantity, wanted)  # type: ignore[arg-type]
    assert len(str(error.value).splitlines()) <= 3


def test_certificates_cannot_be_wanted_where_nothing_was_bounded(found: Evaluation) -> None:
    with pytest.raises(InvalidInput, match="without a method"):
        judge("net", replace(found, methods=()), [Gate("certified", Fraction(0))])


def test_records_come_back_from_plain_data(found: Evaluation) -> None:
    for result in judge("net", found, [Gate(quantity, Fraction(1, 3)) for quantity in QUANTITIES]):
        assert GateResult.from_dict(result.to_dict()) == result
        assert result.to_dict()["passed"] is result.passed
