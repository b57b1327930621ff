"""Evaluation: certified <= attacked <= clean, alarms that fire, counts that equal naive ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import certify
from analysis.comparison import compare
from analysis.evaluation import Protocol, describe, evaluate
from analysis.outputs import output_bounds
from analysis.records import Evaluation, Rate
from certify.attacks import FGSM, PGD
from certify.errors import InvalidInput, InvalidModel, SoundnessAlarm
from models import mlp

RADII = (Fraction(1, 50), Fraction(1, 10), Fraction(1, 4))
PROTOCOL = Protocol(radii=RADII, methods=("ibp", "crown"), attack=PGD(steps=10))


def problem(n: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """A random network, and labels that are its predictions but for every fifth."""
    torch.manual_seed(3)
    model = mlp([6, 12, 4]).eval()
    x = torch.rand(n, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % 4
    return model, x, y


@pytest.fixture(scope="module")
def found() -> Evaluation:
    model, x, y = problem()
    return evaluate(model, x, y, PROTOCOL)


def test_certified_is_below_attacked_is_below_clean(found: Evaluation) -> None:
    for row in found.rows:
        for rate in row.certified.values():
            assert rate.count <= row.attacked.count <= found.clean.count
        assert row.attacked.total == found.clean.total == 40
    assert found.clean.count == 32


def test_rates_shrink_with_the_radius(found: Evaluation) -> None:
    counts = [row.attacked.count for row in found.rows]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_a_misclassified_sample_is_never_robust(found: Evaluation) -> None:
    wrong = [sample for sample in found.samples if sample.predicted != sample.label]
    assert len(wrong) == 8
    for sample in wrong:
        assert not sample.correct
        assert {outcome.verdict for outcome in sample.outcomes} == {"violated"}


def test_counts_are_those_of_prove(found: Evaluation) -> None:
    model, x, y = problem()
    for row in found.rows:
        ball = certify.LpBall(x, row.radius, clip=(0.0, 1.0))
        for method, rate in row.certified.items():
            proof = certify.prove(model, ball, certify.class_margins(y, 4), method)
            assert int(proof.holds.sum()) == rate.count


def test_batches_change_no_certificate(found: Evaluation) -> None:
    model, x, y = problem()
    parts = evaluate(model, x, y, replace(PROTOCOL, batch=7))
    assert [row.certified for row in parts.rows] == [row.certified for row in found.rows]
    assert [sample.index for sample in parts.samples] == list(range(40))


def test_what_fell_stays_fallen_and_is_audited_where_it_fell_alone(found: Evaluation) -> None:
    fell = 0
    for sample in found.samples:
        if not sample.correct:
            continue
        states = [outcome.attacked for outcome in sample.outcomes]
        assert states == sorted(states)
        for before, outcome in zip([False, *states], sample.outcomes, strict=False):
            assert all((bound is None) == before for bound in outcome.lower.values())
            fell += outcome.attacked and not before
    assert fell > 0


def test_witnesses_lie_in_the_ball_and_are_wrong() -> None:
    model, x, y = problem()
    kept: dict[Fraction, Tensor] = {}
    result = evaluate(model, x, y, PROTOCOL, keep=lambda radius, _, points: kept.update({radius: points.clone()}))
    for place, radius in enumerate(RADII):
        assert bool(certify.LpBall(x, radius, clip=(0.0, 1.0)).contains(kept[radius]).all())
        fooled = torch.tensor([sample.outcomes[place].attacked for sample in result.samples])
        assert bool((model(kept[radius]).argmax(1)[fooled] != y[fooled]).all())


class Liar:
    """A method that certifies everything."""

    name = "liar"

    def bound(self, graph: object, domain: object, spec: certify.Spec, arithmetic: object) -> torch.Tensor:
        return torch.ones_like(spec.d, dtype=torch.float64)


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(certify.registry.METHODS, "liar", Liar)


@pytest.mark.usefixtures("liar")
def test_a_sample_both_certified_and_attacked_stops_the_run_and_is_saved(tmp_path: Path) -> None:
    model, x, y = problem()
    with pytest.raises(SoundnessAlarm) as caught:
        evaluate(model, x, y, replace(PROTOCOL, methods=("crown", "liar")), dump=tmp_path / "alarms")
    assert caught.value.exit_code == 6
    assert len(str(caught.value).splitlines()) <= 3
    (file,) = (tmp_path / "alarms").iterdir()
    assert file.name in str(caught.value)
    with np.load(file) as saved:
        radius, image, witness = float(saved["radius"]), saved["image"], torch.from_numpy(saved["witness"])
        assert np.abs(witness.numpy() - image).max() <= radius
        assert int(model(witness[None]).argmax()) != int(saved["label"])
        assert np.array_equal(image, x[int(saved["index"])].numpy())


@pytest.mark.usefixtures("liar")
def test_in_real_arithmetic_the_witness_wins() -> None:
    model, x, y = problem()
    result = evaluate(model, x, y, replace(PROTOCOL, methods=("liar",), arithmetic="real"))
    assert [row.certified["liar"].count for row in result.rows] == [row.attacked.count for row in result.rows]


def test_without_methods_nothing_is_certified() -> None:
    model, x, y = problem()
    result = evaluate(model, x, y, replace(PROTOCOL, methods=(), attack=FGSM()))
    assert all(row.certified == {} for row in result.rows)
    assert {outcome.verdict for sample in result.samples for outcome in sample.outcomes} == {"violated", "unknown"}


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_other_norms_are_ordered_too(p: float) -> None:
    model, x, y = problem()
    result = evaluate(model, x, y, replace(PROTOCOL, p=p, methods=("crown",)))
    assert result.norm == f"l{p:g}"
    for row in result.rows:
        assert row.certified["crown"].count <= row.attacked.count <= result.clean.count


def test_records_survive_json(found: Evaluation) -> None:
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Evaluation.from_dict(json.loads(text)) == found


def test_a_model_with_nan_outputs_is_refused() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * 1e38 * 1e38

    _, x, y = problem()
    with pytest.raises((InvalidModel, InvalidInput, certify.UnsupportedOperation)):
        evaluate(Bad().eval(), x, y, PROTOCOL)


@pytest.mark.parametrize(
    "change",
    [
        {"radii": ()},
        {"radii": (Fraction(-1, 255),)},
        {"radii": (float("nan"),)},
        {"radii": (float("inf"),)},
        {"methods": ("foo",)},
        {"arithmetic": "exact"},
        {"batch": 0},
    ],
)
def test_protocols_that_cannot_be_meant(change: dict) -> None:
    with pytest.raises(InvalidInput):
        Protocol(**{"radii": RADII, **change})


def test_samples_that_cannot_be_meant() -> None:
    model, x, y = problem()
    for args in ((x[:0], y[:0]), (x, y[:3]), (x, y + 4), (x[:, :3], y)):
        with pytest.raises(InvalidInput):
            evaluate(model, *args, PROTOCOL)
    with pytest.raises(InvalidModel):
        evaluate(model.train(), x, y, PROTOCOL)


@pytest.mark.parametrize(
    ("answer", "word"), [(lambda y: (y, y), "returns a tuple"), (lambda y: {}["logits"], "KeyError, 'logits'")]
)
def test_models_that_cannot_be_meant(answer: Callable[[Tensor], object], word: str) -> None:
    model, x, y = problem()
    model.register_forward_hook(lambda _, __, outputs: answer(outputs))
    with pytest.raises(InvalidInput, match=word) as caught:
        evaluate(model, x, y, PROTOCOL)
    assert len(str(caught.value).splitlines()) <= 3


def test_attacks_are_described_by_what_they_are() -> None:
    assert describe(PGD(steps=7, loss="ce")) == "PGD(steps=7, restarts=1, loss=ce)"
    assert describe(FGSM()) == "FGSM()"


# Clopper-Pearson ends solve P(X >= k | low) = P(X <= k | high) = 2.5 %.
@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 10), (87, 100), (450, 450), (3, 7)])
def test_intervals_solve_their_defining_equations(count: int, total: int) -> None:
    from math import comb

    def at_most(k: int, p: float) -> float:
        return sum(comb(total, i) * p**i * (1 - p) ** (total - i) for i in range(k + 1))

    rate = Rate(count, total)
    assert rate.low <= rate.value <= rate.high
    assert rate.low == 0 if count == 0 else 1 - at_most(count - 1, rate.low) == pytest.approx(0.025, abs=1e-9)
    assert rate.high == 1 if count == total else at_most(count, rate.high) == pytest.approx(0.025, abs=1e-9)


def test_intervals_of_the_literature() -> None:
    assert (round(100 * Rate(87, 100).low, 1), round(100 * Rate(87, 100).high, 1)) == (78.8, 92.9)


def test_counts_that_cannot_be() -> None:
    for count, total in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(InvalidInput):
            Rate(count, total)


def test_comparison_counts_what_only_one_gets_right(found: Evaluation) -> None:
    model, x, y = problem()
    with torch.no_grad():
        twin = mlp([6, 12, 4]).eval()
    other = evaluate(twin, x, y, PROTOCOL)
    rows = compare(found, other)
    assert rows[0].quantity == "clean"
    assert rows[0].first_only - rows[0].second_only == found.clean.count - other.clean.count
    for row in compare(found, found):
        assert (row.first_only, row.second_only, row.p_value) == (0, 0, 1.0)
    with pytest.raises(InvalidInput):
        compare(found, evaluate(model, x, y, replace(PROTOCOL, radii=RADII[:1])))


def test_mcnemar_is_the_sign_test() -> None:
    from analysis.comparison import _paired

    pairs = [(True, False)] * 6 + [(True, True)] * 3
    assert _paired("clean", None, pairs).p_value == pytest.approx(2 * 0.5**6)


def test_output_bounds_hold_at_random_points() -> None:
    model, x, y = problem(6)
    points = certify.LpBall(x, RADII[1], clip=(0.0, 1.0)).sample(200)
    with torch.no_grad():
        values = torch.stack([model(point) for point in points])
    rows = output_bounds(model, x, y, replace(PROTOCOL, radii=(RADII[1],)))
    assert len(rows) == 12
    for row in rows:
        sample = values[:, row.index]
        assert bool((sample >= torch.tensor(row.lower)).all() & (sample <= torch.tensor(row.upper)).all())
        assert (row.margin is None) == (row.verdict == "violated")
