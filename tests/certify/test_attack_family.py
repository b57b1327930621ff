"""Each attack reaches what can be known exactly: affine worst cases, distances to planes, masked gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from certify.attacks import APGD, APGDT, FMN, PGD, Adaptive, Attack, CarliniWagner, DeepFool, Ensemble, Square, Transfer
from certify.attacks.apgd import _checkpoints
from certify.attacks.losses import LOSSES
from certify.errors import InvalidInput, InvalidModel
from certify.sets import Box, LpBall
from certify.specs import Spec, class_margins
from models import mlp


def _affine(inputs: int = 12, classes: int = 4, batch: int = 20) -> tuple[nn.Linear, Tensor, Spec]:
    torch.manual_seed(2)
    model = nn.Linear(inputs, classes).double()
    x = torch.rand(batch, inputs).double()
    labels = model(x).argmax(1)
    return model, x, class_margins(labels, classes, torch.float64)


def _lowest(model: nn.Linear, ball: LpBall, spec: Spec) -> Tensor:
    """min over the ball of the smallest row, analytically."""
    normals = spec.C @ model.weight
    offset = spec.C @ model.bias
    return torch.stack([offset[:, r] - ball.support(-normals[:, r]) for r in range(normals.shape[1])], 1).amin(1)


def _distance(model: nn.Linear, x: Tensor, spec: Spec, p: float) -> Tensor:
    """The exact l_p distance to the nearest plane on which a row is 0 (Hoelder: row over dual norm)."""
    dual = {1: math.inf, 2: 2, math.inf: 1}[p]
    rows = spec.rows(model(x)).detach()
    return (rows / torch.linalg.vector_norm(spec.C @ model.weight, ord=dual, dim=2)).amin(1).detach()


@pytest.mark.parametrize("p", [1, 2, torch.inf])
@pytest.mark.parametrize("attack", [APGD(loss="margin"), APGDT(loss="margin")], ids=repr)
def test_auto_pgd_attains_the_worst_case_of_affine_models(attack: Attack, p: float) -> None:
    model, x, spec = _affine()
    ball = LpBall(x, 0.02, p=p)
    truth = _lowest(model, ball, spec).detach()
    whole = truth > 1e-6
    found = attack(model, ball, spec, generator=torch.Generator().manual_seed(0)).margin.amin(1)
    assert bool((found >= truth - 1e-12).all())
    assert int(whole.sum()) >= 10
    torch.testing.assert_close(found[whole], truth[whole], rtol=0, atol=2e-3)


def test_square_attains_the_worst_corner_of_affine_models_without_gradients() -> None:
    model, x, spec = _affine()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for domain in (LpBall(x, 0.02), Box(x - 0.02, x + 0.02)):
        truth = _lowest(model, LpBall(x, 0.02), spec).detach()
        whole = truth > 1e-6
        found = Square(queries=2000)(model, domain, spec, generator=torch.Generator().manual_seed(0)).margin.amin(1)
        torch.testing.assert_close(found[whole], truth[whole], rtol=0, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_square_in_other_norms_stays_inside_and_breaks_what_is_easy(p: float) -> None:
    model, x, spec = _affine()
    distance = _distance(model, x, spec, p)
    ball = LpBall(x, 8 * distance, p=p)
    result = Square(queries=1000)(model, ball, spec, generator=torch.Generator().manual_seed(0))
    assert bool(ball.contains(result.witness).all())
    assert bool(result.success.all())


@pytest.mark.parametrize("p", [1, 2, torch.inf])
@pytest.mark.parametrize("attack", [FMN(steps=300), DeepFool(), CarliniWagner(searches=12, steps=200)], ids=repr)
def test_minimum_norm_attacks_find_the_distance_to_the_nearest_plane(attack: Attack, p: float) -> None:
    if isinstance(attack, CarliniWagner) and p != 2:
        model, x, spec = _affine()
        with pytest.raises(InvalidInput, match="fmn"):
            attack(model, LpBall(x, 1.0, p=p), spec)
        return
    model, x, spec = _affine()
    ball = LpBall(x, 10.0, p=p)
    result = attack(model, ball, spec, generator=torch.Generator().manual_seed(0))
    assert bool(result.success.all())
    truth, found = _distance(model, x, spec, p), ball.distance(result.witness)
    assert bool((found >= truth * (1 - 1e-9)).all())
    assert bool((found <= truth * 1.05 + 1e-3).all()), (found / truth).max()


@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_deepfool_arrives_in_float32_and_beside_a_data_range(p: float) -> None:
    """Its last steps are smaller than rounding, and pixels at an end of the range stand still."""
    torch.manual_seed(0)
    model, x = mlp([16, 32, 32, 4]).eval(), torch.rand(100, 16)
    ball, spec = LpBall(x, 64.0, p, (0.0, 1.0)), class_margins(model(x).argmax(1), 4)
    result = DeepFool()(model, ball, spec)
    assert bool(result.success.all())
    nearest = ball.distance(FMN()(model, ball, spec, generator=torch.arange(100)).witness)
    assert float((ball.distance(result.witness) / nearest).median()) < 1.8


def test_minimum_norm_attacks_keep_to_the_data_range_and_the_radius() -> None:
    model, x, spec = _affine()
    near = LpBall(x, 0.5 * _distance(model, x, spec, torch.inf))
    assert not bool(FMN()(model, near, spec).success.any())
    clipped = LpBall(x, 5.0, clip=(0.0, 1.0))
    witness = FMN()(model, clipped, spec).witness
    assert bool(((witness >= 0) & (witness <= 1)).all())
    with pytest.raises(InvalidInput, match="LpBall"):
        FMN()(model, Box(x - 0.1, x + 0.1), spec)


def test_the_ratio_of_logits_ignores_shift_and_scale() -> None:
    rows = torch.tensor([[0.5, 1.0, 2.0, 4.0], [-1.0, 3.0, 0.5, 2.0]], dtype=torch.float64)
    everything, second = torch.full((2,), -1), torch.full((2,), 1)
    logits = torch.cat([torch.zeros(2, 1), -rows], 1).sort(1, descending=True).values.double()
    for goal, spread in ((everything, logits[:, 0] - logits[:, 2]), (second, logits[:, 0] - logits[:, 2:4].mean(1))):
        value = LOSSES["dlr"](rows, goal)
        row = rows.amin(1) if bool((goal < 0).all()) else rows[:, 1]
        torch.testing.assert_close(value, -row / spread)
        torch.testing.assert_close(LOSSES["dlr"](7 * rows, goal), value)
    with pytest.raises(InvalidInput, match="three classes"):
        LOSSES["dlr"](rows[:, :1], everything)


def test_checkpoints_are_those_of_the_paper() -> None:
    """p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06)."""
    p = [0.0, 0.22]
    while p[-1] + max(p[-1] - p[-2] - 0.03, 0.06) <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    assert [step for step, _ in _checkpoints(100)] == [round(100 * share) for share in p[1:]]


class _Masked(nn.Module):
    """An affine model behind an activation that is flat wherever floats look."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.act, self.last = nn.Linear(10, 30), nn.Sigmoid(), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(3000 * self.first(x)))


