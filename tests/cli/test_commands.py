"""The commands do what they say: tables on stdout, JSON that can be read back, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import certify
from analysis.records import Evaluation, NetworkReport
from cli import theme
from cli.main import main
from models import checkpoint
from models.data import load

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


def run(words: str) -> int:
    """Run a command in this process; return its exit code."""
    return main(words.split())


def said(capsys: Capture, words: str) -> str:
    """Run a command that succeeds silently on stderr; return its stdout."""
    code = run(words)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.err == ""
    return captured.out


def process(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m cli`` in a folder, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_report_prints_and_writes_the_same_numbers(folder: Path, capsys: Capture) -> None:
    words = "report net --radius 0.02,1/10 --samples 40 --restarts 1 --steps 5 --layer-samples 8 --json out.json"
    text = said(capsys, words)
    document = json.loads((folder / "out.json").read_text())
    assert document["schema_version"] == 1
    assert document["arguments"]["radius"] == "0.02,1/10"
    assert document["seed"] == 0
    assert set(document["versions"]) >= {"python", "torch", "kafcert"}
    report = NetworkReport.from_dict(document["results"]["networks"][0])
    assert [row.radius for row in report.evaluation.rows] == [Fraction(1, 50), Fraction(1, 10)]
    for row in report.evaluation.rows:
        assert theme.rate(row.attacked) in text
        for rate in row.certified.values():
            assert theme.rate(rate) in text
            assert rate.count <= row.attacked.count <= report.evaluation.clean.count
    assert report.layers is not None
    for word in ("40 of 450 test images of digits (seed 0)", "normalisation: none", "float32-any-order", "PGD(steps=5"):
        assert word in " ".join(text.split())
    assert " ".join(report.layers.sentences[0].split()) in " ".join(text.split())


def test_report_looks_into_a_layer_and_draws_pixels(folder: Path, capsys: Capture) -> None:
    words = "report net --radius 0.02 --samples 20 --layer-samples 8 --layer act1 --pixels map.svg --json out.json"
    text = said(capsys, f"{words} --out run")
    report = NetworkReport.from_dict(json.loads((folder / "out.json").read_text())["results"]["networks"][0])
    assert report.layers is not None
    (inside,) = (layer for layer in report.layers.neurons if layer.layer == "act1")
    assert f"Inside act1 (ReLU): 10 of {inside.total} neurons" in text
    assert theme.percent(inside.rows[0].share) in text
    assert (folder / "map.svg").read_bytes().startswith(b"<?xml")
    said(capsys, "report --from run --layer linear2 --html a.html --markdown a.md")
    said(capsys, "report --from run --html b.html")
    assert "Inside linear2" in (folder / "a.html").read_text()
    assert "Inside linear2" in (folder / "a.md").read_text()
    assert "Inside linear2" not in (folder / "b.html").read_text()  # an exact layer
    for words in ("--layer encoder", "--layer act1 --no-layers", "--pixels map.bmp", "--pixels no/where.svg"):
        assert run(f"report net --samples 5 {words}") in (2, 5)
        assert len(capsys.readouterr().err.splitlines()) <= 3
    assert run("report net --samples 5 --layer encoder") == 2
    assert "one of flatten, linear1, act1, linear2" in capsys.readouterr().err


def test_report_writes_files_of_the_same_numbers(folder: Path, capsys: Capture) -> None:
    files = "--html a.html --markdown a.md --csv a.csv --latex a.tex"
    text = said(capsys, f"report net --radius 0.02 --samples 20 --layer-samples 4 --json out.json {files}")
    report = NetworkReport.from_dict(json.loads((folder / "out.json").read_text())["results"]["networks"][0])
    for name in ("a.html", "a.md", "a.csv", "a.tex"):
        assert f"written: {name}" in text
        written = (folder / name).read_text()
        shown = theme.rate(report.evaluation.rows[0].attacked)
        assert (shown if name in ("a.html", "a.md") else "net") in written
    kept = {name: name.replace("a.", "b.") for name in ("a.html", "a.md", "a.csv", "a.tex")}
    said(capsys, f"report net --radius 0.02 --samples 20 --layer-samples 4 --out run {files}")
    said(capsys, f"report --from run {files.replace('a.', 'b.')}")
    for first, again in kept.items():
        assert (folder / first).read_bytes() == (folder / again).read_bytes()
    assert run("report net --html no/such/folder.html") == 5
    assert "cannot write" in capsys.readouterr().err


def test_several_networks_stand_side_by_side(folder: Path, capsys: Capture) -> None:
    words = "report net net/model.json --radius 0.02 --samples 10 --no-layers --methods crown --arithmetic real"
    text = said(capsys, words)
    assert "Side by side" in text
    assert "do not differ by more than chance" in text
    assert "arithmetic: real" in text


def test_json_to_stdout_is_json_alone(folder: Path, capsys: Capture) -> None:
    assert run("report net --radius 0.02 --samples 5 --no-layers --json -") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["command"] == "report"
    assert "Accuracy in percent" in captured.err


def test_a_users_own_network_from_both_kinds_of_weights(folder: Path, capsys: Capture) -> None:
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
    torch.save(own.state_dict(), folder / "own.pt")
    save_file(own.state_dict(), folder / "own.safetensors")
    words = "report --model usernets:good --data digits --samples 20 --radius 0.02 --no-layers --mean 0.3 --std 0.4"
    found = []
    for file in ("own.pt", "own.safetensors"):
        text = said(capsys, f"{words} --weights {file} --json out.json")
        assert "mean 0.3; std 0.4" in text
        found.append(json.loads((folder / "out.json").read_text())["results"]["networks"][0]["evaluation"]["clean"])
    data = load("digits")
    from models.data import subset

    x, y, _ = subset(data.test_x, data.test_y, 20, 0)
    hits = int((own.eval()((x - 0.3) / 0.4).argmax(1) == y).sum())
    assert [rate["count"] for rate in found] == [hits, hits]


def test_flat_networks_get_flat_samples(folder: Path, capsys: Capture) -> None:
    words = "report --model usernets:flat --data digits --samples 5 --radius 0.01 --input-shape 64 --layer-samples 2"
    assert "Linear, 650 parameters" in said(capsys, words)


def test_bounds_hold_the_outputs(folder: Path, capsys: Capture) -> None:
    text = said(capsys, "bounds net --radius 0.02 --samples 3 --methods crown --json out.json")
    rows = json.loads((folder / "out.json").read_text())["results"]["networks"]["net"]
    assert len(rows) == 3
    for row in rows:
        assert all(lo <= v <= up for lo, v, up in zip(row["lower"], row["value"], row["upper"], strict=True))
        assert str(row["index"]) in text


def test_attack_saves_points_of_the_ball_that_fool(folder: Path, capsys: Capture) -> None:
    said(capsys, "attack net --radius 1/10,0.3 --samples 30 --out adv.npz --json out.json")
    found = Evaluation.from_dict(json.loads((folder / "out.json").read_text())["results"]["networks"]["net"])
    model, data = checkpoint.load(folder / "net").model, load("digits")
    with np.load(folder / "adv.npz") as saved:
        clean, labels = data.test_x[torch.from_numpy(saved["index"])], torch.from_numpy(saved["labels"])
        for row, name in zip(found.rows, ("1_10", "3_10"), strict=True):
            points, fooled = torch.from_numpy(saved[f"images_{name}"]), torch.from_numpy(saved[f"fooled_{name}"])
            assert bool(certify.LpBall(clean, row.radius, clip=(0.0, 1.0)).contains(points).all())
            assert torch.equal(model(points).argmax(1) != labels, fooled)
            assert row.attacked.count == 30 - int(fooled.sum())


def test_lipschitz_bounds_enclose(folder: Path, capsys: Capture) -> None:
    text = said(capsys, "lipschitz net --json out.json --methods recursion,clever,product,jacobian")
    best, product, lower = json.loads((folder / "out.json").read_text())["results"]["networks"]["net"]
    assert [found["side"] for found in (best, product, lower)] == ["upper", "upper", "lower"]
    assert lower["value"] <= best["value"] <= product["value"]
    assert all(found["seconds"] > 0 for found in (best, product, lower))
    low, high = theme.bound(lower["value"], "lower"), theme.bound(best["value"], "upper")
    assert f"{low} <= L <= {high}" in text
    assert "refused" in text  # CLEVER asks for a domain
    assert float(low) <= lower["value"]
    assert best["value"] <= float(high)
    assert "linear1" in text
    assert run("lipschitz net --methods clever") != 0


def test_ops_lists_all_registries(capsys: Capture) -> None:
    text = said(capsys, "ops")
    for word in ("nn.Conv2d", "nn.GELU", "models.KAF", "crown-ibp", "pgd", "product", "fashion-mnist"):
        assert word in text


def test_train_writes_resumes_and_is_not_overwritten(folder: Path, capsys: Capture) -> None:
    words = "train --activation kaf --hidden 8 --epochs 2 --out run --method fast --radius 1/10 --normalise"
    text = said(capsys, words)
    assert "epoch   2" in text
    assert "test accuracy" in text
    meta = checkpoint.load(folder / "run").meta
    assert meta["config"]["recipe"]["radius"] == 0.1
    assert len(meta["normalisation"]["mean"]) == 1
    assert run(words) == 2
    assert "holds a run already" in capsys.readouterr().err
    said(capsys, f"{words} --resume")
    assert "mean" in said(capsys, "report run --samples 5 --radius 0.01 --no-layers")


def test_options_go_before_assignments_and_these_before_the_file(folder: Path, capsys: Capture) -> None:
    (folder / "run.toml").write_text(
        'epochs = 9\nseed = 5\n[optimizer]\nname = "sgd"\nlr = 0.5\nclip = 2.0\n[recipe]\nname = "ibp"\nradius = "1/50"'
    )
    text = said(capsys, "train --config run.toml --set epochs=2 --set optimizer.lr=0.1 --lr 0.01 --hidden 8 --out run")
    assert "ibp training against linf 0.02, 2 epochs, seed 5" in text
    assert "certified" in text
    config = checkpoint.load(folder / "run").meta["config"]
    assert config["optimizer"]["lr"] == 0.01
    assert config["optimizer"]["clip"] == 2.0
    assert (config["epochs"], config["seed"]) == (2, 5)


def test_lr_find_prints_and_draws_the_curve(folder: Path, capsys: Capture) -> None:
    words = "lr-find --hidden 8 --optimizer sgd --tries 30 --plot {} --json curve.json"
    text = said(capsys, words.format("curve.svg"))
    assert "falls fastest" in text
    first = (folder / "curve.svg").read_bytes()
    assert first.startswith(b"<?xml")
    said(capsys, words.format("curve.svg"))
    assert (folder / "curve.svg").read_bytes() == first
    found = json.loads((folder / "curve.json").read_text())["results"]
    assert len(found["rates"]) == len(found["losses"]) <= 30
    said(capsys, words.format("curve.png"))
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_diagnose_prints_and_draws(folder: Path, capsys: Capture) -> None:
    said(capsys, "train --activation kaf-elu --hidden 8,8 --epochs 2 --out run")
    text = said(capsys, "diagnose run --radius 0.1 --samples 20 --plots pictures --json found.json")
    for word in ("gradient now", "act2", "No NaN", "times the last hidden one's"):
        assert word in text
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == [
        "gradients.svg",
        "histograms.svg",
        "kafs.svg",
    ]
    found = json.loads((folder / "found.json").read_text())["results"]
    assert found["origin"] is None
    assert set(found["gains"]) == {"act1", "act2"}


def test_diagnose_shows_no_range_where_nothing_certifies_one(folder: Path, capsys: Capture) -> None:
    text = said(capsys, "diagnose --activation kaf:kernel=laplacian --hidden 8 --samples 8")
    (line,) = (line.split() for line in text.splitlines() if line.split()[:1] == ["act1"])
    assert line[2:] == ["-", "-"]
    text = said(capsys, "diagnose --activation silu+kaf --hidden 8 --samples 8")
    assert "act1.base" not in text


@pytest.mark.slow
def test_diagnose_shows_the_explosion_of_the_published_network(folder: Path, capsys: Capture) -> None:
    words = "diagnose --arch resnet56 --activation kaf --net width=4 --samples 16"
    assert "Gradients explode" in said(capsys, f"{words} --net preactivation=false")
    assert "Gradients explode" not in said(capsys, words)


def test_sweep_prints_a_table_and_goes_on(folder: Path, capsys: Capture) -> None:
    (folder / "plan.toml").write_text(
        'title = "two nets"\ndata = "digits"\nactivations = ["relu", "tanh"]\nseeds = [0]\n[networks.mlp]\n'
        "hidden = [8]\n[recipes.standard]\nepochs = 1\n[judge]\n"
        'radii = ["0.1"]\nsteps = 2\nrestarts = 1\nsamples = 20\n'
    )
    text = said(capsys, "sweep plan.toml --out found --set train.batch=64 --images 300")
    assert "mlp-tanh-standard-0" in text
    for name in ("table.csv", "table.md", "scatter.svg"):
        assert (folder / "found" / name).is_file()
    assert (folder / "found" / "table.csv").read_text().count("\n") == 3
    again = said(capsys, "sweep plan.toml --out found --set train.batch=64 --images 300 --json sweep.json")
    assert again == text
    assert len(json.loads((folder / "sweep.json").read_text())["results"]["results"]) == 2


def test_an_interrupted_training_says_what_is_saved(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.training.run import Run

    epoch = Run.epoch

    def once(self: Run) -> object:
        if self.progress.epoch == 1:
            raise KeyboardInterrupt
        return epoch(self)

    monkeypatch.setattr(Run, "epoch", once)
    assert run("train --hidden 4 --epochs 3 --out run") == 130
    assert "--resume continues" in capsys.readouterr().err
    assert (folder / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("answer", ["switch", "stop", "report"])
def test_what_was_done_about_overfitting_is_what_was_done(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr("models.training.run.overfits", lambda record: record.epoch == 2)
    words = "train --hidden 4 --method fast --radius 0.1 --set watch.overfitting={} --epochs {} --out {}"
    last = " ".join(said(capsys, words.format(answer, 2, "last")).split())
    assert "overfitting after epoch 2" in last
    assert "no epoch came after it; the best weights are kept" in last
    assert "went" not in last
    assert "stopped" not in last
    more = " ".join(said(capsys, words.format(answer, 3, "more")).split())
    done = {"switch": "on with PGD training", "stop": "stopped there with the best", "report": "went on all the same"}
    assert done[answer] in more
    assert "no epoch came after" not in more


def test_ctrl_c_says_so(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("models.checkpoint.load", stop)
    assert run("report net") == 130
    assert capsys.readouterr().err == "interrupted\n"


class Liar:
    """A method that certifies everything."""

    name = "liar"

    def bound(self, graph: object, domain: object, spec: certify.Spec, arithmetic: object) -> torch.Tensor:
        return torch.ones_like(spec.d, dtype=torch.float64)


def test_a_soundness_alarm_has_its_own_exit_code(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(certify.registry.METHODS, "liar", Liar)
    assert run("report net --methods liar --radius 0.3 --samples 20 --no-layers") == 6
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert len(list((folder / "alarms").glob("*.npz"))) == 1


@pytest.mark.parametrize(
    ("words", "code", "files"),
    [
        ("gate net --min-clean 0.1 --samples 20 --steps 2 --junit j.xml", 0, {"j.xml"}),
        ("gate net --min-clean 1 --samples 20 --steps 2 --junit j.xml --json j.json", 1, {"j.xml", "j.json"}),
        ("attack net --samples 5 --steps 2 --json -", 0, set()),
        ("attack net --attack bribe", 2, set()),
        ("--version", 0, set()),
    ],
)
def test_a_closed_pipe_loses_no_file_and_changes_no_exit_code(
    folder: Path, words: str, code: int, files: set[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli", *words.split()]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=write, stderr=write, check=False)
    os.close(write)
    assert done.returncode == code
    assert all((folder / name).is_file() for name in files)


def test_internal_errors_are_short_too(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("models.checkpoint.load", broken)
    assert run("report net") == 6
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "planted" in lines[0]


def test_the_demo_runs_and_its_report_can_be_read(folder: Path) -> None:
    done = process(folder, "demo", "--quick", "--out", "shown")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= theme.PLAIN_WIDTH
    for word in ("In plain words", "relu", "kaf", "costs most", "Side by side"):
        assert word in done.stdout
    results = json.loads((folder / "shown" / "report.json").read_text())["results"]
    reports = [NetworkReport.from_dict(data) for data in results["networks"]]
    assert [report.name for report in reports] == ["relu", "kaf"]
    assert all(len(report.evaluation.rows) == 3 for report in reports)
    assert {path.name for path in (folder / "shown").iterdir()} == {"relu", "kaf", "report.html", "report.json"}
    assert "</html>" in (folder / "shown" / "report.html").read_text()
    assert done.stdout.splitlines()[-1].startswith("The report as a page: shown/report.html; all numbers:")


@pytest.mark.parametrize("name", ["models", "analysis"])
def test_a_users_folder_of_our_name_is_an_error_that_says_so(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    done = process(folder, "ops")
    assert done.returncode == 2
    assert f"the package '{name}' comes from" in done.stderr
    assert len(done.stderr.splitlines()) == 3


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promises(folder: Path) -> None:
    done = process(folder, "demo")
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "demo" / "report.json").read_text())["results"]
    for data in results["networks"]:
        found = NetworkReport.from_dict(data).evaluation
        assert found.count == 450
        assert found.clean.value >= 0.95
        assert found.rows[0].certified["crown"].value > 0.85
        assert found.rows[1].certified["crown"].value > 0.7


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "train",
        "lr-find",
        "sweep",
        "diagnose",
        "report",
        "merge",
        "bounds",
        "attack",
        "lipschitz",
        "gate",
        "ops",
    ],
)
def test_help_needs_no_torch(folder: Path, command: str) -> None:
    code = (
        "import sys; from cli.main import main; "
        f"assert main({[command, '--help'] if command else ['--help']!r}) == 0; "
        "assert not {'torch', 'certify', 'models', 'scipy', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: certify" in done.stdout


@pytest.mark.parametrize("columns", [80, 100])
def test_tables_fit_the_terminal(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = said(capsys, "report net --radius 2/255,8/255 --samples 10 --layer-samples 4")
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    for word in ("slack", "after attack", "95th pct", "linear1"):
        assert word in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.12345, "0.123"),
        (12.345, "12.3"),
        (999.6, "1000"),
        (1234.5, "1.2e+03"),
        (float("inf"), "inf"),
        (None, "-"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert theme.number(value) == text


def test_radii_keep_their_form() -> None:
    forms = {
        "2/255": "2/255",
        "36/255": "36/255",
        "1/3": "85/255",
        "1/7": "1/7",
        "0.1": "0.1",
        "51/255": "0.2",
        "0": "0",
    }
    assert {word: theme.radius(Fraction(word)) for word in forms} == forms
    assert theme.radius(Fraction(1, 10**400)) == "1e-400"
    assert theme.radius(Fraction("0.0313725490196")) == "0.0313725490196"
    assert [theme.share(value) for value in (Fraction(2, 3), Fraction(1, 10**400))] == ["200/3", "1e-398"]
    assert [theme.fraction(Fraction(word)) for word in ("36/255", "0.05", "2")] == ["36/255", "1/20", "2"]
