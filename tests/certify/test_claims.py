"""Claims and inputs of every kind: bands, single logits, tabular rows, sequences, fixed features, exact verdicts."""

import json

import pytest
import torch
from torch import nn

import certify
import models
from certify import Verdict


def _net(inputs=4, outputs=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs)).eval()


def test_a_regression_band_holds_when_wide_and_breaks_when_missed():
    model, x = _net(outputs=1), torch.rand(3, 4)
    y = model(x).detach()
    domain = certify.LpBall(x, 0.01)
    wide = certify.prove(model, domain, certify.output_band(y - 10, y + 10))
    assert wide.verdicts == [Verdict.HOLDS] * 3
    missed = certify.prove(model, domain, certify.output_band(y + 1, y + 2))
    assert missed.verdicts == [Verdict.VIOLATED] * 3


def test_a_single_logit_claims_its_sign():
    model, x = _net(outputs=1), torch.rand(6, 4)
    labels = (model(x)[:, 0] > 0).long()
    claim = certify.logit_sign(labels)
    right = certify.prove(model, certify.LpBall(x, 1e-4), claim)
    assert all(verdict is not Verdict.VIOLATED for verdict in right.verdicts)
    wrong = certify.prove(model, certify.LpBall(x, 1e-4), certify.logit_sign(1 - labels))
    assert wrong.verdicts == [Verdict.VIOLATED] * 6


def test_sequences_through_conv1d():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(40, 2)).eval()
    x = torch.randn(3, 2, 10)
    domain = certify.LpBall(x, 0.05)
    found = certify.bounds(model, domain)
    for point in domain.sample(50):
        y = model(point)
        assert bool(((found.lower <= y) & (y <= found.upper)).all())


def test_fixed_features_of_a_box_do_not_move():
    model, x = _net(), torch.rand(2, 4)
    wide = torch.tensor([0.5, 0.0, 0.0, 0.5])
    moving = certify.bounds(model, certify.Box(x - wide, x + wide))
    still = certify.bounds(model, certify.Box(x, x))
    y = model(x)
    assert bool(((still.lower <= y) & (y <= still.upper)).all())
    assert bool((still.width < 1e-4).all())
    assert bool((moving.width > still.width).all())


def test_a_misclassified_input_is_its_own_witness():
    model, x = _net(), torch.rand(5, 4)
    wrong = (model(x).argmax(1) + 1) % 3
    found = certify.prove(model, certify.LpBall(x, 0.0), certify.class_margins(wrong, 3))
    assert found.verdicts == [Verdict.VIOLATED] * 5
    assert torch.equal(found.witness, x)


def test_a_margin_of_exactly_zero_is_unknown():
    model = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        model.weight.fill_(0.0)
    found = certify.prove(
        model, certify.LpBall(torch.rand(1, 2), 0.1), certify.class_margins(torch.tensor([0]), 2), arithmetic="real"
    )
    assert found.verdicts == [Verdict.UNKNOWN]


def test_overflow_is_never_a_proof():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e12)
    x = torch.zeros(2, 4)
    domain = certify.LpBall(x, 1e20)
    for method in ("ibp", "crown-ibp", "crown"):
        found = certify.prove(model, domain, certify.class_margins(torch.tensor([0, 1]), 3), method)
        assert all(verdict is not Verdict.HOLDS for verdict in found.verdicts)


def test_the_attack_s_witness_lies_in_the_set_and_breaks_the_claim():
    model, x = _net(seed=3), torch.rand(20, 4)
    labels = model(x).argmax(1)
    domain, claim = certify.LpBall(x, 0.5, clip=(0.0, 1.0)), certify.class_margins(labels, 3)
    found = certify.prove(model, domain, claim, attack=certify.attacks.PGD(steps=20, restarts=2))
    broken = found.violated
    assert bool(broken.any())
    witness = found.witness[broken]
    assert bool(domain.take(broken.nonzero()[:, 0]).contains(witness).all())
    assert bool((model(witness).argmax(1) != labels[broken]).all())
    assert bool(found.witness[~broken].isnan().all())


