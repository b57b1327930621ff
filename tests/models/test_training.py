"""Training: it learns, resumes exactly, keeps its best weights, and watches what it should."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import certify
from certify.errors import InvalidFile, InvalidInput, InvalidModel
from models import KAF, mlp
from models.checkpoint import load
from models.data import Dataset, subset
from models.data import load as load_data
from models.networks import Network, architecture, build
from models.training import (
    RECIPES,
    Augment,
    EpochRecord,
    Fast,
    Free,
    NoiseTraining,
    Optimizer,
    Penalties,
    PGDTraining,
    Schedule,
    Standard,
    TrainConfig,
    Watch,
    find_rate,
    train,
)
from models.training.loop import require_trainable
from models.training.records import overfits
from models.training.run import batches
from models.training.validation import PROBE, accuracy, certified_accuracy, robust_accuracy


@pytest.fixture(scope="module")
def whole() -> Dataset:
    return load_data("digits")


@pytest.fixture(scope="module")
def digits(whole: Dataset) -> Dataset:
    """A small part, for tests that need no accuracy."""
    x, y, _ = subset(whole.train_x, whole.train_y, 300, 0)
    return replace(whole, train_x=x, train_y=y, val_x=whole.val_x[:60], val_y=whole.val_y[:60])


def network(activation: str = "kaf-elu", hidden: int = 16) -> Network:
    torch.manual_seed(0)
    return mlp([64, hidden, 10], activation, mean=[0.3], std=[0.4])


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def interrupt_after(epoch: int):
    def stop(record: EpochRecord) -> None:
        if record.epoch == epoch:
            raise KeyboardInterrupt

    return stop


CONFIGS = {
    "standard adam": TrainConfig(epochs=4, batch=50),
    "standard sgd": TrainConfig(
        epochs=4, batch=64, optimizer=Optimizer(name="sgd", lr=0.05, weight_decay=1e-4, clip=1.0)
    ),
    "averaged": TrainConfig(
        epochs=4, batch=64, optimizer=Optimizer(name="adamw", average=0.9), schedule=Schedule(name="cosine")
    ),
    "augmented": TrainConfig(epochs=4, batch=64, augment=Augment(crop=1, flip=True, cutout=2), smoothing=0.1),
    "penalised": TrainConfig(
        epochs=2,
        batch=150,
        recipe=Fast(radius=0.05),
        penalties=Penalties(lipschitz=1e-3, slope=1e-2, curvature=1e-3, gradalign=0.1),
    ),
    **{
        name: TrainConfig(epochs=4, batch=100, recipe=kind(**{"sigma" if name == "noise" else "radius": 0.05}))
        for name, kind in RECIPES.items()
        if kind not in (Standard, NoiseTraining) and name != "crown-ibp"
    },
    "noise": TrainConfig(epochs=4, batch=100, recipe=NoiseTraining(sigma=0.25)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_two_parts_are_one_whole(name: str, digits: Dataset, tmp_path: Path) -> None:
    config = CONFIGS[name]
    half = config.epochs // 2
    whole = train(network(), digits, config, directory=tmp_path / "whole")
    first = train(network(), digits, config, directory=tmp_path / "parts", on_epoch=interrupt_after(half))
    assert (first.status, len(first.records)) == ("interrupted", half)
    torch.manual_seed(99)  # a new process starts from elsewhere
    second = train(network("kaf-elu"), digits, config, directory=tmp_path / "parts", resume=True)
    assert (second.status, len(second.records)) == ("finished", config.epochs)
    assert equal(whole.model, second.model)
    assert [r.loss for r in whole.records] == [r.loss for r in second.records]
    assert equal(load(tmp_path / "whole").model, load(tmp_path / "parts").model)
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, config.epochs + 1))


def test_it_learns_and_keeps_the_best_weights(whole: Dataset, tmp_path: Path) -> None:
    seen: list[EpochRecord] = []
    result = train(network(hidden=32), whole, TrainConfig(epochs=15), directory=tmp_path, on_epoch=seen.append)
    assert tuple(seen) == result.records
    assert accuracy(result.model, whole.test_x, whole.test_y) > 0.9
    best = max(record.score for record in seen)
    assert result.records[result.best_epoch - 1].score == best
    assert accuracy(result.model, whole.val_x, whole.val_y) == best
    assert not result.model.training
    saved = load(tmp_path)
    assert equal(saved.model, result.model)
    assert saved.meta["metrics"]["val_accuracy"] == best
    assert TrainConfig.from_dict(saved.meta["config"]) == TrainConfig(epochs=15)


def test_an_average_is_what_is_validated_and_kept(digits: Dataset, tmp_path: Path) -> None:
    config = TrainConfig(epochs=3, batch=50, optimizer=Optimizer(average=0.99))
    averaged = train(network(), digits, config, directory=tmp_path)
    plain = train(network(), digits, replace(config, optimizer=Optimizer()))
    assert [r.loss for r in averaged.records] == [r.loss for r in plain.records]  # it takes no part in the descent
    assert not equal(averaged.model, plain.model)
    best = averaged.records[averaged.best_epoch - 1]
    assert accuracy(load(tmp_path).model, digits.val_x, digits.val_y) == best.val_accuracy


def test_adversarial_training_gains_robustness(whole: Dataset) -> None:
    threat = Fast(radius=0.1).threat
    plain, fast = (
        train(network("relu", hidden=64), whole, TrainConfig(epochs=20, recipe=recipe)).model
        for recipe in (Standard(), Fast(radius=0.1))
    )
    x, y = whole.test_x, whole.test_y
    before, after = (robust_accuracy(model, x, y, threat, PROBE, classes=10) for model in (plain, fast))
    assert after > before + 0.1
    assert after <= accuracy(fast, x, y)


@pytest.mark.parametrize("name", ["ibp", "sabr", "mtl-ibp"])
def test_certified_training_gains_certificates(name: str, whole: Dataset) -> None:
    recipe = RECIPES[name](radius=0.05, **({"alpha": 0.5} if name == "mtl-ibp" else {}))
    result = train(network("relu", hidden=64), whole, TrainConfig(epochs=20, recipe=recipe))
    plain = train(network("relu", hidden=64), whole, TrainConfig(epochs=20)).model
    held = [certified_accuracy(m, whole.test_x, whole.test_y, recipe.threat, classes=10) for m in (plain, result.model)]
    assert held[1] > held[0] + 0.4
    last = result.records[-1]
    assert last.val_certified is not None
    assert last.val_certified <= last.val_robust <= last.val_accuracy


def test_training_leaves_the_global_generator_alone(digits: Dataset) -> None:
    model = network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, digits, TrainConfig(epochs=1, recipe=Fast(radius=0.1)))
    assert torch.equal(torch.rand(3), expected)


def with_dropout() -> Network:
    model = network("relu")
    model.append(nn.Dropout(0.2))
    return model


def test_the_seed_decides_dropout_too(digits: Dataset, tmp_path: Path) -> None:
    config = TrainConfig(epochs=4, batch=100)
    whole = train(with_dropout(), digits, config)
    torch.rand(7)  # the global generator stands elsewhere
    assert equal(train(with_dropout(), digits, config).model, whole.model)
    assert not equal(train(with_dropout(), digits, replace(config, seed=1)).model, whole.model)
    train(with_dropout(), digits, config, directory=tmp_path, on_epoch=interrupt_after(2))
    assert equal(train(with_dropout(), digits, config, directory=tmp_path, resume=True).model, whole.model)


def test_looking_at_a_network_changes_nothing_of_it(digits: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout(0.5))
    before, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    require_trainable(model, digits)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_patience_stops_early(digits: Dataset) -> None:
    still = TrainConfig(epochs=50, batch=300, optimizer=Optimizer(lr=0.0), watch=Watch(patience=2))
    # Without learning every score ties, ties prefer the later epoch, and patience never runs out.
    assert train(network(), digits, still).status == "finished"
    worse = TrainConfig(epochs=50, optimizer=Optimizer(name="sgd", lr=0.5), watch=Watch(patience=2))
    result = train(network("relu"), digits, worse)
    assert result.status == "stopped early"
    assert len(result.records) == result.best_epoch + 2


def record(step: float | None, robust: float | None) -> EpochRecord:
    return EpochRecord(
        epoch=1,
        recipe="fast",
        loss=1.0,
        train_accuracy=0.8,
        val_accuracy=0.9,
        val_robust=robust,
        val_step=step,
        lr=0.1,
        seconds=1.0,
        images_per_second=1.0,
    )


@pytest.mark.parametrize(
    ("step", "robust", "expected"),
    [
        (0.7, 0.1, True),
        (0.9, 0.0, True),
        (0.7, 0.4, False),  # PGD is the stronger attack on an honest network too
        (0.1, 0.0, False),  # nothing learned yet
        (None, 0.1, False),
        (None, None, False),
    ],
)
def test_catastrophic_overfitting_is_told_from_an_honest_gap(
    step: float | None, robust: float | None, expected: bool
) -> None:
    assert overfits(record(step, robust)) is expected


@pytest.mark.parametrize("answer", ["switch", "stop", "report"])
def test_the_watch_answers_overfitting(
    answer: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.training.run.overfits", lambda record: record.epoch == 2)
    config = TrainConfig(epochs=4, batch=100, recipe=Fast(radius=0.05), watch=Watch(overfitting=answer))
    result = train(network(), digits, config, directory=tmp_path / "one")
    assert result.overfitted == (2,)
    names = [r.recipe for r in result.records]
    expected = {"switch": ["fast", "fast", "pgd", "pgd"], "stop": ["fast", "fast"], "report": ["fast"] * 4}
    assert names == expected[answer]
    assert result.status == ("overfitted" if answer == "stop" else "finished")
    assert train(network(), digits, replace(config, epochs=2)).status == result.status  # in the last epoch, too
    train(network(), digits, config, directory=tmp_path / "two", on_epoch=interrupt_after(2))
    again = train(network(), digits, config, directory=tmp_path / "two", resume=True)
    assert equal(result.model, again.model)
    assert [r.recipe for r in again.records] == names


@pytest.mark.parametrize("name", ["pgd", "ibp", "standard"])
def test_only_single_steps_are_watched(name: str, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the radius of a certified recipe grows, its accuracy under attack may fall: no overfitting."""
    monkeypatch.setattr("models.training.run.overfits", lambda record: record.val_step is not None)
    recipe = Standard() if name == "standard" else RECIPES[name](radius=0.05)
    assert train(network(), digits, TrainConfig(epochs=2, batch=150, recipe=recipe)).overfitted == ()


