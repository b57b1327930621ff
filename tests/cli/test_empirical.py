"""compare, audit, smooth and attack from the command line: tables, files, exit codes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import html5lib
import pytest
import torch
from reports import made_up

from analysis import audit as auditing
from analysis import curves, figures
from analysis.audit import Audit
from analysis.sandwich import Sandwich
from analysis.smoothing import SmoothedAccuracy
from certify.attacks import APGD, Ensemble
from certify.errors import InvalidInput
from cli import theme
from cli.assessing import targets
from cli.main import main
from models import checkpoint
from models.data import load
from models.networks import architecture, build
from models.training import Engine, TrainConfig, train

Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, words: str, code: int = 0) -> str:
    """Run a command; return its stdout."""
    assert main(words.split()) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (APGD(steps=10),)
    monkeypatch.setattr("analysis.sandwich.Ensemble", lambda attacks=few: Ensemble(attacks=attacks))
    monkeypatch.setattr(auditing, "CHECKS", auditing.CHECKS[:4])


@pytest.mark.usefixtures("quick")
def test_compare_prints_what_it_writes(folder: Path, capsys: Capture) -> None:
    words = "compare net --radius 0.02,0.1 --samples 20 --methods ibp,crown --steps 5 --restarts 1"
    text = said(capsys, f"{words} --plot curves.svg --html page.html --csv rates.csv --json out.json")
    found = Sandwich.from_dict(json.loads((folder / "out.json").read_text())["results"]["networks"][0])
    for place in range(2):
        for rate in found.layers(place):
            assert theme.rate(rate) in text
    for title in ("Accuracy in percent", "What is known of how many images", "Radii (linf)", "Class by class"):
        assert title in text
    assert (folder / "curves.svg").read_bytes().startswith(b"<?xml")
    assert "<!DOCTYPE html>" in (folder / "page.html").read_text()
    assert "Networks against each other" not in text
    shutil.copytree(folder / "net", folder / "twin")
    both = said(capsys, words.replace("compare net", "compare net twin"))
    assert "Networks against each other" in both


@pytest.mark.usefixtures("quick")
def test_compares_files_hold_what_it_prints(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certify.smoothing.Smoothing.count", 200, raising=False)
    shutil.copytree(folder / "net", folder / "twin")
    words = (
        "compare net twin --samples 4 --norm l2 --radius 0.02,0.1 --attack apgd-ce --steps 3 --restarts 1 --sigma 0.2"
    )
    text = said(capsys, f"{words} --html page.html --markdown tables.md --plot curves.svg")
    page, tables = (folder / "page.html").read_text(), (folder / "tables.md").read_text()
    html5lib.HTMLParser(strict=True).parse(page)
    for part in ("after APGD", "after all", "PROBABLE", "Networks against each other", "McNemar", "broken at"):
        assert all(part in found for found in (text, page, tables))
    assert "after PGD" not in text + page + tables
    assert "No layer was measured" not in page
    assert page.count("accuracy between attacks and proofs") == 2
    assert b"after APGD" in figures.encoded(curves.sandwich_curves([_sandwich()]), "svg", transparent=True)


def _sandwich() -> Sandwich:
    found = made_up(("net",), 20, layers=0).networks[0].evaluation
    return Sandwich("net", replace(found, attack="APGD(steps=3)"), found, "crown", ())


@pytest.mark.usefixtures("quick")
def test_audit_says_trusted_or_exits_with_one(folder: Path, capsys: Capture) -> None:
    text = said(capsys, "audit net --radius 0.05 --samples 10 --json out.json")
    found = Audit.from_dict(next(iter(json.loads((folder / "out.json").read_text())["results"]["networks"].values())))
    assert found.trusted
    assert "images: too few to tell" in " ".join(text.split())
    (folder / "soft.py").write_text(
        "from torch import nn\n\ndef net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)).eval()\n"
    )
    text = said(capsys, "audit --model soft:net --data digits --radius 0.05 --samples 200", code=1)
    assert "Do not trust attacks on this network: softmax output" in " ".join(text.split())


def test_smooth_is_labelled_as_no_proof(folder: Path, capsys: Capture) -> None:
    text = said(capsys, "smooth net --samples 8 --count 100 --radius 0.1,1/4 --sigma 0.2 --json out.json")
    (found,) = json.loads((folder / "out.json").read_text())["results"]["networks"].values()
    rates = SmoothedAccuracy.from_dict(found).certified
    assert all(theme.rate(rate) in text for rate in rates)
    assert "PROBABLE, not proved" in text


@pytest.mark.usefixtures("quick")
def test_smoothing_is_a_column_of_its_own_in_l2(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certify.smoothing.Smoothing.count", 200, raising=False)
    words = "compare net --samples 3 --radius 0.1 --methods crown --steps 3 --restarts 1 --sigma 0.2"
    text = said(capsys, f"{words} --norm l2")
    assert "PROBABLE" in text
    assert "no proof" in " ".join(text.split())
    assert main(words.split()) == 2
    assert "--norm l2" in capsys.readouterr().err


def test_what_cannot_be_certified_can_be_attacked(folder: Path, capsys: Capture) -> None:
    digits = load("digits")
    model = build(architecture("mlp", digits.input_shape, 10, "kwta", hidden=(32,)), seed=0)
    train(model, digits, TrainConfig(epochs=3, engine=Engine(device="cpu")), directory=folder / "kwta")
    assert checkpoint.load(folder / "kwta").meta["architecture"]["activation"] == "kwta"
    text = said(capsys, "attack kwta --radius 0.05 --samples 20 --attack adaptive --out found.npz")
    assert "Adaptive" in text
    assert main(["report", "kwta", "--samples", "5", "--radius", "0.05"]) == 2
    assert len(capsys.readouterr().err.splitlines()) <= 3


def test_networks_of_one_name_are_saved_apart(folder: Path, capsys: Capture) -> None:
    for name in ("one", "two"):
        shutil.copytree(folder / "net", folder / name / "net")
    said(capsys, "attack one/net two/net --radius 0.05 --samples 5 --steps 2 --out at.npz")
    assert {path.name for path in folder.glob("*.npz")} == {"at-one-net.npz", "at-two-net.npz"}
    (folder / "at-two-net.npz").unlink()
    (folder / "at-two-net.npz").mkdir()
    assert main(["attack", "one/net", "two/net", "--radius", "0.05", "--samples", "5", "--out", "at.npz"]) == 5
    captured = capsys.readouterr()
    assert "is a folder" in captured.err
    assert captured.out == ""  # before anything is computed
    assert main(["attack", "one/net", str(folder / "one/net"), "--samples", "5", "--out", "at.npz"]) == 0
    with pytest.raises(InvalidInput):
        targets(Path("at.npz"), ["a/net", "/a/net"])


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fmn", "deepfool", "square", "r-fgsm"])
def test_every_attack_runs_by_its_name(
    name: str, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("certify.attacks.square.BLOCK", 10)
    text = said(capsys, f"attack net --radius 0.05 --samples 5 --attack {name}")
    assert "after attack" in text
    assert torch.is_grad_enabled()
