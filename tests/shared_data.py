"""Reference networks, images and bounds beside the repository, for tests that can do without them."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import KAF

_ROOT = Path(__file__).resolve().parents[1]
_DATA = _ROOT.parent / "shared" / "data"

#: The folder of the reference data, or None where it is absent.
SHARED: Path | None = _DATA if (_DATA / "load_net.py").is_file() else None

needs_shared = pytest.mark.skipif(SHARED is None, reason="the reference networks (../shared/data) are absent")

#: The five ReLU networks with reference bounds.
RELU_NETS = ("mnist_6x100_nat", "mnist_cnn_a_adv", "mnist_fc_256x2", "cifar_cnn_a_adv", "cifar_resnet2b")


def load_case(name: str) -> tuple[nn.Module, Tensor, Tensor, dict[str, Any]]:
    """Return the network (eval mode), images in [0, 1], labels and description of ``nets/<name>.json``."""
    return _loader().load_case(_folder() / "nets" / f"{name}.json")


def with_our_kafs(model: nn.Module) -> nn.Module:
    """Return the network, changed in place: its kernel activations are modules of ours."""
    for i, layer in enumerate(model.layers):
        if type(layer).__name__ == "KAF":
            ours = KAF(len(layer.coef), size=layer.coef.shape[1]).eval()
            with torch.no_grad():
                ours.alpha.copy_(layer.coef)
                ours.dictionary.copy_(layer.grid)
                ours.gamma.fill_(layer.gamma)
            model.layers[i] = ours
    return model


@cache
def reference() -> dict[str, Any]:
    """Return ``reference_bounds.json``."""
    return json.loads((_folder() / "reference_bounds.json").read_text())


def _folder() -> Path:
    if SHARED is None:
        pytest.skip("the reference networks (../shared/data) are absent")
    return SHARED


@cache
def _loader() -> Any:
    spec = importlib.util.spec_from_file_location("load_net", _folder() / "load_net.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
