"""Checkpoints: what is saved comes back, and everything else is refused in three lines."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from certify.errors import InvalidFile, InvalidInput
from models import files, mlp
from models.checkpoint import load, load_weights, save
from models.networks import Network


def network() -> Network:
    torch.manual_seed(0)
    return mlp([4, 3, 2], "kaf-elu", mean=[0.5], std=[0.25])


@pytest.mark.parametrize("name", ["run", "net.json", "net.safetensors"])
def test_a_round_trip(name: str, tmp_path: Path) -> None:
    model, x = network(), torch.rand(5, 1, 2, 2)
    written = save(tmp_path / name, model, {"data": "digits", "seed": 4})
    for path in (tmp_path / name, written, written.with_suffix(".safetensors")):
        loaded = load(path)
        assert torch.equal(loaded.model(x), model(x))
        assert not loaded.model.training
        assert (loaded.meta["data"], loaded.meta["seed"], loaded.meta["activation"]) == ("digits", 4, "kaf-elu")
        assert loaded.meta["normalisation"] == {"mean": [0.5], "std": [0.25]}
        assert {"schema_version", "versions", "architecture"} <= set(loaded.meta)


def test_float64_networks_come_back_in_float64(tmp_path: Path) -> None:
    model = network().double()
    save(tmp_path, model)
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    assert torch.equal(load(tmp_path).model(x), model(x))


def test_a_network_without_architecture_cannot_be_saved(tmp_path: Path) -> None:
    for model in (nn.Sequential(nn.Linear(2, 2)), mlp([2, 2, 2], lambda _: nn.ReLU())):
        with pytest.raises(InvalidInput, match="architecture"):
            save(tmp_path, model)
    assert not list(tmp_path.iterdir())


def edit(path: Path, change: Callable[[dict], object]) -> None:
    meta = json.loads((path / "model.json").read_text())
    change(meta)
    (path / "model.json").write_text(json.dumps(meta))


def reweigh(path: Path, change: Callable[[dict], object]) -> None:
    """Change the weights and keep the JSON's hash in step, as a tool other than ours might."""
    import hashlib

    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    data = safetensors.torch.save(tensors)
    (path / "model.safetensors").write_bytes(data)
    edit(path, lambda meta: meta.update(weights_sha256=hashlib.sha256(data).hexdigest()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no json": lambda p: (p / "model.json").unlink(),
    "no weights": lambda p: (p / "model.safetensors").unlink(),
    "truncated weights": lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-7]),
    "truncated header": lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:20]),
    "empty weights": lambda p: (p / "model.safetensors").write_bytes(b""),
    "truncated json": lambda p: (p / "model.json").write_text((p / "model.json").read_text()[:90]),
    "binary json": lambda p: (p / "model.json").write_bytes(bytes(range(256))),
    "json list": lambda p: (p / "model.json").write_text("[]"),
    "other schema": lambda p: edit(p, lambda meta: meta.update(schema_version=99)),
    "no architecture": lambda p: edit(p, lambda meta: meta.pop("architecture")),
    "unknown network": lambda p: edit(p, lambda meta: meta["architecture"].update(network="rnn")),
    "wrong sizes": lambda p: edit(p, lambda meta: meta["architecture"].update(sizes=[4, 5, 2])),
    "absurd sizes": lambda p: edit(p, lambda meta: meta["architecture"].update(sizes=[4, 10**16, 2])),
    "other weights": lambda p: edit(p, lambda meta: meta.update(weights_sha256="0" * 64)),
    "nan": lambda p: reweigh(p, lambda t: t["linear1.weight"].view(-1)[0].fill_(torch.nan)),
    "missing tensor": lambda p: reweigh(p, lambda t: t.pop("act1.alpha")),
    "surplus tensor": lambda p: reweigh(p, lambda t: t.update(extra=torch.ones(2))),
    "wrong shape": lambda p: reweigh(p, lambda t: t.update({"linear1.bias": torch.ones(4)})),
    "pickle": lambda p: torch.save({"a": torch.ones(2)}, p / "model.safetensors"),
    "plain pickle": lambda p: (p / "model.safetensors").write_bytes(pickle.dumps({"a": 1})),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints_are_refused(kind: str, tmp_path: Path) -> None:
    save(tmp_path, network())
    DAMAGE[kind](tmp_path)
    with pytest.raises(InvalidFile) as error:
        load(tmp_path)
    assert error.value.exit_code == 5
    assert len(str(error.value).splitlines()) <= 3


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "notes.txt").write_text("hello")
    for name, word in (("weights.pt", "pickle"), ("notes.txt", "damaged"), ("absent", "no checkpoint")):
        with pytest.raises(InvalidFile, match=word):
            load(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_of_a_users_network(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    if name.endswith("pt"):
        torch.save(source.state_dict(), tmp_path / name)
    else:
        safetensors.torch.save_file(source.state_dict(), tmp_path / name)
    load_weights(target, tmp_path / name)
    assert torch.equal(source.weight, target.weight)


class Payload:
    """A pickle that would write a file if it were trusted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_weights_that_are_no_state_dict_are_refused_and_never_run(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2), tmp_path / "module.pt")
    torch.save({"weight": Payload(tmp_path / "owned")}, tmp_path / "payload.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "part.pt")
    torch.save({"weight": torch.full((2, 3), torch.inf), "bias": torch.ones(2)}, tmp_path / "inf.pt")
    whole = (tmp_path / "inf.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    names = ("module.pt", "payload.pt", "list.pt", "part.pt", "inf.pt", "cut.pt", "text.pt", "text.safetensors")
    for name in (*names, "absent.pt"):
        with pytest.raises(InvalidFile) as error:
            load_weights(model, tmp_path / name)
        assert len(str(error.value).splitlines()) <= 3
    assert torch.equal(model.weight, before)
    assert not (tmp_path / "owned").exists()


def test_a_save_killed_between_its_two_renames_leaves_a_checkpoint(tmp_path: Path) -> None:
    model, places = network(), (tmp_path / "old", tmp_path / "new")
    for epoch, place in enumerate(places, 1):
        with torch.no_grad():
            model.linear1.weight.mul_(2)
        save(place, model, {"data": "digits", "metrics": {"epoch": epoch}})
    (places[0] / "model.safetensors").write_bytes((places[1] / "model.safetensors").read_bytes())
    found = load(places[0])
    assert found.meta == load(places[1]).meta
    assert torch.equal(found.model.linear1.weight, model.linear1.weight)
    edit(places[0], lambda meta: meta.update(data="mnist"))  # those are no weights of that run
    with pytest.raises(InvalidFile, match="does not belong"):
        load(places[0])


def test_tensors_that_changed_on_disk_are_noticed_even_by_a_json_that_agrees(tmp_path: Path) -> None:
    packed = bytearray(files.pack({"a": torch.ones(4)}, {"b": 1}))
    assert files.unpack(tmp_path, bytes(packed))[1] == {"b": 1}
    packed[-1] ^= 1
    with pytest.raises(InvalidFile, match="damaged"):
        files.unpack(tmp_path, bytes(packed))


def test_a_failed_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, network())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, network().double())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
