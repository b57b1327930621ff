"""Networks: their names, shapes, normalisation and architectures."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from certify.errors import InvalidInput
from models import KAF, cnn, mlp
from models.networks import ACTIVATIONS, Normalize, architecture, build


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
