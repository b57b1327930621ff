"""The plugin passes on what is proved and fails on the rest, with the reason, in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from certify.errors import InvalidInput
from certify.pytest_plugin import assert_certified

ROOT = Path(__file__).resolve().parents[2]


def _net() -> nn.Module:
    """Two logits, x and 1 - x: at .8 the class changes at distance .3."""
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model.bias.copy_(torch.tensor([0.0, 1.0]))
    return model.eval()


def test_it_passes_below_the_true_distance_and_fails_above() -> None:
    x = torch.tensor([0.8])
    assert_certified(_net(), x, 0, 0.299)
    assert_certified(_net(), x[None], torch.tensor([0]), 0.299, p=2)
    with pytest.raises(pytest.fail.Exception, match=r"sample 0 \(label 0\): violated, a counterexample"):
        assert_certified(_net(), x, 0, 0.301)
    with pytest.raises(pytest.fail.Exception, match="1 of 2 samples"):
        assert_certified(_net(), torch.tensor([[0.8], [0.6]]), torch.tensor([0, 0]), 0.2)


def test_labels_may_be_a_list_and_other_outputs_are_refused() -> None:
    assert_certified(_net(), torch.tensor([[0.8], [0.1]]), [0, 1], 0.2)
    for outputs in (lambda y: y[:, 0], lambda y: (y, y)):
        model = _net()
        model.register_forward_hook(lambda _, __, y, outputs=outputs: outputs(y))
        with pytest.raises(InvalidInput, match="a model with outputs"):
            assert_certified(model, torch.tensor([[0.8]]), [0], 0.1)


def test_what_is_neither_proved_nor_broken_is_unknown() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)).eval()
    x = torch.rand(30, 6)
    labels = model(x).argmax(1)
    with pytest.raises(pytest.fail.Exception, match="unknown, the margin's bound is -"):
        assert_certified(model, x, labels, 0.08, method="ibp")


def test_the_fixture_works_in_a_project_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["certify.pytest_plugin"]\n')
    (tmp_path / "test_it.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def test_zero(assert_certified):\n"
        "    model = nn.Linear(2, 2).eval()\n    nn.init.zeros_(model.weight)\n"
        "    model.bias.data = torch.tensor([1.0, 0.0])\n"
        "    assert_certified(model, torch.rand(3, 2), torch.zeros(3, dtype=torch.long), 0.5)\n"
        "    assert_certified(model, torch.rand(2), 1, 0.5)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "sample 0 (label 1): violated" in done.stdout
    assert "1 failed" in done.stdout
