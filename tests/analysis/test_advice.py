"""Sentences about layers: derived from the numbers, in the order of the gains, with options that can be typed."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

import pytest

from analysis.advice import Findings, sentences
from analysis.layer_records import LayerRow, Shape
from cli.learning import RunOptions, config_of
from models.data import load

ROW = LayerRow(
    name="act1",
    kind="ReLU",
    shape=(20,),
    parameters=0,
    lipschitz_upper=1.0,
    lipschitz_lower=1.0,
    width_ibp=2.0,
    width_crown=1.0,
    growth=0.5,
    unstable=0.3,
    gap=None,
    share=0.5,
    gain=1.0,
    distance_mean=1.0,
    distance_p95=1.0,
    gradient=1.0,
)
KAF = replace(ROW, kind="KAF", unstable=None, gap=0.1)
LINEAR = replace(ROW, name="linear1", kind="Linear", share=0.0, gain=0.0, unstable=None, growth=4.0)


def said(*rows: LayerRow, shape: Shape | None = None) -> list[str]:
    return sentences(Findings(rows, {} if shape is None else {"act1": shape}, Fraction(8, 255), "linf"))


def test_the_first_three_layers_by_gain_have_a_sentence_each_and_a_remedy_is_said_once() -> None:
    rows = [replace(ROW, name=f"act{i}", gain=float(i)) for i in range(1, 6)]
    found = said(*rows)
    assert [line.split()[0] for line in found] == ["act5", "act4", "act3"]
    assert "30 % of its 20 neurons are unstable" in found[0]
    assert [("the same helps" in line) for line in found] == [False, True, True]


def test_a_steep_kaf_is_told_from_a_bent_one() -> None:
    steep = Shape("act1", (0.0,), ((0.0,),), (-4.0, 1.0), (-2.0, 2.0))
    assert "penalties.slope" in said(KAF, shape=steep)[0]
    assert "certified slopes reach 4, and samples met 1" in said(KAF, shape=steep)[0]
    assert "penalties.curvature" in said(KAF, shape=replace(steep, slope=(0.0, 1.5)))[0]


@pytest.mark.parametrize("row", [ROW, KAF, LINEAR, replace(ROW, kind="MaxPool2d")])
def test_numbers_that_are_missing_are_left_out(row: LayerRow) -> None:
    shape = Shape("act1", (0.0,), ((0.0,),), (-4.0, 1.0), None)
    bare = replace(row, lipschitz_lower=None, lipschitz_upper=None)
    assert "None" not in " ".join(said(bare, replace(bare, growth=None), shape=shape))


def test_pooling_is_no_kink() -> None:
    (text, *_) = said(replace(ROW, kind="MaxPool2d"))
    assert "windows" in text
    assert "unstable" not in text


def test_growth_is_explained_by_slack_in_the_norm_or_by_the_first_layer() -> None:
    assert "first layer" in said(LINEAR, ROW)[-1]
    assert "norm penalty" in said(replace(LINEAR, lipschitz_upper=5.0), ROW)[-1]
    assert "first layer" not in said(replace(LINEAR, growth=1.5), replace(LINEAR, name="linear2"), ROW)[-1]


@pytest.mark.parametrize("row", [ROW, KAF, LINEAR, replace(LINEAR, lipschitz_upper=5.0)])
@pytest.mark.parametrize("slope", [1.5, 4.0])
def test_advice_can_be_followed_literally(row: LayerRow, slope: float) -> None:
    shape = Shape("act1", (0.0,), ((0.0,),), (-slope, 1.0), (-2.0, 2.0))
    text = " ".join(said(row, ROW, shape=shape))
    words = [found.strip(".,:)") for found in re.findall(r"--[a-z-]+ [^ ,)]+", text)]
    assert words
    given = dict(word.split(" ", 1) for word in words if not word.startswith("--set"))
    options = RunOptions(
        set=[word.removeprefix("--set ") for word in words if word.startswith("--set")],
        method=given.get("--method", "fast"),
        radius=given.get("--radius", "0.1"),
        norm=given.get("--norm"),
        weight_decay=float(given["--weight-decay"]) if "--weight-decay" in given else None,
    )
    assert set(given) <= {"--method", "--radius", "--norm", "--weight-decay"}
    config_of(options, load("digits"))  # refuses names and values that it does not know
