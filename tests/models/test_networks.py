"""Networks: their names, shapes, normalisation and architectures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import certify
import models
from certify.errors import CertifyError, InvalidInput
from models import KAF, cnn, mlp
from models.activations import ACTIVATIONS
from models.networks import Normalize, architecture, build


def test_children_have_readable_names() -> None:
    dense = [name for name, _ in mlp([64, 32, 16, 10], "kaf", mean=[0.3], std=[0.4]).named_children()]
    assert dense == ["normalize", "flatten", "linear1", "act1", "linear2", "act2", "linear3"]
    conv = [name for name, _ in cnn((1, 28, 28), 10).named_children()]
    assert conv == ["conv1", "act1", "conv2", "act2", "flatten", "linear1", "act3", "linear2"]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_builds_both_networks_from_json(activation: str) -> None:
    for network, shape in (("mlp", (1, 8, 8)), ("cnn", (3, 9, 8))):
        plan = architecture(network, shape, 5, activation, mean=[0.5] * shape[0], std=[0.2] * shape[0])
        model = build(json.loads(json.dumps(plan)), seed=0)
        again = build(model.architecture, seed=0)
        x = torch.rand(2, *shape)
        assert model(x).shape == (2, 5)
        assert torch.equal(model(x), again(x))


def test_activations_know_their_channels() -> None:
    net = cnn((1, 8, 8), 10, "kaf", width=4)
    assert [len(m.alpha) for m in net.modules() if isinstance(m, KAF)] == [4, 8, 100]


def test_a_factory_makes_the_activation_and_leaves_no_architecture() -> None:
    net = mlp([4, 3, 2], lambda channels: KAF(channels, init=torch.sin))
    assert len(net.act1.alpha) == 3
    assert net.architecture is None


def test_normalisation_is_x_minus_mean_over_std() -> None:
    x = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0])
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    assert torch.equal(Normalize(mean.tolist(), std.tolist())(x), expected)


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    plan = architecture("mlp", (4,), 2, "relu")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(build(plan, seed=3).linear1.weight, build(plan, seed=3).linear1.weight)
    assert torch.equal(torch.rand(3), expected)


def test_a_vector_input_is_a_batch_of_rows() -> None:
    assert mlp([7, 5, 3], nn.PReLU)(torch.rand(2, 7)).shape == (2, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp([64]),
        lambda: mlp([64, 0, 10]),
        lambda: mlp([64, 10, 10], "swoosh"),
        lambda: mlp([64, 10], mean=[0.5], std=[0.0]),
        lambda: mlp([64, 10], mean=[0.5, 0.5], std=[0.1]),
        lambda: mlp([64, 10], mean=[float("nan")], std=[0.1]),
        lambda: cnn((28, 28), 10),
        lambda: cnn((1, 3, 3), 10),
        lambda: build({"network": "transformer"}),
        lambda: build({"network": ["mlp"]}),
        lambda: architecture("mlp", (4,), 2, "relu", hidden=32),
        lambda: build({"network": "cnn", "input_shape": [1, 8, 8], "classes": 4, "width": True}),
        lambda: build({"network": "mlp", "sizes": [4, 2], "colour": "red"}),
        lambda: build({"network": "mlp"}),
        lambda: build({"network": "mlp", "sizes": 3}),
        lambda: build({"network": "mlp", "sizes": [4, 2], "activation": ["relu"]}),
    ],
)
def test_refuses_what_cannot_be_built(make) -> None:
    with pytest.raises(InvalidInput) as error:
        make()
    assert len(str(error.value).splitlines()) <= 3


def test_wrong_types_are_told_by_the_option() -> None:
    with pytest.raises(InvalidInput, match=r"^hidden = 32"):
        architecture("mlp", (4,), 2, "relu", hidden=32)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"^batchnorm = 'no' of cnn7\nexpected: true or false"):
        build(architecture("cnn7", (1, 8, 8), 4, "relu", batchnorm="no"))


def test_the_package_exports_what_errors_name() -> None:
    assert models.build is build
    assert models.architecture is architecture
    assert not [name for name in models.__all__ if not hasattr(models, name)]


COUNTS = {
    # published or counted by hand: weights of convolutions and dense layers, two numbers per normalised channel
    "resnet20": 272_474,
    "resnet56": 855_578,
    "preactresnet18": 11_172_170,
    "vgg": 551_722,
    "cnn7": 17_192_650,
}


@pytest.mark.parametrize("name", COUNTS)
def test_networks_have_their_published_sizes(name: str) -> None:
    model = build(architecture(name, (3, 32, 32), 10, "relu"), seed=0)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


SMALL = {
    "vgg": {"width": 4, "pool": "avg"},
    "resnet20": {"width": 4},
    "resnet56": {"width": 2},
    "preactresnet18": {"width": 4},
    "cnn7": {"width": 4},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_networks_build_again_from_their_architecture(name: str, shape: tuple[int, ...]) -> None:
    plan = architecture(name, shape, 7, "kaf-elu", mean=[0.5] * shape[0], std=[0.2] * shape[0], **SMALL[name])
    model = build(json.loads(json.dumps(plan)), seed=0).eval()
    again = build(json.loads(json.dumps(model.architecture)), seed=0).eval()
    x = torch.rand(2, *shape)
    assert model(x).shape == (2, 7)
    assert torch.equal(model(x), again(x))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("activation", ["relu", "kaf-elu"])
def test_networks_are_bounded(name: str, activation: str) -> None:
    model = build(architecture(name, (1, 12, 12), 4, activation, **SMALL[name]), seed=0)
    x = torch.rand(2, 1, 12, 12)
    model.train()
    model(torch.rand(16, 1, 12, 12))  # running statistics that are not those of the start
    ball = certify.LpBall(x, 1e-3, clip=(0.0, 1.0))
    found = certify.bounds(model.eval(), ball, "crown")
    with torch.no_grad():
        for points in ball.sample(5):
            y = model(points)
            assert bool(((y >= found.lower) & (y <= found.upper)).all())
    assert bool(torch.isfinite(found.width).all())


def test_the_vgg_is_that_of_the_thesis() -> None:
    names = [name for name, _ in build(architecture("vgg", (3, 32, 32), 10, "relu")).named_children()]
    block = "conv{0} norm{0} act{0} conv{1} norm{1} act{1} pool{2} dropout{2}"
    expected = " ".join(block.format(2 * i - 1, 2 * i, i) for i in (1, 2, 3))
    assert names == [*expected.split(), "flatten", "linear1", "norm7", "act7", "linear2"]
    model = build(architecture("vgg", (3, 32, 32), 10, "relu"))
    assert [model.get_submodule(f"dropout{i}").p for i in (1, 2, 3)] == [0.2, 0.3, 0.4]
    assert [model.get_submodule(f"conv{i}").out_channels for i in range(1, 7)] == [32, 32, 64, 64, 128, 128]


@pytest.mark.parametrize("init", ["he-uniform", "orthogonal"])
def test_inits_have_the_gain_of_a_relu(init: str) -> None:
    model = build(architecture("mlp", (64,), 10, "relu", hidden=(96, 64), init=init), seed=0)
    for layer in (model.linear1, model.linear2):
        assert bool((layer.bias == 0).all())
        inputs, outputs = layer.in_features, layer.out_features
        wanted = (2 / inputs) ** 0.5 if init == "he-uniform" else (2 / max(inputs, outputs)) ** 0.5
        assert float(layer.weight.detach().std()) == pytest.approx(wanted, rel=0.1)
    if init == "he-uniform":
        assert float(model.linear1.weight.detach().abs().max()) <= (6 / 64) ** 0.5
    else:
        gram = model.linear1.weight.detach().t() @ model.linear1.weight.detach()
        torch.testing.assert_close(gram, 2 * torch.eye(64), rtol=0, atol=1e-5)


def first_to_last(**options: Any) -> float:
    """The norm of the first 3x3 convolution's gradient over that of the last one, at the start, on noise."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    model = build(architecture("resnet56", (3, 32, 32), 10, **options), seed=0).train()
    nn.functional.cross_entropy(model(x), y).backward()
    found = [m.weight.grad.norm() for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    return float(found[0] / found[-1])


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "kaf", "kaf-elu", "kaf-free", "silu+kaf"])
def test_gradients_of_a_default_resnet56_neither_explode_nor_vanish(activation: str) -> None:
    assert 0.1 <= first_to_last(activation=activation) <= 10


