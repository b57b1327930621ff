"""Operations: every rule encloses, is attained where it is affine, and pulls back exactly, on odd shapes too."""

import pytest
import torch
import torch.nn.functional as F
from strategies import Function, seeded
from torch import nn

import certify
from certify.activations.base import Activation
from certify.graph import trace
from certify.ops.base import Affine
from certify.registry import ACTIVATIONS, OPS
from certify.testing import check_op

R = torch.nn.functional.relu
MEAN, STD = torch.tensor([0.3, -0.2, 0.5]).view(3, 1, 1), torch.tensor([0.5, 2.0, 0.1]).view(1, 3, 1, 1)


class Constants(nn.Module):
    """Arithmetic with buffers: (x - mean) / std as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", MEAN.clone())
        self.register_buffer("std", STD.clone())

    def forward(self, x):
        return (x - self.mean) / self.std


class Shared(nn.Module):
    """One layer and one activation, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.act(self.layer(self.act(self.layer(x))))


class Functional(nn.Module):
    """A function of x and of weights that are parameters of the module."""

    def __init__(self, function, **weights) -> None:
        super().__init__()
        self.function = function
        for name, shape in weights.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


def _augmented(x):
    y = x * 1
    y += 2
    y -= 0.5
    y *= 3
    y /= 7
    return torch.concat([y, y], 1)


def _bn(s, x):
    return F.batch_norm(x, s.m, s.v.abs() + 0.1, s.w, s.b, eps=1e-2)


def _fn(function):
    return lambda: Function(function)


