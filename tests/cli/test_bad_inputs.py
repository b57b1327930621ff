"""Bad inputs: exit code 2 or 5, at most three lines that say what to do, no traceback, nothing written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cli.main import main

OWN = "--data digits --samples 4 --no-layers --radius 0.02 --model usernets"
NET = "--samples 4 --no-layers"

#: Command line and exit code; files are made by ``plant``.
CASES = {
    "resuming nowhere": ("report net --resume", 2),
    "a shard that is kept nowhere": ("report net --shard 1/2", 2),
    "shards submitted to nowhere": ("report net --slurm 2", 2),
    "a shard beyond the last": ("report net --out run --shard 3/2", 2),
    "a shard that is none": ("report net --out run --shard half", 2),
    "a shard of submitted shards": ("report net --out run --shard 1/2 --slurm 2", 2),
    "no jobs": ("report net --jobs 0", 2),
    "no time": ("report net --time-limit 0", 2),
    "time that is no number": ("report net --sample-time-limit nan", 2),
    "no batch": ("report net --batch 0", 2),
    "a network twice": ("report net net", 2),
    "a network with records": ("report net --from found", 2),
    "a radius with records": ("report --from found --radius 0.1", 2),
    "results in a file": ("report net --out net/model.json", 5),
    "nothing to merge": ("merge absent --out merged", 5),
    "merging to nowhere": ("merge net", 2),
    "no command of that name": ("certainly", 2),
    "no option of that name": ("report net --frobnicate", 2),
    "no network": ("report", 2),
    "missing checkpoint": ("report nowhere", 5),
    "truncated weights": ("report truncated", 5),
    "truncated json": ("report torn", 5),
    "weights of another run": ("report swapped", 5),
    "NaN in a checkpoint": ("report poisoned", 5),
    "a pickle offered as checkpoint": ("report evil.pt", 5),
    "an unknown architecture in a checkpoint": ("report strange", 5),
    "a list of networks in a checkpoint": ("report listed", 5),
    "a newer schema": ("report newer", 5),
    "negative radius": ("report net --radius -1/255", 2),
    "NaN radius": ("report net --radius nan", 2),
    "infinite radius": ("report net --radius inf", 2),
    "bad fraction": ("report net --radius 8/0", 2),
    "empty radius": ("report net --radius 0.1,,0.2", 2),
    "unknown norm": ("report net --norm l7", 2),
    "unknown method": ("report net --methods crown,gown", 2),
    "a method twice": ("report net --methods ibp,crown,ibp", 2),
    "an estimator twice": ("lipschitz net --methods product,product", 2),
    "unknown arithmetic": ("report net --arithmetic exact", 2),
    "unknown attack": ("attack net --attack bribe", 2),
    "an option that the attack lacks": ("attack net --attack fgsm --restarts 3", 2),
    "no steps": ("attack net --steps 0", 2),
    "unknown data set": ("report net --data mmnist", 2),
    "no data folder": ("report net --data mnist", 2),
    "empty data folder": ("report net --data mnist --data-dir .", 5),
    "missing npz": ("report net --data npz:none.npz", 5),
    "npz without labels": ("report net --data npz:unlabelled.npz", 5),
    "empty npz": ("report net --data npz:empty.npz", 5),
    "npz with pickles": ("report net --data npz:objects.npz", 5),
    "pixels out of range": ("report net --data npz:bright.npz", 5),
    "negative labels": ("report net --data npz:negative.npz", 5),
    "labels out of range": ("report net --data npz:labels.npz", 2),
    "images of another shape": ("report net --data npz:wide.npz", 2),
    "zero samples": ("report net --samples 0", 2),
    "more samples than there are": ("report net --samples 451", 2),
    "samples that are no number": ("report net --samples many", 2),
    "normalisation of a checkpoint": ("report net --mean 0.5 --std 0.5", 2),
    "json into a missing folder": ("report net --json none/out.json", 5),
    "json into a folder": ("report net --json net", 5),
    "json without a name": ("report net --json=", 5),
    "two outputs in one file": ("report net --html a.out --markdown ./a.out", 2),
    "a page and numbers in one file": ("compare net --html a.out --json a.out", 2),
    "verdicts and numbers in one file": ("gate net --min-clean 0.5 --junit a.out --json a.out", 2),
    "witnesses and numbers in one file": ("attack net --out a.out --json a.out", 2),
    "a plot and numbers in one file": ("lr-find --plot a.svg --json a.svg", 2),
    "a page over a run's manifest": ("report net --out run --resume --html run/manifest.json", 2),
    "numbers over a shard": ("merge run --out merged --json run/records.jsonl", 2),
    "witnesses into a missing folder": ("attack net --out none/out.npz", 5),
    "a gate that wants nothing": ("gate net", 2),
    "a gate of NaN": ("gate net --min-certified nan", 2),
    "a gate above one": ("gate net --min-certified 60", 2),
    "a gate above all": ("gate net --min-attacked 101%", 2),
    "a gate below none": ("gate net --min-clean=-0.1", 2),
    "a gate that is no number": ("gate net --min-clean most", 2),
    "a gate of nothing in a hundred": ("gate net --min-clean %", 2),
    "a gate over zero": ("gate net --min-clean 1/0", 2),
    "a gate too small to write down": ("gate net --min-clean 1e-9999999999", 2),
    "a gate without a network": ("gate --min-clean 0.5", 2),
    "a gate for an absent network": ("gate nowhere --min-clean 0.5", 5),
    "a gate for a network twice": ("gate net net --min-clean 0.5", 2),
    "a gate by no method that is known": ("gate net --methods gown --min-clean 0.5", 2),
    "a gate for what cannot be bounded": (f"gate {OWN.replace('--no-layers ', '')}:recurrent --min-certified 0.5", 2),
    "verdicts in a missing folder": ("gate net --min-clean 0.5 --junit none/junit.xml", 5),
    "verdicts in a folder": ("gate net --min-clean 0.5 --junit net", 5),
    "a radius too large to write down": ("report net --radius 1e9999999999", 2),
    "two layer radii": ("report net --layer-radius 0.1,0.2", 2),
    "malformed --model": (f"report {OWN}", 2),
    "no such module": ("report --data digits --model nonets:good", 2),
    "no such factory": (f"report {OWN}:none", 2),
    "a factory that raises": (f"report {OWN}:raises", 2),
    "a factory with arguments": (f"report {OWN}:wants", 2),
    "a factory that makes no network": (f"report {OWN}:number", 2),
    "a network in train mode": (f"report {OWN}:training", 2),
    "NaN weights": (f"report {OWN}:nan", 2),
    "half precision": (f"report {OWN}:half", 2),
    "hooks": (f"report {OWN}:hooked", 2),
    "an operation without a rule": (f"report {OWN}:recurrent", 2),
    "a branch on values": (f"report {OWN}:branching", 2),
    "inputs that the network refuses": (f"report {OWN}:narrow", 2),
    "fewer outputs than classes": (f"report {OWN}:three", 2),
    "weights that do not fit": (f"report {OWN}:good --weights other.pt", 5),
    "weights that are no state_dict": (f"report {OWN}:good --weights list.pt", 5),
    "weights with code in them": (f"report {OWN}:good --weights evil.pt", 5),
    "missing weights": (f"report {OWN}:good --weights none.pt", 5),
    "bad mean": (f"report {OWN}:good --mean half --std 1", 2),
    "std of zero": (f"report {OWN}:good --mean 0.5 --std 0", 2),
    "mean without std": (f"report {OWN}:good --mean 0.5", 2),
    "bad input shape": (f"report {OWN}:good --input-shape 8x8", 2),
    "an input shape that the samples lack": (f"report {OWN}:good --input-shape 1,7,7", 2),
    "checkpoint and --model": (f"report net {OWN}:good", 2),
    "unknown input shape": ("lipschitz --model usernets:good", 2),
    "l1 Lipschitz": ("lipschitz net --norm l1", 2),
    "unknown estimator": ("lipschitz net --methods guess", 2),
    "bounds by an unknown method": ("bounds net --methods maybe", 2),
    "unknown architecture": ("train --arch transformer", 2),
    "unknown activation": ("train --activation swash", 2),
    "no epochs": ("train --epochs 0", 2),
    "NaN rate": ("train --lr nan", 2),
    "adversarial training without radius": ("train --method fast", 2),
    "an unknown recipe": ("train --method faith --radius 0.1", 2),
    "an option that a recipe lacks": ("train --method fast --radius 0.1 --set recipe.beta=6", 2),
    "an option without a value": ("train --set optimizer.clip", 2),
    "an option that is none": ("train --set optimiser.clip=1", 2),
    "an option inside a number": ("train --set batch=3 --set batch.clip=1", 2),
    "a radius that is no number": ("train --method fast --radius wide", 2),
    "a training radius too large to write down": ("train --method fast --radius 1e999999999", 2),
    "no config file": ("train --config absent.toml", 5),
    "a config file that is none": ("train --config net/model.json", 5),
    "rates the wrong way round": ("lr-find --low 1 --high 0.1", 2),
    "a plot of no kind": ("lr-find --plot curve.xyz", 2),
    "a plot in no folder": ("lr-find --plot nowhere/curve.svg", 5),
    "no sweep of that name": ("sweep absent", 5),
    "a sweep that is none": ("sweep net/model.json", 5),
    "a sweep changed to nonsense": ("sweep vgg-fastat --set judge.steps=0", 2),
    "a diagnosis of nothing": ("diagnose absent", 5),
    "a diagnosis drawn in no kind": ("diagnose net --kind bmp", 2),
    "a diagnosis with a torn log": ("diagnose logged --samples 4 --plots pictures", 5),
    "a diagnosis with another log": ("diagnose listing --samples 4 --plots pictures", 5),
    "a diagnosis at two radii": ("diagnose net --radius 0.1,0.2", 2),
    "an option that the network lacks": ("train --net depth=3", 2),
    "hidden layers as an option of the network": ("train --net hidden=32", 2),
    "classes as an option of the network": ("train --arch cnn --net classes=12", 2),
    "a network as an option of the network": ("train --net network=cnn", 2),
    "an option of the network without a value": ("train --net foo", 2),
    "a flag of the network that is none": ("train --arch resnet20 --net preactivation=no", 2),
    "a seed beyond the last": ("train --seed 18446744073709551616", 2),
    "samples of a seed beyond the last": ("report net --seed 18446744073709551616", 2),
    "rates of a seed beyond the last": ("lr-find --seed 9223372036854775808", 2),
    "a seed beyond the last in the config": ("train --set seed=9223372036854775808", 2),
    "a list of recipes": ('train --set recipe.name=["fast"]', 2),
    "a radius for standard training": ("train --radius 0.1", 2),
    "a recipe without its noise": ("train --method noise", 2),
    "rates on data without training images": ("lr-find --data npz:labels.npz", 2),
    "a sweep on data without training images": ("sweep vgg-fastat --data npz:labels.npz --images 3", 2),
    "hidden layers that are none": ("train --hidden 64,zero", 2),
    "a folder that holds a run": ("train --out net", 2),
    "nothing to resume": ("train --out empty --resume", 5),
    "training data without training images": ("train --data npz:labels.npz", 2),
}


class Evil:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple:
        return (print, ("pwned",))


def plant(folder: Path) -> None:
    """Make the bad files."""
    weights, text = ((folder / "net" / name).read_bytes() for name in ("model.safetensors", "model.json"))
    meta = json.loads(text)

    def checkpoint(name: str, data: bytes, words: bytes) -> None:
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(data)
        (folder / name / "model.json").write_bytes(words)

    checkpoint("truncated", weights[:-50], text)
    checkpoint("torn", weights, text[:-20])
    checkpoint("swapped", weights[:-4] + b"\x00\x00\x80\x3f", text)
    poisoned = weights[:-4] + b"\x00\x00\xc0\x7f"
    import hashlib

    digest = hashlib.sha256(poisoned).hexdigest()
    checkpoint("poisoned", poisoned, json.dumps({**meta, "weights_sha256": digest}).encode())
    strange = {**meta, "architecture": {**meta["architecture"], "network": "oracle"}}
    checkpoint("strange", weights, json.dumps(strange).encode())
    listed = {**meta, "architecture": {**meta["architecture"], "network": ["mlp"]}}
    checkpoint("listed", weights, json.dumps(listed).encode())
    checkpoint("newer", weights, json.dumps({**meta, "schema_version": 99}).encode())
    for name, line in (("logged", '{"epoch": 2, "gradi'), ("listing", "[]")):
        checkpoint(name, weights, text)
        (folder / name / "log.jsonl").write_text(f'{{"epoch": 1}}\n{line}')
    (folder / "run").mkdir()
    for name in ("records.jsonl", "manifest.json", "timings.jsonl"):
        (folder / "run" / name).write_text("precious")
    (folder / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"0.weight": torch.ones(3, 3)}, folder / "other.pt")
    torch.save([torch.ones(3)], folder / "list.pt")
    images, labels = np.full((5, 1, 8, 8), 0.5, np.float32), np.arange(5)
    np.savez(folder / "unlabelled.npz", images=images)
    np.savez(folder / "empty.npz", images=images[:0], labels=labels[:0])
    np.savez(folder / "objects.npz", images=np.array([Evil()], dtype=object), labels=labels[:1])
    np.savez(folder / "bright.npz", images=images * 3, labels=labels)
    np.savez(folder / "negative.npz", images=images, labels=labels - 1)
    np.savez(folder / "labels.npz", images=images, labels=labels + 8)
    np.savez(folder / "wide.npz", images=images.repeat(2, 3), labels=labels)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("words", "code"), CASES.values(), ids=CASES.keys())
def test_bad_input(words: str, code: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(folder)
    before = snapshot(folder)
    command, _, rest = words.partition(" ")
    extra = NET.split() if command == "report" and "--samples" not in rest and "--no-layers" not in rest else []
    assert main([command, *rest.split(), *extra]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.err + captured.out
    assert "pwned" not in captured.err + captured.out
    assert "internal" not in captured.err
    assert max(map(len, lines)) < 420
    assert snapshot(folder) == before


#: Command line, and what the refusal must name.
NAMED = {
    "train --net hidden=32": "use --hidden",
    "train --arch cnn --net classes=12": "use --data",
    "train --net network=cnn": "use --arch",
    "train --net foo": "--net 'foo'",
    "train --set foo": "--set 'foo'",
    "train --arch resnet20 --net preactivation=no": "true or false",
    "train --method noise": "--set recipe.sigma=",
    "train --radius 0.1": "--method",
    "lr-find --data npz:labels.npz": "test images alone",
    "report net --sample-time-limit nan": "try: --sample-time-limit 3600",
    "report net --methods ibp,ibp": "ibp twice",
    "report net --layer-radius 1e-400,36/255": "--layer-radius 1e-400,36/255",
    "report net --html a.out --json a.out": "the target of --html",
    "report --from run --html run/records.jsonl": "a file of the records",
    "report --from run/records.jsonl --json run/../run/records.jsonl": "a file of the records",
    "report --from run/records.jsonl --json run/timings.jsonl": "a file of the records",
}


@pytest.mark.parametrize("words", NAMED)
def test_refusals_name_what_is_meant(words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(folder)
    before = snapshot(folder)
    assert main(words.split()) == 2
    assert NAMED[words] in capsys.readouterr().err
    assert snapshot(folder) == before


@pytest.mark.parametrize("target", ["", "net"])
def test_a_folder_is_told_to_be_one(target: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--html", "--json"):
        assert main(["report", "net", option, target]) == 5
        said = capsys.readouterr().err
        assert "is a folder" in said
        assert "mkdir" not in said


def test_there_are_at_least_thirty() -> None:
    assert len(CASES) >= 30
