"""Configs: to plain data and back, TOML, and refusals in three lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from certify.errors import InvalidFile, InvalidInput
from models.training import RECIPES, Augment, Fast, Optimizer, Penalties, Schedule, TrainConfig, Watch, load_config
from models.training.augment import augmented
from models.training.average import Average
from models.training.schedule import share


@pytest.mark.parametrize("name", RECIPES)
def test_configs_survive_plain_data(name: str) -> None:
    options = {"standard": {}, "noise": {"sigma": "1/4"}}.get(name, {"radius": "8/255"})
    given = {"recipe": {"name": name} | options, "batch": 64}
    config = TrainConfig.from_dict(given | {"optimizer": {"clip": 1, "name": "sgd"}, "augment": {"flip": True}})
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert config.optimizer.clip == 1.0
    assert config.recipe.name == name
    if "radius" in options:
        assert config.recipe.threat.radius == 8 / 255


def test_a_file_says_it_all(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'epochs = 3\nsmoothing = 0.1\n[recipe]\nname = "fast"\nradius = "1/10"\n[schedule]\nname = "cosine"\n'
    )
    expected = TrainConfig(epochs=3, smoothing=0.1, recipe=Fast(radius=0.1), schedule=Schedule(name="cosine"))
    assert load_config(tmp_path / "run.toml") == expected


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 0},
        {"epochs": 2.5},
        {"epochs": True},
        {"batch": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 10**400},
        {"smoothing": 1.5},
        {"epoch": 3},
        {"optimizer": {"lr": math.nan}},
        {"optimizer": {"lr": -1.0}},
        {"optimizer": {"name": "lbfgs"}},
        {"optimizer": {"rate": 0.1}},
        {"optimizer": 3},
        {"optimizer": {"average": 1.0}},
        {"schedule": {"name": "stairs"}},
        {"watch": {"patience": 0}},
        {"watch": {"overfitting": "pray"}},
        {"engine": {"device": "tpu"}},
        {"augment": {"crop": -1}},
        {"penalties": {"gradalign": 0.1}},
        {"recipe": "fast"},
        {"recipe": {"name": "slow"}},
        {"recipe": {"name": ["fast"]}},
        {"recipe": {"radius": 0.1}},
        {"recipe": {"name": "fast"}},
        {"recipe": {"name": "fast", "radius": 0}},
        {"recipe": {"name": "fast", "radius": "8/0"}},
        {"recipe": {"name": "fast", "radius": "1e999999999"}},
        {"recipe": {"name": "fast", "radius": "1e999"}},
        {"optimizer": {"weight_decay": 10**400}},
        {"recipe": {"name": "fast", "radius": 0.1, "norm": "l3"}},
        {"recipe": {"name": "fast", "radius": 0.1, "beta": 3}},
        {"recipe": {"name": "pgd", "radius": 0.1, "steps": 0}},
        {"recipe": {"name": "ibp", "radius": 0.1, "ramp": 2}},
    ],
    ids=str,
)
def test_refuses_what_cannot_be_meant(given: dict) -> None:
    with pytest.raises(InvalidInput) as error:
        TrainConfig.from_dict(given)
    assert len(str(error.value).splitlines()) <= 3


def test_refusals_name_options_that_exist() -> None:
    with pytest.raises(InvalidInput, match=r"--set recipe\.sigma=") as error:
        TrainConfig.from_dict({"recipe": {"name": "noise"}})
    assert "--sigma" not in str(error.value)
    with pytest.raises(InvalidInput, match="'standard', which takes no options") as error:
        TrainConfig.from_dict({"recipe": {"radius": 0.1}})
    assert "--method fast" in error.value.remedy


def test_every_seed_that_is_taken_can_be_used() -> None:
    seed = TrainConfig(seed=2**63 - 1).seed
    assert torch.Generator().manual_seed(seed).initial_seed() == seed


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    for name in ("bad.toml", "absent.toml"):
        with pytest.raises(InvalidFile) as error:
            load_config(tmp_path / name)
        assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("name", ["one-cycle", "cosine", "constant"])
def test_schedules_rise_to_their_peak_and_stay_in_range(name: str) -> None:
    shares = [share(Schedule(name=name), step, 100) for step in range(100)]
    peak = shares.index(1.0)
    assert 28 <= peak <= 31
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert all(0 <= value <= 1 for value in shares)
    assert shares[-1] == 1.0 if name == "constant" else 0 < shares[-1] < 0.02
    assert [share(Schedule(name=name), 0, 1)] == [1.0]


def images(n: int = 200) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(n, 2, 6, 5) + 0.1


def test_crops_are_windows_of_the_padded_image_and_all_occur() -> None:
    x = images()
    draws = torch.rand(len(x), 5)
    found = augmented(x, Augment(crop=1), draws)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    seen = set()
    for image, whole in zip(found, padded, strict=True):
        places = [(a, b) for a in range(3) for b in range(3) if torch.equal(image, whole[:, a : a + 6, b : b + 5])]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9


def test_flips_are_mirror_images_of_about_half() -> None:
    x = images(400)
    found = augmented(x, Augment(flip=True), torch.rand(len(x), 5))
    mirrored = [bool(torch.equal(a, b.flip(2))) for a, b in zip(found, x, strict=True)]
    kept = [bool(torch.equal(a, b)) for a, b in zip(found, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 150 < sum(mirrored) < 250


def test_cutouts_are_squares_of_zeros() -> None:
    x = images()
    found = augmented(x, Augment(cutout=3), torch.rand(len(x), 5))
    gone = (found == 0).all(1)
    assert torch.equal(found[~gone[:, None].expand_as(x)], x[~gone[:, None].expand_as(x)])
    rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
    assert bool((gone.sum((1, 2)) == rows * columns).all())
    assert (int(rows.max()), int(columns.max())) == (3, 3)
    assert int(rows.min()) >= 2


def test_without_options_nothing_happens_and_vectors_are_refused() -> None:
    x = torch.rand(3, 8)
    assert augmented(x, Augment(), torch.rand(3, 5)) is x
    with pytest.raises(InvalidInput, match="images"):
        augmented(x, Augment(flip=True), torch.rand(3, 5))


def test_an_average_is_its_recursion() -> None:
    torch.manual_seed(0)
    model = torch.nn.BatchNorm1d(3)
    average = Average(model, 0.9)
    expected = model.weight.detach().clone()
    for step in range(1, 40):
        with torch.no_grad():
            model.weight.copy_(torch.randn(3))
            model.num_batches_tracked.add_(1)
        average.update(model)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.state["weight"], expected)
    assert int(average.state["num_batches_tracked"]) == 39
    own = model.weight.detach().clone()
    with average.worn(model):
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, own)


def test_options_in_python_are_checked_too() -> None:
    for make in (lambda: Optimizer(momentum=2.0), lambda: Watch(images=0), lambda: Penalties(slope=-1.0)):
        with pytest.raises(InvalidInput):
            make()
