"""A trained checkpoint, and user's networks of all kinds, in a folder of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from models import checkpoint, mlp
from models.data import load
from models.training import Engine, Fast, TrainConfig, train

NETS = """
import torch
from torch import nn

def good():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).eval()

def training():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def raises():
    raise KeyError("no such thing")

def flat():
    return nn.Linear(64, 10).eval()

def wants(size):
    return nn.Linear(size, 10).eval()

def number():
    return 3

def nan():
    net = good()
    net[1].weight.data[0, 0] = float("nan")
    return net

def half():
    return good().half()

def hooked():
    net = good()
    net[1].register_forward_hook(lambda *_: None)
    return net

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(63, 10)).eval()

def three():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 4, batch_first=True)
        self.last = nn.Linear(32, 10)

    def forward(self, x):
        return self.last(self.rnn(x.flatten(1, 2))[0].flatten(1))

def recurrent():
    return Recurrent().eval()

def branching():
    class Branching(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)
    return Branching().eval()
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small network that was trained on digits for a few epochs."""
    place, data = tmp_path_factory.mktemp("trained"), load("digits")
    torch.manual_seed(0)
    config = TrainConfig(epochs=6, recipe=Fast(radius=0.05), engine=Engine(device="cpu"))
    train(mlp([64, 16, 10]), data, config, directory=place)
    return place


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> Path:
    """A working directory with the checkpoint ``net`` and the module ``usernets``."""
    (tmp_path / "net").mkdir()
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "net" / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "usernets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "usernets", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    assert checkpoint.load(tmp_path / "net").meta["data"] == "digits"
    return tmp_path
