"""The front end: a traced lie would be a wrong proof, so what cannot be traced faithfully is refused."""

import operator

import pytest
import torch
import torch.nn.functional as F
from references import points
from strategies import ACTIVATIONS, Function, dense, seeded
from torch import nn
from torch.nn.utils import parametrizations, prune

import certify
import models
from certify.errors import CertifyError, InvalidInput, InvalidModel, UnsupportedOperation
from certify.graph import Graph, trace

X = torch.full((1, 4), 0.1)
WIDE = certify.Box(X - 100, X + 100)


def _module(forward, **members):
    """A module with one dense layer ``lin`` whose forward is ``forward(self, x)``."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin = nn.Linear(4, 3)
            for name, value in members.items():
                setattr(self, name, value)

        def forward(self, x):
            return forward(self, x)

    return Model().eval()


def _holds_on_samples(model, domain=WIDE, methods=("ibp", "crown")):
    generator = torch.Generator().manual_seed(0)
    found = [certify.bounds(model, domain, method) for method in methods]
    for x in points(domain, generator, 20):
        y = model(x.clone()).detach()
        for interval in found:
            assert bool(((y >= interval.lower) & (y <= interval.upper)).all())


def _refused(model, error, part=None, x=X):
    with pytest.raises(error, match=part) as caught:
        certify.bounds(model, certify.Box(x - 100, x + 100))
    assert isinstance(caught.value, CertifyError)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def _after(statement):
    """A forward whose last value is changed in place after it was computed, where no sample near X shows it."""

    def forward(self, x):
        y = self.lin(x) + 1000
        statement(self, y)
        return y

    return forward


IN_PLACE = {
    "clamp_ of a dead result": lambda self, y: y.clamp_(max=5000.0),
    "relu_ of a dead result": lambda self, y: F.relu(y, inplace=True),
    "module of a dead result": lambda self, y: self.act(y),
    "through a view": lambda self, y: y.view(-1).clamp_(max=5000.0),
    "through a slice": lambda self, y: y[:, :1].relu_(),
    "through a chunk": lambda self, y: y.chunk(3, 1)[0].relu_(),
    "through data": lambda self, y: y.data.clamp_(max=5000.0),
    "through detach": lambda self, y: y.detach().clamp_(max=5000.0),
    "out=": lambda self, y: torch.clamp(y, max=5000.0, out=y),
    "power": lambda self, y: operator.ipow(y, 1.0),
    "item": lambda self, y: operator.setitem(y, (0, 0), 1000.0),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_values_changed_in_place_behind_the_trace_are_refused(name):
    _refused(_module(_after(IN_PLACE[name]), act=nn.ReLU(inplace=True)), UnsupportedOperation)


def test_a_value_that_is_read_after_an_in_place_change_is_refused():
    def twice(self, x):
        y = self.lin(x) + 1000
        return torch.relu_(y) + y

    def augmented(self, x):
        y = self.lin(x)
        z = y
        y += 1e-6
        return z

    message = _refused(_module(twice), UnsupportedOperation, "after an in-place operation changed it")
    assert "inplace=False" in message
    _refused(_module(augmented), UnsupportedOperation, "after an in-place operation changed it")


def test_in_place_operations_on_values_of_their_own_are_followed():
    def forward(self, x):
        y = self.lin(x)
        y += 0.5
        y = F.relu(y, inplace=True)
        z = self.act(y - 0.3)
        z *= 2
        return z + x[:, :3]

    _holds_on_samples(_module(forward, act=nn.ReLU(inplace=True)))


def test_a_model_that_writes_into_its_input_is_refused():
    def subtract(self, x):
        x -= 0.3
        return self.lin(x)

    for forward in (subtract, lambda self, x: self.lin(x.sub_(1)), lambda self, x: self.lin(F.relu(x, inplace=True))):
        _refused(_module(forward), UnsupportedOperation, "writes into its input")


def test_train_mode_is_refused_wherever_it_hides():
    _refused(_module(lambda s, x: s.lin(x)).train(), InvalidModel, "train mode")
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).eval()
    model[1].train()
    assert "'1'" in _refused(model, InvalidModel, "train mode")


def test_hooks_are_refused():
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = _module(lambda s, x: s.lin(x))
        getattr(model.lin, register)(lambda *_: None)
        assert "'lin'" in _refused(model, InvalidModel, "hooks")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        _refused(_module(lambda s, x: s.lin(x)), InvalidModel, "hooks on all modules")
    finally:
        handle.remove()
    pruned = prune.l1_unstructured(nn.Linear(4, 3), "weight", 2).eval()
    _refused(pruned, InvalidModel, "hooks")


def test_methods_replaced_on_an_instance_are_refused():
    model = _module(lambda s, x: s.lin(x))
    model.lin.forward = lambda x: 2 * x
    _refused(model, InvalidModel, "forward of 'lin' was replaced")
    conv = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 2), nn.Flatten()).eval()
    conv[1]._conv_forward = lambda x, w, b: x[..., :1, :1]
    _refused(conv, InvalidModel, "_conv_forward of '1' was replaced")


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class ClippedConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.clamp(-5, 5), weight, bias)


class ScaledKAF(models.KAF):
    def forward(self, x):
        return 3 * super().forward(x)


class NamedLinear(nn.Linear):
    """Adds nothing to what is computed."""

    def __init__(self, name: str, *size: int) -> None:
        super().__init__(*size)
        self.name = name

    def extra_repr(self) -> str:
        return self.name

    def describe(self) -> str:
        return self.name


def test_subclasses_that_compute_something_else_are_traced_through():
    torch.manual_seed(0)
    image = nn.Unflatten(1, (1, 2, 2))
    for model in (
        nn.Sequential(DoubledLinear(4, 3), nn.ReLU()),
        nn.Sequential(image, ClippedConv(1, 3, 2), nn.Flatten()),
        DoubledLinear(4, 2),
        nn.Sequential(NamedLinear("first", 4, 3), nn.ReLU()),
    ):
        _holds_on_samples(model.eval())
    graph = trace(nn.Sequential(NamedLinear("first", 4, 3)).eval(), X)
    assert [node.kind for node in graph.nodes.values()] == ["NamedLinear"]
    clipped = certify.bounds(nn.Sequential(image, ClippedConv(1, 3, 2), nn.Flatten()).eval(), WIDE)
    assert float(clipped.width.max()) < 30  # the clamp is in the graph: weights of at most 1/2, 4 inputs in [-5, 5]


def test_a_kaf_with_another_forward_is_no_kaf():
    with pytest.raises(UnsupportedOperation):
        certify.bounds(ScaledKAF(4).eval(), WIDE)


def test_parametrized_weights_are_those_in_use():
    for parametrize in (parametrizations.spectral_norm, parametrizations.weight_norm):
        torch.manual_seed(0)
        layer = parametrize(nn.Linear(4, 3))
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(3) if parametrize is parametrizations.weight_norm else None
        model = nn.Sequential(layer, nn.ReLU(), parametrize(nn.Linear(3, 2))).eval()
        _holds_on_samples(model)
        weight = layer.weight.detach().double()
        first = certify.layer_bounds(model, certify.Box(X - 1, X + 1), "ibp", arithmetic="real")["0"]
        torch.testing.assert_close(first.width[0].double(), 2 * weight.abs().sum(1), rtol=1e-5, atol=1e-6)


def test_randomness_is_refused_however_small():
    for forward in (
        lambda s, x: s.lin(x) + 1e-7 * torch.randn(3),
        lambda s, x: s.lin(x) + torch.rand(3),
        lambda s, x: F.dropout(s.lin(x), 0.5, True),
        lambda s, x: s.lin(F.dropout(x, 1e-9)),
    ):
        _refused(_module(forward), UnsupportedOperation)


def test_models_that_mix_the_batch_are_refused():
    normalised = nn.BatchNorm1d(4, track_running_stats=False).eval()
    _refused(normalised, InvalidModel, "batch statistics")
    for forward in (
        lambda s, x: x - x.mean(0),
        lambda s, x: x - x.mean(0, keepdim=True),
        lambda s, x: s.lin(x).view(-1),
        lambda s, x: s.lin(x) * x.shape[0],
        lambda s, x: s.lin(x.flip(0)),
        lambda s, x: s.lin(x.reshape(2, 4)),
        lambda s, x: s.small(x.view(-1, 2, 2).sum(0)),  # [2, 2] for a batch of two looks like a batch of two
        lambda s, x: s.small(x.view(-1, 2, 2).mean((0, 1), keepdim=True).expand(2, 1, 2).flatten(1)),
        lambda s, x: F.batch_norm(s.lin(x), None, None, training=True),
    ):
        _refused(_module(forward, small=nn.Linear(2, 2)), CertifyError)


def test_branches_on_data_say_where_and_how():
    def branch(self, x):
        return self.lin(x) if x.sum() > 0 else x

    def unpack(self, x):
        batch, features = x.shape
        return self.lin(x.view(batch, features))

    assert "line" in _refused(_module(branch), UnsupportedOperation, "cannot trace")
    assert "x.shape[i]" in _refused(_module(lambda s, x: s.lin(x) * len(x)), UnsupportedOperation, "cannot trace")
    _refused(_module(lambda s, x: s.lin(x) * x.max().item()), UnsupportedOperation, "for a batch of 2")
    _holds_on_samples(_module(unpack))


@pytest.mark.parametrize(
    ("forward", "members", "part"),
    [
        (lambda s, x: s.norm(x), {"norm": nn.LayerNorm(4)}, r"nn.LayerNorm at 'norm'"),
        (lambda s, x: s.rnn(x.view(-1, 2, 2))[0].flatten(1), {"rnn": nn.LSTM(2, 3)}, r"nn.LSTM at 'rnn'"),
        (
            lambda s, x: s.block["attend"](x.view(-1, 2, 2), x.view(-1, 2, 2), x.view(-1, 2, 2))[0].flatten(1),
            {"block": nn.ModuleDict({"attend": nn.MultiheadAttention(2, 1)})},
            r"nn.MultiheadAttention at 'block.attend'",
        ),
        (lambda s, x: torch.softmax(x, 1), {}, r"softmax"),
        (lambda s, x: (x + torch.arange(4) * 50.0).max(1, keepdim=True)[0], {}, r"no bound rule for max"),
        (lambda s, x: (x + torch.arange(4) * 50.0).max(1, keepdim=True).values, {}, r"no bound rule for max"),
        (lambda s, x: (x + torch.arange(4) * 50.0).sort(1)[0], {}, r"no bound rule for sort"),
        (lambda s, x: torch.topk(x + torch.arange(4) * 50.0, 2)[0], {}, r"no bound rule for topk"),
        (lambda s, x: s.lin(x) + 0 * s.lin(x.data), {}, r"attribute 'data'"),
        (lambda s, x: x.view(-1, 2, 2).mT.flatten(1), {}, r"attribute 'mT'"),
        (lambda s, x: x.mean(1, keepdim=True, dtype=torch.float64), {}, r"turns torch.float32 into torch.float64"),
        (lambda s, x: x.half().float(), {}, r"no bound rule for half"),
        (lambda s, x: x > 0, {}, r"no bound rule for gt"),
        (lambda s, x: s.lin(x)[:, 0], {}, r"x\[:, :1\]"),
        (lambda s, x: (s.lin(x), x), {}, r"output that is no tensor"),
        (lambda s, x: {"logits": s.lin(x)}, {}, r"output that is no tensor"),
        (lambda s, x: s.lin.bias, {}, r"output that is no tensor"),
        (lambda s, x: x, {}, r"returns its input"),
    ],
)
def test_what_has_no_rule_is_named_with_its_path(forward, members, part):
    message = _refused(_module(forward, **members), UnsupportedOperation, part)
    assert "expected:" in message


def test_several_inputs_are_refused():
    class Two(nn.Module):
        def forward(self, x, y=None):
            return x + 1 if y is None else x + y

    _refused(Two().eval(), UnsupportedOperation, "several inputs")


def test_models_in_an_impossible_state_are_refused():
    broken = nn.Sequential(nn.Linear(4, 2)).eval()
    broken[0].weight.data[0, 0] = torch.nan
    assert "'0.weight'" in _refused(broken, InvalidModel, "NaN")
    broken = nn.BatchNorm1d(4).eval()
    broken.running_var[0] = torch.inf
    _refused(broken, InvalidModel, "infinities")
    _refused(nn.Linear(4, 2).half().eval(), InvalidModel, "float16")
    _refused(nn.Linear(4, 2).bfloat16().eval(), InvalidModel, "bfloat16")
    _refused(nn.Linear(4, 2).double().eval(), InvalidModel, r"model.to\(inputs.device, inputs.dtype\)")
    _refused(nn.Linear(4, 2, device="meta").eval(), InvalidModel, "meta")
    _refused(_module(lambda s, x: s.lin(x) + float("inf")), InvalidModel, "infinity in a constant")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _refused(nn.Linear(4, 2).eval(), InvalidModel, "autocast")
    _refused(nn.Linear(5, 2).eval(), InvalidInput, "fails on inputs of shape")
    with pytest.raises(InvalidInput, match=r"torch\.nn\.Module"):
        certify.bounds(torch.relu, WIDE)
    with pytest.raises(InvalidInput, match=r"certify\.LpBall or certify\.Box"):
        certify.bounds(nn.Linear(4, 2).eval(), X)


def test_registered_roots_are_graphs_of_one_node():
    torch.manual_seed(0)
    for model in (nn.Linear(4, 3), models.KAF(4, init="elu"), nn.ReLU(), nn.BatchNorm1d(4)):
        assert list(trace(model.eval(), X).nodes) == ["model"]
        _holds_on_samples(model, certify.Box(X - 1, X + 1))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
        self.act, self.input = nn.Tanh(), nn.Linear(4, 4)

    def forward(self, x):
        y = self.act(self.input(x))
        for block in self.blocks:
            y = y + self.act(block(y))
        return F.relu(y)


def test_nodes_carry_the_users_paths():
    graph = trace(Nested().eval(), X)
    assert list(graph.nodes) == [
        "input@2", "act", "blocks.0.0", "blocks.0.1", "act@2", "add", "blocks.1.0", "blocks.1.1", "act@3", "add_1",
        "relu",
    ]  # fmt: skip
    assert graph.nodes["blocks.1.0"].parameters == 20
    assert graph.nodes["input@2"].inputs == ("input",)
    assert set(certify.layer_bounds(Nested().eval(), WIDE)) == set(graph.nodes)


def test_the_graph_computes_what_the_model_computes():
    for name in ACTIVATIONS:
        model = dense(name).double()
        x = torch.randn(3, 6, dtype=torch.float64)
        torch.testing.assert_close(trace(model, x).forward(x)["4"], model(x))


def test_float64_models_keep_all_digits_of_their_constants():
    model = Function(lambda x: (x * 0.1 + 0.3) / 0.7 - 1e-9).eval()
    x = torch.rand(1, 3, dtype=torch.float64)
    _holds_on_samples(model, certify.Box(x, x + 1e-12))


def test_a_callers_inference_mode_and_gradients_do_not_matter():
    model = seeded(lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(2, 2)))()
    want = certify.bounds(model, WIDE)
    with torch.inference_mode():
        got = certify.bounds(model, certify.Box(WIDE.hull.lower.float(), WIDE.hull.upper.float()))
    assert torch.equal(got.lower, want.lower)
    assert not want.lower.requires_grad


def test_tracing_leaves_the_callers_random_state_alone():
    before = torch.get_rng_state()
    certify.bounds(dense("kaf"), certify.Box(torch.zeros(1, 6), torch.ones(1, 6)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kafs_base_must_be_one_function_for_all_channels():
    for base in (nn.Identity(), nn.Linear(4, 4), nn.PReLU(4), nn.LayerNorm(4)):
        with pytest.raises(UnsupportedOperation):
            certify.bounds(models.KAF(4, base=base).eval(), WIDE)
    _holds_on_samples(models.KAF(4, base=nn.PReLU()).eval(), certify.Box(X - 3, X + 3))


def test_rounding_of_large_weights_that_cancel_is_no_lie() -> None:
    """Batch normalisation far from its mean, and a KAF of large weights, differ from their rules by rounding alone."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    norm.running_mean.fill_(3e4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].bias.fill_(3e4)
    graph = trace(model, torch.rand(2, 4))
    assert len(graph.nodes) == 3


@pytest.mark.parametrize("lie", [1.0005, 1.005, 1.5])
def test_small_lies_are_refused_too(lie, monkeypatch):
    """What float32 might explain, float64 does not."""
    model, honest = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).eval(), Graph.forward

    def lying(self, x):
        found = honest(self, x)
        found[self.output] = found[self.output] * lie
        return found

    trace(model, torch.rand(2, 3))
    monkeypatch.setattr(Graph, "forward", lying)
    with pytest.raises(UnsupportedOperation, match="does not compute"):
        trace(model, torch.rand(2, 3))