def test_replaced_slopes_break_what_hides_its_gradients() -> None:
    model = _Masked().eval()
    x = torch.rand(60, 10, generator=torch.Generator().manual_seed(0))
    spec = class_margins(model(x).argmax(1), 3)
    ball = LpBall(x, 0.1, clip=(0.0, 1.0))
    blind = PGD(random_start=False)(model, ball, spec).success.sum()
    seeing = {
        "secants": Adaptive(attack=PGD(random_start=False), stand_in=None, neighbours=0),
        "stand-in": Adaptive(attack=PGD(random_start=False), temperatures=(), neighbours=0),
    }
    for name, attack in seeing.items():
        assert attack(model, ball, spec).success.sum() >= 2 * blind > 0, name
    assert not model.act._forward_hooks


def test_replaced_slopes_change_no_value() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    x = torch.rand(9, 6)
    spec = class_margins(torch.zeros(9, dtype=torch.long), 3)
    result = Adaptive()(model, LpBall(x, 0.2), spec)
    torch.testing.assert_close(result.margin, spec.rows(model(result.witness)).detach(), rtol=0, atol=1e-6)


def test_an_ensemble_leaves_broken_samples_alone_and_is_at_least_as_strong_as_its_parts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.rand(50, 8)
    spec, ball = class_margins(model(x).argmax(1), 4), LpBall(x, 0.06)
    seeds = torch.arange(50)
    parts = (APGD(steps=10), APGDT(steps=10))
    first, second = (part(model, ball, spec, generator=seeds) for part in parts)
    both = Ensemble(attacks=parts)(model, ball, spec, generator=seeds)
    assert bool((both.success >= (first.success | second.success)).all())
    assert both.queries < first.queries + second.queries
    assert bool(both.success.any())
    assert not bool(both.success.all())


def test_a_samples_fate_does_not_depend_on_its_neighbours() -> None:
    """In float64, where batches of other sizes round alike but for the last bits."""
    model, x, _ = _affine()
    net = nn.Sequential(model, nn.Tanh(), nn.Linear(4, 4).double()).eval()
    claim = class_margins(net(x).argmax(1), 4, torch.float64)
    seeds, few = torch.arange(len(x)) + 5, torch.tensor([7, 3])
    for attack in (PGD(restarts=2), APGDT(steps=20), Square(queries=60), Adaptive(attack=PGD(steps=5))):
        whole = attack(net, LpBall(x, 0.1), claim, generator=seeds)
        part = attack(net, LpBall(x[few], 0.1), claim.take(few), generator=seeds[few])
        torch.testing.assert_close(part.margin, whole.margin[few], rtol=1e-7, atol=1e-9)


def test_what_another_network_falls_to_is_tried_on_this_one() -> None:
    model, x, spec = _affine()
    ball = LpBall(x, 0.3)
    own = PGD(early_stop=False)(model, ball, spec).success
    twin = Transfer(surrogate=model.train())(model, ball, spec)
    assert torch.equal(twin.success, own)
    assert model.training
    assert twin.queries < 4 * len(x)


def test_a_model_that_cannot_run_in_float64_is_refused_once_something_breaks() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ torch.eye(3)

    model = Stubborn().eval()
    x = torch.rand(6, 4)
    with pytest.raises(InvalidModel, match="float64"):
        PGD()(model, LpBall(x, 1.0), class_margins(model(x).argmin(1), 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: APGD(steps=0),
        lambda: APGD(loss="l2"),
        lambda: APGDT(targets=0),
        lambda: FMN(steps=0),
        lambda: DeepFool(overshoot=-1.0),
        lambda: CarliniWagner(rate=0.0),
        lambda: Square(queries=0),
        lambda: Square(area=2.0),
        lambda: Ensemble(attacks=()),
        lambda: Adaptive(temperatures=(0.0,)),
        lambda: PGD(momentum=2.0),
        lambda: PGD(loss="ce-l2"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(make) -> None:
    with pytest.raises(InvalidInput):
        make()