@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_the_certified_radius_proves_and_twice_its_next_step_does_not(p):
    model, x = _net(seed=2), torch.rand(8, 4)
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    radius = certify.certified_radius(model, x, labels, p=p)
    assert float(radius[0]) == 0
    assert bool((radius[1:] > 0).all())
    claim = certify.class_margins(labels, 3).take(torch.arange(1, 8))
    assert bool(certify.prove(model, certify.LpBall(x[1:], radius[1:], p=p), claim).holds.all())
    more = certify.prove(model, certify.LpBall(x[1:], radius[1:] * 1.05 + 1e-5, p=p), claim)
    assert not bool(more.holds.any())


def test_results_do_not_depend_on_the_batch():
    model, x = _net(seed=5), torch.rand(7, 4)
    labels = model(x).argmax(1)
    whole = certify.prove(model, certify.LpBall(x, 0.05), certify.class_margins(labels, 3))
    for i in range(7):
        one = certify.prove(model, certify.LpBall(x[i : i + 1], 0.05), certify.class_margins(labels[i : i + 1], 3))
        assert one.verdicts == [whole.verdicts[i]]
        assert torch.allclose(one.margin.lower[0], whole.margin.lower[i], atol=1e-5)


def test_certificates_travel_through_json():
    model, x = _net(), torch.rand(3, 4)
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    found = certify.prove(model, certify.LpBall(x, 0.05), certify.class_margins(labels, 3))
    again = certify.Certificate.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.verdicts == found.verdicts
    assert torch.equal(again.margin.lower, found.margin.lower)
    assert torch.equal(again.witness, found.witness) or bool(again.witness.isnan().any())
    assert again.arithmetic == "float32-any-order"
    assert again.exclusions == found.exclusions != ()


@pytest.mark.parametrize(
    ("call", "mentions"),
    [
        (lambda m, d, s: certify.prove(m, d, s, "magic"), "crown-ibp"),
        (lambda m, d, s: certify.prove(m, d, s, arithmetic="exact"), "float, real"),
        (lambda m, d, s: certify.prove(m, d, certify.class_margins(torch.tensor([0]), 3)), "samples"),
        (lambda m, d, s: certify.prove(m, d, certify.class_margins(torch.tensor([0, 1]), 5)), "outputs"),
        (lambda m, d, s: certify.prove(m, "ball", s), "LpBall"),
        (lambda m, d, s: certify.prove("model", d, s), "nn.Module"),
        (lambda m, d, s: certify.prove(m, certify.LpBall(torch.rand(2, 5), 0.1), s), "shape"),
        (lambda m, d, s: certify.class_margins(torch.tensor([7]), 3), "0..2"),
        (lambda m, d, s: certify.class_margins(torch.tensor([0.5]), 3), "integers"),
        (lambda m, d, s: certify.layer_bounds(m, d, "auto-lirpa/crown"), "crown"),
    ],
)
def test_mistakes_are_named_in_at_most_three_lines(call, mentions):
    model, x = _net(), torch.rand(2, 4)
    with pytest.raises(certify.InvalidInput) as caught:
        call(model, certify.LpBall(x, 0.1), certify.class_margins(torch.tensor([0, 1]), 3))
    assert mentions in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_attack_results_and_lipschitz_estimates_travel_through_json():
    model, x = _net(), torch.rand(3, 4)
    claim = certify.class_margins(model(x).argmax(1), 3)
    found = certify.attacks.PGD(steps=3)(model, certify.LpBall(x, 0.1), claim)
    again = certify.AttackResult.from_dict(json.loads(json.dumps(found.to_dict())))
    assert torch.equal(again.witness, found.witness)
    assert torch.equal(again.margin, found.margin)
    assert torch.equal(again.success, found.success)
    bound = certify.lipschitz_constant(model, p=torch.inf, spec=claim, input_shape=(4,))
    assert certify.LipschitzEstimate.from_dict(json.loads(json.dumps(bound.to_dict()))) == bound


def test_a_kaf_too_steep_for_float64_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), models.KAF(3, gamma=1e4), nn.Linear(3, 2)).eval()
    with pytest.raises(certify.UnsupportedOperation):
        certify.bounds(model, certify.LpBall(torch.rand(1, 4), 0.1))