def test_interrupted_before_the_first_epoch(digits: Dataset, tmp_path: Path) -> None:
    class Stop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and x.requires_grad:
                raise KeyboardInterrupt
            return x

    model = mlp([64, 16, 10], "relu")
    model.append(Stop())
    result = train(model, digits, TrainConfig(epochs=2), directory=tmp_path)
    assert (result.status, result.best_epoch, result.records) == ("interrupted", 0, ())
    assert not list(tmp_path.iterdir())


def test_resume_refuses_another_run(digits: Dataset, tmp_path: Path) -> None:
    config = TrainConfig(epochs=2)
    with pytest.raises(InvalidFile):
        train(network(), digits, config, directory=tmp_path, resume=True)
    train(network(), digits, config, directory=tmp_path)
    other = replace(digits, train_y=digits.train_y.roll(1))
    for model, data, changed, word in (
        (network(), digits, replace(config, optimizer=Optimizer(lr=0.1)), "optimizer.lr changed"),
        (network(), digits, replace(config, recipe=Fast(radius=0.1)), "recipe.name"),
        (network(), other, config, "images changed"),
        (network(), replace(digits, train_x=1 - digits.train_x), config, "images changed"),
        (network(), replace(digits, val_x=1 - digits.val_x), config, "images changed"),
        (network(hidden=17), digits, config, "network.sizes changed"),
        (network("kaf-relu"), digits, config, "network.activation changed"),
    ):
        with pytest.raises(InvalidFile, match=word):
            train(model, data, changed, directory=tmp_path, resume=True)
    state = tmp_path / "resume.safetensors"
    whole = state.read_bytes()
    for damaged in (whole[:-10], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        state.write_bytes(damaged)
        with pytest.raises(InvalidFile, match="damaged"):
            train(network(), digits, config, directory=tmp_path, resume=True)


def test_a_full_disk_is_told_in_three_lines_and_the_last_checkpoint_stays(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(epochs=3)
    train(network(), digits, config, directory=tmp_path, on_epoch=interrupt_after(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidFile, match="no space left") as error:
        train(network(), digits, config, directory=tmp_path, resume=True)
    assert len(str(error.value).splitlines()) == 3
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    resumed = train(network(), digits, config, directory=tmp_path, resume=True)
    assert equal(resumed.model, train(network(), digits, config).model)


def test_a_folder_that_cannot_be_written_is_told_in_three_lines(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before the first epoch, not after it."""
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("models.training.run.Run.epoch", lambda _: pytest.fail("trained"))
    with pytest.raises(InvalidFile, match="cannot write") as error:
        train(network(), digits, TrainConfig(epochs=1), directory=tmp_path / "file")
    assert len(str(error.value).splitlines()) == 3
    assert (tmp_path / "file").read_text() == "mine"

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(InvalidFile, match="permission denied"):
        train(network(), digits, TrainConfig(epochs=1), directory=tmp_path / "sealed")


def test_kaf_parameters_see_no_weight_decay(digits: Dataset) -> None:
    """With a zero gradient only weight decay moves a parameter: it must not touch alpha."""
    model = network()
    with torch.no_grad():
        model.linear2.weight.zero_()
        model.linear2.bias.zero_()
    model.linear2.requires_grad_(False)
    alpha, weight = model.act1.alpha.detach().clone(), model.linear1.weight.detach().clone()
    train(model, digits, TrainConfig(epochs=1, optimizer=Optimizer(name="sgd", weight_decay=0.1, lr=0.1)))
    assert torch.equal(model.act1.alpha, alpha)
    assert not torch.equal(model.linear1.weight, weight)
    assert isinstance(model.act1, KAF)


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(300, 128, [128, 128, 44]), (257, 128, [128, 129]), (1, 8, [1]), (8, 8, [8]), (9, 8, [9]), (10, 8, [8, 2])],
)
def test_small_rests_join_the_batch_before(count: int, size: int, expected: list[int]) -> None:
    parts = batches(torch.arange(count), size)
    assert [len(part) for part in parts] == expected
    assert torch.equal(torch.cat(parts), torch.arange(count))


def test_a_single_image_left_over_does_not_stop_batch_normalisation(digits: Dataset) -> None:
    data = replace(digits, train_x=digits.train_x[:65], train_y=digits.train_y[:65])
    torch.manual_seed(0)
    model = build(architecture("cnn7", data.input_shape, 10, "relu", width=2), seed=0)
    assert len(train(model, data, TrainConfig(epochs=1, batch=64)).records) == 1


def test_a_diverging_run_says_so(digits: Dataset) -> None:
    with pytest.raises(InvalidModel, match="loss became"):
        train(network("relu"), digits, TrainConfig(epochs=3, optimizer=Optimizer(name="sgd", lr=1e30)))
    once = TrainConfig(epochs=1, batch=300, optimizer=Optimizer(lr=1e30), schedule=Schedule(name="constant"))
    with pytest.raises(InvalidModel, match="gradients became"):  # the loss was that before the only step
        train(network("relu"), digits, once)


def test_low_precision_trains_about_as_well(whole: Dataset) -> None:
    low = TrainConfig.from_dict({"epochs": 5, "engine": {"precision": "bfloat16"}})
    models = [train(network(hidden=32), whole, config).model for config in (low, TrainConfig(epochs=5))]
    scores = [accuracy(model, whole.test_x, whole.test_y) for model in models]
    assert abs(scores[0] - scores[1]) < 0.05
    assert all(p.dtype == torch.float32 for p in models[0].parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own; without one, ours
@pytest.mark.parametrize("mode", ["kaf", "model"])
def test_compiled_training_follows_the_same_curve(mode: str, digits: Dataset) -> None:
    config = TrainConfig.from_dict({"epochs": 2, "batch": 100, "recipe": {"name": "fast", "radius": 0.05}})
    compiled = TrainConfig.from_dict(config.to_dict() | {"engine": {"compile": mode}})
    runs = [train(network(), digits, each) for each in (config, compiled)]
    losses = [[record.loss for record in run.records] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    domain = Fast(radius=0.05).threat.ball(digits.test_x[:5])
    assert len(certify.prove(runs[1].model, domain, certify.class_margins(digits.test_y[:5], 10)).verdicts) == 5


def test_free_training_replays_every_batch(digits: Dataset) -> None:
    config = TrainConfig(epochs=2, batch=100, recipe=Free(radius=0.05, replays=3))
    result = train(network(), digits, config)
    assert len(result.records) == 2
    assert result.records[-1].loss < result.records[0].loss


def test_the_range_finder_leaves_the_model_alone_and_stops_where_the_loss_explodes(whole: Dataset) -> None:
    model = network("relu", hidden=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = TrainConfig(optimizer=Optimizer(name="sgd"))
    curve = find_rate(model, whole, config, low=1e-4, high=1e4, steps=80)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert curve.rates[-1] < 1e4
    assert curve.rates[0] < curve.suggestion < curve.limit <= curve.rates[-1]
    assert min(curve.losses) < curve.losses[0]
    again = find_rate(model, whole, config, low=1e-4, high=1e4, steps=80)
    assert again == curve
    with pytest.raises(InvalidInput):
        find_rate(model, whole, config, low=1.0, high=0.1)
    with pytest.raises(InvalidInput, match=r"optimizer\.lr = 0"):
        find_rate(model, whole, TrainConfig(optimizer=Optimizer(lr=0.0)))
    with pytest.raises(InvalidInput, match="no training images"):
        find_rate(model, replace(whole, train_x=whole.train_x[:0]), config)


@pytest.mark.parametrize(
    "changed",
    [{"smoothing": 0.9}, {"augment": {"crop": 2}}, {"recipe": {"name": "free", "radius": 0.3}}],
    ids=["smoothing", "augment", "free"],
)
def test_the_range_finder_trains_as_configured(changed: dict[str, object], digits: Dataset) -> None:
    curves = [find_rate(network(), digits, TrainConfig.from_dict(given), steps=20) for given in ({}, changed)]
    assert curves[0].losses[5] != curves[1].losses[5]


def test_the_range_finder_gives_batch_normalisation_no_single_image(digits: Dataset) -> None:
    model = build(architecture("vgg", (1, 8, 8), 10, "relu", width=4), seed=0)
    few = replace(digits, train_x=digits.train_x[:65], train_y=digits.train_y[:65])
    assert len(find_rate(model, few, TrainConfig(batch=64), low=1e-6, high=1e-3, steps=10).rates) == 10


def test_refuses_networks_and_data_that_do_not_fit(digits: Dataset, tmp_path: Path) -> None:
    empty = replace(digits, train_x=digits.train_x[:0], train_y=digits.train_y[:0])
    with pytest.raises(InvalidInput, match="no training images"):
        train(network(), empty, TrainConfig())
    with pytest.raises(InvalidInput, match="classes"):
        train(mlp([64, 9]), digits, TrainConfig())
    with pytest.raises(InvalidInput, match="architecture"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, TrainConfig(), directory=tmp_path)
    with pytest.raises(InvalidInput, match="directory"):
        train(network(), digits, TrainConfig(), resume=True)


def test_a_switched_run_trains_on_pgd() -> None:
    assert PGDTraining(radius=0.1).threat == Fast(radius=0.1).threat
