"""The reference networks: our CROWN against published-tool bounds and the independent oracle, in real arithmetic."""

import importlib.util
import math

import pytest
import torch
from shared_data import RELU_NETS, load_case, needs_shared, reference, with_our_kafs

import certify
from certify.graph import trace
from certify.oracle.auto_lirpa import intermediate_bounds, margins

pytestmark = [needs_shared, pytest.mark.shared]


def _question(name, count, method="CROWN"):
    model, images, labels, spec = load_case(name)
    entry = reference()["nets"][name][method]
    index = entry["idx"][:count]
    domain = certify.LpBall(images[index], spec["eps_raw"], clip=(0.0, 1.0))
    want = torch.tensor(entry["lb"][:count], dtype=torch.float64)
    return model, domain, certify.class_margins(labels[index], 10), want


def _not_below(margin, want):
    return bool((margin >= want - 1e-4 * (1 + want.abs())).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RELU_NETS, "cifar_conv_small_sigmoid"])
def test_crown_is_never_below_the_reference_and_proves_as_many(name):
    model, domain, spec, want = _question(name, 20)
    found = certify.prove(model, domain, spec, "crown", arithmetic="real")
    assert _not_below(found.margin.lower, want)
    assert int(found.holds.sum()) >= int((want > 0).all(1).sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist_6x100_nat", "mnist_fc_256x2", "mnist_cnn_a_adv", "cifar_cnn_a_adv"])
def test_optimised_slopes_beat_the_reference_on_average(name):
    model, domain, spec, want = _question(name, 10, "alpha-CROWN")
    found = certify.prove(model, domain, spec, certify.AlphaCROWN(steps=20, goal=math.inf), arithmetic="real")
    assert float(found.margin.lower.mean()) >= float(want.mean())
    assert int(found.holds.sum()) >= int((want > 0).all(1).sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", RELU_NETS)
def test_the_float_contract_costs_little(name):
    model, domain, spec, _ = _question(name, 5)
    real = certify.prove(model, domain, spec, "crown", arithmetic="real").margin.lower
    contract = certify.prove(model, domain, spec, "crown").margin.lower
    assert bool((contract <= real + 1e-6 * (1 + real.abs())).all())
    assert bool((contract >= real - 0.15 * (1 + real.abs())).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", RELU_NETS)
def test_equal_to_the_oracle_when_fed_its_intermediate_bounds(name):
    if importlib.util.find_spec("auto_LiRPA") is None:
        pytest.skip("auto-lirpa is not installed")
    count = 2 if name in ("cifar_resnet2b", "cifar_cnn_a_adv") else 5
    model, domain, spec, _ = _question(name, count)
    theirs = margins(model, domain, spec, "crown").double()
    graph = trace(model, domain.center)
    relaxed = [node for node in graph.nodes.values() if not node.rule.affine]
    given = dict(zip((node.inputs[0] for node in relaxed), intermediate_bounds(model, domain), strict=True))
    method = certify.CROWN(intermediate=given)
    # The rows alone, without the intersection with interval bounds that the oracle does not make.
    from certify.propagate.methods import spec_rows
    from certify.rounding import Real

    with torch.no_grad():
        ours = spec_rows(method.learn(graph, domain, Real()), spec, relax=True)
    assert bool(((ours - theirs).abs() <= 1e-4 * (1 + theirs.abs())).all())


@pytest.mark.parametrize(("radius", "proved"), [(0.005, 20), (0.01, 18), (0.015, 13), (0.02, 8)])
@pytest.mark.parametrize("arithmetic", ["real", "float"])
def test_kaf_networks_are_bounded_tightly(radius, proved, arithmetic):
    model, images, labels, _ = load_case("mnist_kaf_2x32")
    clean = model(images[:40]).argmax(1) == labels[:40]
    index = clean.nonzero()[:20, 0]
    ours = with_our_kafs(model)
    domain = certify.LpBall(images[index], radius, clip=(0.0, 1.0))
    found = certify.prove(ours, domain, certify.class_margins(labels[index], 10), "crown", arithmetic=arithmetic)
    assert int(found.holds.sum()) >= proved


@pytest.mark.parametrize(("radius", "proved"), [(0.01, 18), (0.015, 14), (0.02, 8)])
def test_kaf_networks_gain_from_optimised_slopes(radius, proved):
    model, images, labels, _ = load_case("mnist_kaf_2x32")
    index = (model(images[:40]).argmax(1) == labels[:40]).nonzero()[:20, 0]
    domain = certify.LpBall(images[index], radius, clip=(0.0, 1.0))
    method = certify.AlphaCROWN(steps=40, inner_steps=20)
    found = certify.prove(with_our_kafs(model), domain, certify.class_margins(labels[index], 10), method)
    assert int(found.holds.sum()) >= proved
