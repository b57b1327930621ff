"""Limits of time and memory: they give timeout or unknown, never a better verdict than their absence."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import COUNT, HEADING, PROTOCOL, case, stage
from torch import Tensor

import certify
from analysis import chunk, units
from analysis.chunk import Measured, Watch, measure
from analysis.runs import Way, carry_out
from analysis.shortage import in_halves
from certify import CROWN, AlphaCROWN
from certify.errors import InvalidInput
from certify.memory import is_shortage

Bound = Callable[..., Tensor]


def measured(**changes: object) -> Measured:
    return measure(case("one", 3).batch, replace(PROTOCOL, **changes), Watch())  # type: ignore[arg-type]


def verdicts(found: Measured) -> list[list[str]]:
    return [[outcome.verdict for outcome in sample.outcomes] for sample in found.records]


def slowed(monkeypatch: pytest.MonkeyPatch, name: str, seconds: float) -> None:
    """Let a method need so much time for its bounds."""

    class Slow(CROWN):
        name = "slow"

        def bound(self, *args: object) -> Tensor:
            time.sleep(seconds)
            return CROWN().bound(*args)  # type: ignore[arg-type]

    monkeypatch.setitem(certify.registry.METHODS, name, Slow)


def test_time_enough_changes_no_verdict() -> None:
    assert verdicts(measured(sample_seconds=60.0)) == verdicts(measured())


def test_what_is_late_is_a_timeout_and_no_better_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, "slow", 0.15)
    free = verdicts(measured(methods=("slow",)))
    found = measured(methods=("slow",), sample_seconds=0.1)
    late = verdicts(found)
    assert any("timeout" in words for words in late)
    for without, within in zip(free, late, strict=True):
        for before, after in zip(without, within, strict=True):
            assert after in ("timeout", before)
            assert after != "holds"
    for sample in found.records:
        for outcome in sample.outcomes:
            assert not outcome.certified("slow")
            assert (outcome.verdict == "timeout") <= bool(outcome.late)


def test_what_came_in_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, "slow", 0.25)
    found = measured(methods=("crown", "slow"), sample_seconds=0.2)
    first = {sample.outcomes[0].verdict for sample in found.records if sample.outcomes[0].late == ("slow",)}
    assert "holds" in first
    assert all(sample.outcomes[1].lower == {"crown": None, "slow": None} for sample in found.records)


def test_alpha_crown_keeps_the_time_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    bound = AlphaCROWN.bound
    monkeypatch.setattr(AlphaCROWN, "bound", lambda self, *args: (given.append(self.time_limit), bound(self, *args))[1])
    measured(methods=("alpha-crown",), sample_seconds=5.0)
    assert given
    assert all(0 < seconds < 5 for seconds in given)
    given.clear()
    measured(methods=("alpha-crown",))
    assert set(given) == {float("inf")}


def test_a_run_with_limited_samples_says_so(tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, sample_seconds=1e-9)
    report = carry_out(stage(protocol), HEADING, Way(folder=tmp_path)).report
    assert "cannot be reproduced" in report.warnings[0]
    assert f"of {COUNT} samples ended with timeout" in report.warnings[1]
    for network in report.networks:
        for row in network.evaluation.rows:
            assert all(rate.count == 0 for rate in row.certified.values())


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_limits_that_cannot_be_meant(seconds: float) -> None:
    with pytest.raises(InvalidInput):
        replace(PROTOCOL, sample_seconds=seconds)


def scarce(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> None:
    """Let memory suffice for bounds of so many samples at once."""
    prove = certify.prove

    def scarcely(model: object, domain: certify.LpBall, *args: object, **options: object) -> object:
        if domain.batch > most:
            raise error
        return prove(model, domain, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(chunk, "prove", scarcely)


SHORTAGES = (
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
)


@pytest.mark.parametrize("error", SHORTAGES)
def test_with_less_memory_the_work_is_halved(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    free = measured()
    scarce(monkeypatch, 3, error)
    found = measured()
    assert verdicts(found) == verdicts(free)
    assert any("were halved" in text for text in found.shortages)
    assert free.shortages == ()


def test_without_memory_for_one_sample_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    free = verdicts(measured())
    scarce(monkeypatch, 0, MemoryError())
    found = measured()
    swap = {"holds": "unknown"}
    assert verdicts(found) == [[swap.get(word, word) for word in words] for words in free]
    assert any("sample 3 alone" in text for text in found.shortages)


def test_shortages_are_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    scarce(monkeypatch, 1, MemoryError())
    report = carry_out(stage(), HEADING).report
    assert all(text.startswith(("one: memory ran out", "two: memory ran out")) for text in report.warnings)
    assert len(report.warnings) > 2


def test_layers_are_measured_on_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_all = units.layer_sensitivity

    def scarcely(model: object, x: Tensor, *args: object, **options: object) -> object:
        if len(x) > 2:
            raise MemoryError
        return measure_all(model, x, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(units, "layer_sensitivity", scarcely)
    report = carry_out(stage(), HEADING).report
    assert [network.layers and network.layers.count for network in report.networks] == [1, 1]
    assert report.warnings[0] == "one: memory ran out for the layers on 6 samples"


def test_other_errors_are_no_shortage() -> None:
    def fails(samples: Tensor) -> tuple[Tensor]:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        in_halves(fails, torch.arange(4), fails, lambda _: None)
    assert not is_shortage(ValueError("out of memory"))


def test_what_memory_really_says_is_a_shortage() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_shortage(caught.value)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_halves_are_all_of_the_work_in_order(most: int) -> None:
    def squares(samples: Tensor) -> tuple[Tensor]:
        if len(samples) > most:
            raise MemoryError
        return (samples**2,)

    (found,) = in_halves(squares, torch.arange(11), squares, lambda _: None)
    assert torch.equal(found, torch.arange(11) ** 2)
