"""Training in several processes, and through kill -9: the same as in one piece."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models.checkpoint import load

HOME = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys
from dataclasses import replace
import torch
from models import mlp
from models.data import load, subset
from models.training import TrainConfig, launched, train

torch.set_num_threads(1)
whole = load("digits")
x, y, _ = subset(whole.train_x, whole.train_y, 300, 0)
data = replace(whole, train_x=x, train_y=y, val_x=whole.val_x[:60], val_y=whole.val_y[:60])
config = TrainConfig.from_dict(json.loads(sys.argv[1]))
torch.manual_seed(0)
options = {"directory": sys.argv[2], "resume": "resume" in sys.argv}
with launched():
    result = train(mlp([64, 24, 10], "kaf-elu"), data, config, **options, on_epoch=lambda _: print("epoch", flush=True))
print(json.dumps([r.loss for r in result.records]))
"""


def command(config: str, place: Path, *words: str) -> list[str]:
    return [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, config, str(place), *words]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"} | extra


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        '{"epochs": 3, "batch": 50}',
        '{"epochs": 3, "batch": 47, "recipe": {"name": "fast", "radius": 0.1}, "augment": {"crop": 1}}',
        '{"epochs": 3, "batch": 64, "recipe": {"name": "ibp", "radius": 0.02}, "optimizer": {"clip": 1.0}}',
    ],
    ids=["standard", "fast", "ibp"],
)
def test_two_processes_follow_the_loss_curve_of_one(config: str, tmp_path: Path) -> None:
    """The last batches are odd, one image even: the processes' shares differ in size."""
    one = subprocess.run(command(config, tmp_path / "one"), env=environment(), check=True, capture_output=True)
    port = str(random.randint(20_000, 40_000))
    pair = [
        subprocess.Popen(
            command(config, tmp_path / "two"),
            env=environment(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in pair]
    assert all(process.returncode == 0 for process in pair)
    assert outputs[0] == outputs[1]
    losses = [torch.tensor(json.loads(text.splitlines()[-1])) for text in (one.stdout, outputs[0])]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    weights = [load(tmp_path / name).model.state_dict() for name in ("one", "two")]
    for a, b in zip(weights[0].values(), weights[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def run_until(words: list[str], seconds: float | None) -> float:
    """Run to the end, or kill -9 that long after the first epoch; return how long the others took."""
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"epoch\n"
        started = time.monotonic()
        if seconds is not None:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        process.stdout.read()
        assert process.wait() == (0 if seconds is None else -signal.SIGKILL)
    return time.monotonic() - started


@pytest.mark.slow
def test_twenty_kills_and_a_resume_end_with_the_same_weights(tmp_path: Path) -> None:
    config = (
        '{"epochs": 300, "batch": 50, "recipe": {"name": "fast", "radius": 0.05}, "optimizer": {"average": 0.9}, '
        '"watch": {"images": 30, "overfitting": "report"}}'
    )
    whole = run_until(command(config, tmp_path / "whole"), None)
    draw, place = random.Random(0), tmp_path / "parts"
    for _ in range(20):
        words = ["resume"] if (place / "resume.safetensors").exists() else []
        run_until(command(config, place, *words), draw.uniform(0.0, whole / 15))
    run_until(command(config, place, "resume"), None)
    for a, b in zip(*(load(tmp_path / n).model.state_dict().values() for n in ("whole", "parts")), strict=True):
        assert torch.equal(a, b)
    assert (place / "log.jsonl").read_text().count("\n") == 300
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith(".")) == [
        "log.jsonl",
        "model.json",
        "model.safetensors",
        "resume.safetensors",
    ]