@pytest.mark.slow
def test_gradients_of_the_published_kaf_resnet56_explode() -> None:
    assert first_to_last(activation="kaf", preactivation=False) > 1e9


def test_torchvision_networks_are_bounded_where_their_operations_are_known() -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.resnet18(weights=None, num_classes=5).eval()
    ball = certify.LpBall(torch.rand(1, 3, 32, 32), 1e-3)
    found = certify.bounds(model, ball, "ibp")
    with torch.no_grad():
        y = model(ball.sample(1)[0])
    assert bool(((y >= found.lower) & (y <= found.upper)).all())
    with pytest.raises(CertifyError) as error:
        certify.bounds(models.swin_t(weights=None).eval(), certify.LpBall(torch.rand(1, 3, 224, 224), 1e-3), "ibp")
    assert len(str(error.value).splitlines()) <= 3
    assert "features" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"network": "vgg", "pool": "median"},
        {"network": "vgg", "input_shape": [3, 4, 4]},
        {"network": "resnet20", "input_shape": [3, 2, 2]},
        {"network": "resnet20", "init": "lucky"},
        {"network": "resnet20", "depth": 8},
        {"network": "resnet20", "preactivation": "no"},
        {"network": "resnet20", "preactivation": 0},
        {"network": "cnn7", "batchnorm": "false"},
        {"network": "cnn7", "width": 0},
        {"network": "resnet57"},
    ],
    ids=str,
)
def test_refuses_networks_that_cannot_be_meant(options: dict) -> None:
    with pytest.raises(InvalidInput) as error:
        build({"input_shape": [3, 32, 32], "classes": 10, "activation": "relu"} | options)
    assert len(str(error.value).splitlines()) <= 3
