"""Sweeps: every cell once, resumed, refused where the plan changed; means with honest intervals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from analysis import figures
from analysis.records import Rate
from analysis.summary import Mean, summarise
from analysis.sweep import SHIPPED, Judge, Result, Sweep, load_sweep, run
from certify.errors import InvalidFile, InvalidInput
from cli.sweeping import result_words
from models.checkpoint import load as load_checkpoint
from models.data import Dataset, load, subset

PLAN = """
title = "small"
data = "digits"
activations = ["relu", "kaf-elu"]
seeds = [0, 1]
[networks.mlp]
hidden = [8]
[networks.wide]
network = "mlp"
hidden = [12]
[recipes.standard]
[recipes.fast]
recipe = { name = "fast", radius = "1/20" }
[train]
epochs = 2
[judge]
radii = ["1/50", "0.1"]
steps = 3
restarts = 1
samples = 20
methods = ["ibp"]
"""


@pytest.fixture(scope="module")
def digits() -> Dataset:
    whole = load("digits")
    x, y, _ = subset(whole.train_x, whole.train_y, 200, 0)
    return replace(whole, train_x=x, train_y=y)


@pytest.fixture
def plan(tmp_path: Path) -> Sweep:
    (tmp_path / "plan.toml").write_text(PLAN)
    return load_sweep(tmp_path / "plan.toml")


def test_every_cell_gives_a_result_once(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    results = list(run(plan, digits, tmp_path / "out"))
    assert [result.cell for result in results] == plan.cells
    assert len({result.cell.name for result in results}) == 16
    for result in results:
        assert result.clean is not None
        assert result.clean.total == 20
        for attacked, certified in zip(result.attacked, result.certified, strict=True):
            assert certified.count <= attacked.count <= result.clean.count
        assert load_checkpoint(tmp_path / "out" / result.cell.name).meta["seed"] == result.cell.seed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert list(run(plan, digits, tmp_path / "out")) == results
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_an_interrupted_sweep_goes_on_where_it_stood(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    def stop(record: object) -> None:
        raise KeyboardInterrupt

    whole = next(run(plan, digits, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        next(run(plan, digits, tmp_path / "parts", stop))
    assert not (tmp_path / "parts" / whole.cell.name / "result.json").exists()
    again = next(run(plan, digits, tmp_path / "parts"))
    assert replace(again, seconds=0.0) == replace(whole, seconds=0.0)


def test_results_of_other_images_are_refused(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    next(run(plan, digits, tmp_path / "out"))
    with pytest.raises(InvalidFile, match="another sweep"):
        next(run(plan, replace(digits, test_x=1 - digits.test_x), tmp_path / "out"))


def test_results_of_another_plan_are_refused(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    next(run(plan, digits, tmp_path / "out"))
    for other in (replace(plan, train={"epochs": 3}), replace(plan, judge=replace(plan.judge, steps=4))):
        with pytest.raises(InvalidFile, match="another sweep"):
            next(run(other, digits, tmp_path / "out"))


def test_a_training_that_fails_is_a_result(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    train = {"epochs": 2, "batch": 10, "optimizer": {"name": "sgd", "lr": 1e30}}
    wild = replace(plan, activations=("relu",), train=train, recipes={"standard": {}})
    results = list(run(wild, digits, tmp_path / "out"))
    assert [result.status[:7] for result in results] == ["failed:"] * len(results)
    assert all(result.clean is None for result in results)
    rows = summarise(results)
    assert all(row.clean is None and row.failed == row.seeds == 2 for row in rows)
    figures.accuracy_scatter(rows, "1/50")


def test_the_interval_is_that_of_the_images_and_of_student_over_seeds_together() -> None:
    rates = [Rate(80, 100), Rate(84, 100), Rate(88, 100)]
    alone = Mean.of(rates[:1])
    assert (alone.value, alone.low, alone.high) == (0.8, rates[0].low, rates[0].high)
    mean = Mean.of(rates)
    half = 4.302652729911275 * 0.04 / math.sqrt(3)  # Student's 97.5 % quantile for 2 degrees of freedom
    assert mean.value == pytest.approx(0.84)
    images = Rate(84, 100)
    low, high = math.hypot(0.84 - images.low, half), math.hypot(images.high - 0.84, half)
    assert (mean.low, mean.high) == (pytest.approx(0.84 - low), pytest.approx(0.84 + high))


def test_intervals_over_seeds_cover_the_truth() -> None:
    """20 networks whose true accuracies scatter around .8: at least 94 of 100 intervals of 5 hold the mean."""
    draw, held = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        truths = 0.8 + 0.02 * torch.randn(5, generator=draw)
        counts = torch.binomial(torch.full((5,), 1000.0), truths, generator=draw)
        mean = Mean.of([Rate(int(count), 1000) for count in counts])
        held += mean.low <= 0.8 <= mean.high
    assert held >= 0.93 * 400


def test_results_survive_json(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    result = next(run(plan, digits, tmp_path / "out"))
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_sweeps_are_the_thesis_tables(path: Path, digits: Dataset) -> None:
    plan = load_sweep(path.stem)
    assert {"relu", "elu", "swish", "kaf", "kaf-elu", "kaf-swish", "kaf-free"} <= set(plan.activations)
    config = plan.config("fast", 0)
    assert config.recipe.threat.radius == 8 / 255
    assert plan.judge.protocol().attack.steps == 50
    smaller = load_sweep(path.stem, {"train": {"batch": 32}, "recipes": {"fast": {"epochs": 1}}, "seeds": [3]})
    assert (smaller.config("fast", 3).epochs, smaller.config("fast", 3).batch) == (1, 32)
    assert len(smaller.cells) == len(plan.activations)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('radii = ["1/50", "0.1"]', 'radii = ["wide"]'),
        ('radii = ["1/50", "0.1"]', 'radii = "0.1"'),
        ('radii = ["1/50", "0.1"]', 'radii = ["1e9999999"]'),
        ('radii = ["1/50", "0.1"]', 'radii = ["1e999"]'),
        ("samples = 20", "samples = 0"),
        ('methods = ["ibp"]', 'methods = ["hope"]'),
        ("epochs = 2", "epoch = 2"),
        ("seeds = [0, 1]", "seeds = []"),
        ("seeds = [0, 1]", 'seeds = ["one"]'),
        ('title = "small"', ""),
        ("[judge]", "[jury]"),
        ("hidden = [8]", 'hidden = [8]\nshape = "round"'),
        ("hidden = [8]", "hidden = 32"),
        ("hidden = [8]", "classes = 12"),
        ("hidden = [8]", 'activation = "relu"'),
        ('activations = ["relu", "kaf-elu"]', 'activations = ["relu", "relu"]'),
        ("seeds = [0, 1]", "seeds = [0, 1, 0]"),
        ("seeds = [0, 1]", "seeds = [9223372036854775808]"),
        ("samples = 20", "seed = 9223372036854775808"),
        ('radii = ["1/50", "0.1"]', 'radii = ["1/10", "0.1"]'),
    ],
)
def test_refuses_plans_that_cannot_be_meant(old: str, new: str, digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.replace(old, new))
    with pytest.raises(InvalidInput) as error:
        next(run(load_sweep(tmp_path / "plan.toml"), digits, tmp_path / "out"))
    assert len(str(error.value).splitlines()) <= 3


def test_nothing_is_trained_where_a_network_cannot_be_built(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    wrong = replace(plan, activations=("relu", "kfa"))
    with pytest.raises(InvalidInput, match="unknown activation 'kfa'"):
        next(run(wrong, digits, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_network_that_is_not_certified_is_attacked_all_the_same(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    networks, train = {"mlp": {"hidden": [8]}}, {"epochs": 1}
    mixed = replace(plan, activations=("kwta", "relu"), networks=networks, recipes={"standard": {}}, train=train)
    results = list(run(mixed, digits, tmp_path / "out"))
    assert [result.cell for result in results] == mixed.cells
    for result in results[:2]:
        assert result.status.startswith("finished, not certified: k-winners-take-all at 'act1'")
        assert result.clean is not None
        assert [rate.total for rate in result.attacked] == [20, 20]
        assert [rate.count for rate in result.certified] == [0, 0]
        assert "not certified: k-winners" in result_words(result)
    assert [result.status for result in results[2:]] == ["finished"] * 2
    assert [row.failed for row in summarise(results)] == [0, 0]


def test_training_on_bounds_that_there_are_not_is_a_result(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    recipes = {"ibp": {"recipe": {"name": "ibp", "radius": 0.05}}}
    refused = replace(plan, activations=("kwta",), seeds=(0,), recipes=recipes)
    for result in run(refused, digits, tmp_path / "out"):
        assert result.status.startswith("failed: k-winners-take-all")
        assert result.clean is None


def test_rates_are_in_the_order_of_the_judges_radii(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    small = replace(plan, networks={"mlp": {"hidden": [8]}}, seeds=(0,))
    turned = replace(small, judge=replace(plan.judge, radii=("0.1", "1/50")))
    first, second = (next(run(sweep, digits, tmp_path / sweep.judge.radii[0])) for sweep in (small, turned))
    assert first.attacked[0] != first.attacked[1]
    assert (second.attacked, second.certified) == (first.attacked[::-1], first.certified[::-1])


def test_pictures_are_the_same_bytes_every_time(plan: Sweep, digits: Dataset, tmp_path: Path) -> None:
    rows = summarise([next(run(plan, digits, tmp_path / "out"))])
    pictures = [figures.save(figures.accuracy_scatter(rows, "1/50"), tmp_path / name) for name in ("a.svg", "b.svg")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    with pytest.raises(InvalidInput, match="ending"):
        figures.save(figures.accuracy_scatter(rows, "1/50"), tmp_path / "a.bmp")


def test_a_judge_is_a_protocol() -> None:
    protocol = Judge(radii=("8/255",), norm="l2", step=0.1, methods=("crown",)).protocol()
    assert (protocol.norm, protocol.attack.step, protocol.methods) == ("l2", 0.1, ("crown",))