CASES = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear on sequences": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear to one": (lambda: nn.Linear(1, 1), (1,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2), (2, 10)),
    "conv1d dilated": (lambda: nn.Conv1d(2, 4, 3, stride=3, padding=2, dilation=2, groups=2), (2, 11)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 7)),
    "conv2d inexact stride": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(4, 3), padding=(2, 0)), (2, 9, 10)),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (4, 5, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2), (3, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(2, 2, (3, 5), padding="same", dilation=(2, 1)), (2, 6, 6)),
    "conv2d valid": (lambda: nn.Conv2d(2, 2, 3, padding="valid"), (2, 5, 4)),
    "conv2d 1x1 padded": (lambda: nn.Conv2d(2, 2, 1, padding=1, stride=2), (2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, stride=2, padding=1), (1, 3, 4, 5)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1, groups=2), (2, 5)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 3)),
    "transposed conv2d dilated": (
        lambda: nn.ConvTranspose2d(4, 4, (2, 3), stride=(3, 2), output_padding=(2, 0), dilation=(1, 2), groups=2),
        (4, 3, 3),
    ),
    "transposed conv padded beyond its stride": (
        lambda: nn.ConvTranspose1d(2, 3, 3, stride=1, output_padding=2, dilation=3), (2, 5),
    ),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(1, 2, 2, stride=2), (1, 2, 2, 2)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3, eps=0.1), (3, 2, 4)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2, affine=False), (2, 2, 2, 2)),
    "average pool": (lambda: nn.AvgPool2d(2), (2, 5, 6)),
    "average pool padded": (lambda: nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True), (2, 6, 5)),
    "average pool without pad": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), (1, 6, 6)),
    "average pool divisor": (lambda: nn.AvgPool2d((1, 3), divisor_override=2), (1, 4, 6)),
    "average pool 1d": (lambda: nn.AvgPool1d(3, 2), (2, 8)),
    "average pool 3d": (lambda: nn.AvgPool3d(2), (1, 2, 4, 4)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d(1), (3, 4, 5)),
    "adaptive pool uneven": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 4)),
    "adaptive pool enlarging": (lambda: nn.AdaptiveAvgPool1d(7), (2, 3)),
    "adaptive pool 3d": (lambda: nn.AdaptiveAvgPool3d(1), (1, 2, 3, 2)),
    "max pool 1d": (lambda: nn.MaxPool1d(3, stride=2, padding=1), (2, 9)),
    "max pool": (lambda: nn.MaxPool2d(2), (2, 4, 4)),
    "max pool overlapping": (lambda: nn.MaxPool2d(3, stride=1, padding=1), (2, 4, 5)),
    "max pool ceil": (lambda: nn.MaxPool2d(3, stride=2, ceil_mode=True), (1, 6, 6)),
    "max pool dilated": (lambda: nn.MaxPool2d(2, stride=1, dilation=2), (1, 5, 5)),
    "max pool stacked": (lambda: nn.Sequential(nn.MaxPool2d(2, 1), nn.MaxPool2d(3, 2)), (2, 6, 6)),
    "max pool 3d": (lambda: nn.MaxPool3d(2), (1, 2, 4, 2)),
    "flatten": (lambda: nn.Flatten(), (2, 3, 2)),
    "flatten later": (lambda: nn.Flatten(start_dim=2), (2, 3, 2)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 3)), (6,)),
    "identity": (lambda: nn.Sequential(nn.Identity(), nn.Linear(3, 2)), (3,)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Dropout1d(), nn.Linear(3, 2)), (3,)),
    "dropout of images": (lambda: nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(2, 2, 2)), (2, 3, 3)),
    "dropout 3d": (lambda: nn.Sequential(nn.Dropout3d(), nn.Flatten()), (1, 2, 2, 2)),
    "shuffles": (lambda: nn.Sequential(nn.ChannelShuffle(2), nn.PixelShuffle(2), nn.PixelUnshuffle(3)), (4, 3, 3)),
    "reflection pad": (lambda: nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(1, 2, 3)), (1, 4, 3)),
    "reflection pad 1d": (lambda: nn.ReflectionPad1d((2, 1)), (2, 4)),
    "replication pad": (lambda: nn.ReplicationPad2d((2, 0, 1, 1)), (1, 3, 3)),
    "replication pad 1d": (lambda: nn.ReplicationPad1d(2), (2, 3)),
    "circular pad": (lambda: nn.CircularPad2d(1), (1, 3, 3)),
    "circular pad 1d": (lambda: nn.CircularPad1d(1), (1, 3)),
    "constant pad": (lambda: nn.ConstantPad2d((1, 2, 0, 1), 0.7), (1, 3, 3)),
    "constant pad 1d": (lambda: nn.Sequential(nn.ConstantPad1d(1, -2.0), nn.ConstantPad3d(1, 1.5)), (1, 2, 3)),
    "zero pad": (lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.ZeroPad1d(1), nn.ZeroPad3d(1)), (1, 2, 2)),
    "constants": (Constants, (3, 2, 3)),
    "shared": (Shared, (4,)),
    "x + x": (_fn(lambda x: x + x), (3,)),
    "residual": (_fn(lambda x: R(x) - x + R(-x) * 0.5), (3, 2)),
    "three branches": (_fn(lambda x: (y := R(x + 0.3)) + R(y - 0.5) - 2 * y), (4,)),
    "arithmetic": (_fn(lambda x: (3 - x / 4 + 1) * -2.5 - 0.1), (3,)),
    "named arithmetic": (
        _fn(lambda x: torch.neg(x.add(1.5).sub(x, alpha=1).mul(2).div(3)) + x.neg().add(other=1)), (3,),
    ),
    "torch arithmetic": (_fn(lambda x: torch.div(torch.mul(torch.sub(torch.add(x, x), 0.5), 3), 7)), (3,)),
    "fresh in-place": (_fn(lambda x: (x * 1).add_(1).sub_(2).mul_(3).div_(0.5).relu_()), (3,)),
    "augmented assignments": (_fn(_augmented), (3,)),
    "tensor constants": (
        _fn(lambda x: R(x * torch.tensor([1.0, -2.0]) + torch.tensor([0.5, 0.1])) / torch.tensor([3.0, -0.3])), (3, 2),
    ),
    "reshape": (_fn(lambda x: x.view(x.size(0), -1).reshape(x.shape[0], 3, -1).reshape(-1, 6)), (2, 3)),
    "torch reshape": (_fn(lambda x: torch.reshape(torch.flatten(x, 1), (-1, 2, 3)).contiguous().clone()), (3, 2)),
    "permute": (_fn(lambda x: x.permute(0, 2, 1).transpose(1, 2).flatten(1)), (2, 3)),
    "torch permute": (_fn(lambda x: torch.transpose(torch.permute(x, (0, 3, 1, 2)), 1, 3)), (2, 3, 4)),
    "squeeze": (_fn(lambda x: torch.squeeze(torch.unsqueeze(x, 1), 1).unsqueeze(2).squeeze(-1)), (3,)),
    "flip": (_fn(lambda x: torch.flip(x, [1]) + x.flip(2) + torch.roll(x, 1, 2)), (3, 2)),
    "slices": (_fn(lambda x: x[:, 1:, ::2] - x[:, :-1, :2]), (3, 4)),
    "index": (_fn(lambda x: x[:, [2, 0, 2]] - x[:, None, 1].expand(-1, 3)), (3,)),
    "repeated": (_fn(lambda x: x.unsqueeze(1).expand(-1, 3, -1).repeat(1, 1, 2) * 2), (3,)),
    "unflatten method": (_fn(lambda x: x.unflatten(1, (2, 2))), (4,)),
    "chunk": (_fn(lambda x: R(x.chunk(2, 1)[0]) - torch.chunk(x, 2, dim=1)[1]), (4, 2)),
    "split": (_fn(lambda x: x.split([1, 3], 1)[1] + torch.split(x, 3, 1)[0]), (4,)),
    "cat": (_fn(lambda x: torch.cat([x, R(x), x[:, :1]], 1)), (3, 2)),
    "cat last": (_fn(lambda x: torch.concat((x * 2, x), dim=-1)), (3, 2)),
    "pad": (_fn(lambda x: F.pad(x, (1, 2, 0, 1), value=0.3) + F.pad(x, (1, 2, 0, 1), "reflect")), (2, 3, 4)),
    "crop": (_fn(lambda x: F.pad(x, (-1, 1), mode="constant")), (4,)),
    "mean": (_fn(lambda x: x.mean((2, 3)) + torch.mean(x, dim=[2, 3])), (3, 2, 4)),
    "mean keepdim": (_fn(lambda x: x - x.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2)), (3, 2, 2)),
    "sum": (_fn(lambda x: x.sum(2) - torch.sum(x, -1)), (3, 4)),
    "clamp": (_fn(lambda x: x.clamp(-0.3, 0.4) + torch.clamp(x, max=0.2) - x.clamp(min=0.1)), (4,)),
    "F.linear": (lambda: Functional(lambda s, x: F.linear(x, s.w, s.b), w=(3, 4), b=(3,)), (4,)),
    "F.conv": (
        lambda: Functional(
            lambda s, x: F.conv2d(F.conv2d(x, s.w, s.b, 2, 1), s.v, stride=(1, 2), groups=3), w=(3, 2, 3, 3), b=(3,),
            v=(3, 1, 2, 2),
        ),
        (2, 7, 6),
    ),
    "torch.conv": (lambda: Functional(lambda s, x: torch.conv1d(x, s.w, stride=2, dilation=2), w=(3, 2, 2)), (2, 9)),
    "F.conv1d, F.conv3d": (
        lambda: Functional(
            lambda s, x: F.conv3d(F.conv1d(x, s.w, padding=1).unsqueeze(1).unsqueeze(1), s.v), w=(2, 2, 3),
            v=(2, 1, 1, 2, 2),
        ),
        (2, 4),
    ),
    "torch.conv2d, torch.conv3d": (
        lambda: Functional(
            lambda s, x: torch.conv3d(torch.conv2d(x, s.w).unsqueeze(1), s.v), w=(2, 2, 2, 2), v=(1, 1, 2, 1, 2)
        ),
        (2, 4, 4),
    ),
    "F.conv_transpose": (
        lambda: Functional(
            lambda s, x: F.conv_transpose2d(x, s.w, s.b, 2, 1, 1, 2, 1), w=(4, 2, 3, 3), b=(4,)
        ),
        (4, 3, 3),
    ),
    "F.conv_transpose1d and 3d": (
        lambda: Functional(
            lambda s, x: F.conv_transpose3d(F.conv_transpose1d(x, s.w, stride=2).view(-1, 1, 1, 2, 8), s.v),
            w=(2, 2, 2), v=(1, 1, 1, 2, 2),
        ),
        (2, 4),
    ),
    "F.batch_norm": (lambda: Functional(_bn, m=(3,), v=(3,), w=(3,), b=(3,)), (3, 2, 2)),
    "F.pools": (
        _fn(
            lambda x: F.max_pool2d(x, 2, stride=1).flatten(1)
            + F.avg_pool2d(x, 2, 1).flatten(1)
            + F.adaptive_avg_pool2d(x, (3, 3)).flatten(1)
        ),
        (2, 4, 4),
    ),
    "F.pools 1d": (
        _fn(lambda x: F.max_pool1d(F.avg_pool1d(x, 2, 1), 2, 1) - F.adaptive_avg_pool1d(x, 4)), (2, 6)
    ),
    "F.pools 3d": (
        _fn(lambda x: F.max_pool3d(x, 2) + F.avg_pool3d(x, 2) - F.adaptive_avg_pool3d(x, (1, 2, 2))), (1, 2, 4, 4),
    ),
    "torch.max_pool": (_fn(lambda x: torch.max_pool1d(torch.max_pool2d(x, 2).flatten(2), 2)), (2, 4, 4)),
    "F.pixel_shuffle": (_fn(lambda x: F.pixel_shuffle(x, 2)), (4, 2, 2)),
    "F.dropout": (_fn(lambda x: F.dropout2d(F.dropout(x, 0.5, False), training=False) * 2), (2, 3, 3)),
    "F.activations": (
        _fn(
            lambda x: F.relu(x) + F.leaky_relu(x, 0.2) + F.hardtanh(x, -0.2, 0.5) + F.relu6(x) + F.sigmoid(x)
            + F.tanh(x) + F.softplus(x, 2.0) + F.elu(x, 0.5) + F.silu(x) + F.gelu(x)
            + F.hardswish(x) + F.hardsigmoid(x)
        ),
        (3,),
    ),
    "torch activations": (
        _fn(lambda x: torch.relu(x) + torch.abs(x) + torch.sigmoid(x) + torch.tanh(x) + F.relu_(x * 1)), (3,),
    ),
    "method activations": (_fn(lambda x: x.relu() + x.abs() + x.sigmoid() + x.tanh()), (3,)),
    "F.prelu": (lambda: Functional(lambda s, x: F.prelu(x, s.w), w=(3,)), (3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_rule_encloses_and_affine_ones_are_attained(name):
    build, shape = CASES[name]
    check_op(seeded(build)(seed=1), shape)


def _targets(build, shape):
    """What the registries were asked for while the model was traced."""
    model = seeded(build)().double()
    met = set()

    class Watched(dict):
        def __contains__(self, key):
            met.add(key)
            return dict.__contains__(self, key)

        def get(self, key, default=None):
            met.add(key)
            return dict.get(self, key, default)

    import certify.graph as graph
    import certify.symbolic as symbolic

    with pytest.MonkeyPatch.context() as patch:
        for module in (graph, symbolic):
            patch.setattr(module, "OPS", Watched(OPS))
            patch.setattr(module, "ACTIVATIONS", Watched(ACTIVATIONS))
        trace(model, torch.randn(1, *shape, dtype=torch.float64))
    return met


def test_the_cases_cover_both_registries():
    """Activations count as covered through any of their names: check_activation checks the facts themselves."""
    met = set().union(*(_targets(*case) for case in CASES.values()))
    assert {str(target) for target in OPS if target not in met} == set()
    covered = {ACTIVATIONS[target] for target in ACTIVATIONS if target in met}
    shipped = {facts for facts in ACTIVATIONS.values() if issubclass(facts, Activation)}
    assert {facts.__name__ for facts in shipped - covered} == {"KAFFacts", "PSSiLUFacts"}


@pytest.mark.parametrize("module", [nn.ReLU(), nn.LeakyReLU(0.3), nn.PReLU(3), nn.Hardtanh(), nn.ReLU6(), nn.Sigmoid(),
                                    nn.Tanh(), nn.ELU(0.5), nn.SiLU(), nn.GELU(), nn.Softplus(),
                                    nn.Hardswish(), nn.Hardsigmoid()])  # fmt: skip
def test_activation_modules_as_rules(module):
    check_op(nn.Sequential(nn.Conv1d(2, 3, 2), module, nn.Flatten(), nn.Linear(12, 2)), (2, 5))


@pytest.mark.parametrize("name", CASES)
def test_transpose_is_the_adjoint_of_linear(name):
    """<A, W x> = <W^T A, x> for every affine node."""
    build, shape = CASES[name]
    model = seeded(build)(seed=2).double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    graph = trace(model, x)
    with torch.no_grad():
        values = graph.forward(x)
        for node in graph.nodes.values():
            if isinstance(node.rule, Affine):
                xs = [torch.randn_like(values[name]) for name in node.inputs]
                y = node.rule.linear(*xs)
                A = torch.randn_like(y)
                pulled = node.rule.transpose(A)
                back = sum((a * b).flatten(1).sum(1) for a, b in zip(pulled, xs, strict=True))
                torch.testing.assert_close((A * y).flatten(1).sum(1), back, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("model", "shape", "part"),
    [
        (Function(lambda x: x * x), (3,), "depend on the input"),
        (Function(lambda x: 1 / (x + 5)), (3,), "x / constant"),
        (Function(lambda x: x / torch.zeros(3)), (3,), "no zero"),
        (Function(lambda x: torch.add(x, x, alpha=2)), (3,), "alpha"),
        (Function(lambda x: x + x[:, :1]), (3,), "equal shapes"),
        (Function(lambda x: x + torch.ones(2, 3)), (3,), "the same for the whole batch"),
        (Function(lambda x: x * torch.ones(4, 1, 3)), (3,), "for a batch of 2"),
        (Function(lambda x: torch.cat([x, torch.ones(2, 3)], 1)), (3,), "nodes joined"),
        (Function(lambda x: x.flip(0)), (3,), "move elements of a sample"),
        (Function(lambda x: F.dropout(x)), (3,), "training=True"),
        (Function(lambda x: x.clamp(0.5, 0.2)), (3,), "min <= max"),
        (Function(lambda x: x.clamp(torch.zeros(3))), (3,), "numbers as limits"),
        (Function(lambda x: F.avg_pool2d(x, 2)), (4, 4), "unsqueeze"),
        (nn.MaxPool1d(2), (4,), "unsqueeze"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), (1, 4, 4), "zero padding"),
        (nn.Conv1d(1, 1, 2, padding="same"), (1, 4), "odd kernel"),
        (nn.GELU(approximate="tanh"), (3,), "exact GELU"),
        (nn.ELU(-1.0), (3,), "alpha > 0"),
        (nn.Softplus(-1.0), (3,), "beta > 0"),
        (Function(lambda x: x.pow(2)), (3,), "no bound rule for pow"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_no_rule_covers_is_refused_with_a_reason(model, shape, part):
    with pytest.raises(certify.UnsupportedOperation, match=part) as caught:
        trace(model.eval(), torch.randn(1, *shape))
    assert len(str(caught.value).splitlines()) <= 3
