"""Training: a run's epochs, its best weights by validation, its files; resumed exactly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from certify.attacks.base import evaluating
from certify.errors import InvalidInput
from models import checkpoint
from models.data import Dataset, trainable
from models.files import prepare
from models.networks import Network
from models.training.config import TrainConfig
from models.training.log import log
from models.training.records import OnEpoch, Status, TrainingResult
from models.training.resume import load_progress, save_progress
from models.training.run import Run


def train(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
) -> TrainingResult:
    """Train ``model`` in place and return it with its best weights by validation, in eval mode.

    With ``directory`` the best weights are a checkpoint there after every epoch, beside log.jsonl and the state from
    which ``resume`` continues: a run in parts ends with the same weights as a run in one piece (bitwise on one CPU).
    Ctrl-C ends with the best weights so far and status "interrupted". ``on_epoch`` is called after each epoch. Started
    by torchrun, within ``models.training.launched()``, all processes train together and the first one writes.

    Raises ``InvalidInput`` for data without training images or a device that is absent, ``InvalidModel`` when the loss
    is no longer finite, ``InvalidFile`` when there is nothing to resume, or from another run, or no room to write.
    """
    require_trainable(model, data)
    if directory is not None and (not isinstance(model, Network) or model.architecture is None):
        raise InvalidInput(
            f"a {type(model).__name__} without an architecture",
            "a network whose checkpoint can be built again",
            "models.build(architecture), or no directory",
        )
    home, device = next(model.parameters()).device, device_of(config.engine.device)
    started = time.perf_counter()
    model.to(device)
    run = Run(model, data, config, device)
    place = None if directory is None else Path(directory)
    if resume and place is None:
        raise InvalidInput("resume without a directory", "the folder of the run", "directory=FOLDER")
    with seeded(config.seed, device):
        if place is not None and resume:
            load_progress(place, run.progress, run.identity)
        if place is not None and run.group.main:
            prepare(place)
        try:
            status = _epochs(run, place, on_epoch)
        except KeyboardInterrupt:
            status = "interrupted"
    progress = run.progress
    if progress.best:
        model.load_state_dict(progress.best)
    model.to(home).eval()
    seconds = time.perf_counter() - started
    records, overfitted = tuple(progress.records), tuple(progress.overfitted)
    return TrainingResult(model, records, progress.best_epoch, status, seconds, overfitted)


def _epochs(run: Run, place: Path | None, on_epoch: OnEpoch | None) -> Status:
    """Train until the epochs, the patience or the watch end it."""
    while (status := run.ended()) is None:
        record = run.epoch()
        if place is not None and run.group.main:
            _save(place, run)
        if on_epoch is not None:
            on_epoch(record)
    return status


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Start torch's global generators at ``seed`` for a while: dropout draws from them, and from no other."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _save(place: Path, run: Run) -> None:
    """Write the best weights if the last epoch brought them, then the log and the state to resume from."""
    progress, config = run.progress, run.config
    if progress.best_epoch == progress.epoch:
        metrics = asdict(progress.records[-1])
        meta = {"data": run.data.name, "config": config.to_dict(), "seed": config.seed, "metrics": metrics}
        checkpoint.save(place, run.model, meta, weights=progress.best)
    log(place, progress.records)
    save_progress(place, progress, run.identity)


def require_trainable(model: nn.Module, data: Dataset) -> None:
    """Raise ``InvalidInput`` unless there are images to train on and the model has an output for each class."""
    trainable(data)
    with evaluating(model), torch.no_grad():
        first = next(model.parameters())
        shape = model(data.val_x[:2].to(first.device)).shape
    if shape[1:] != (data.classes,):
        raise InvalidInput(
            f"a network with outputs {tuple(shape)}",
            f"[batch, {data.classes}] for {data.name}",
            "change its number of classes",
        )


def device_of(name: str) -> torch.device:
    """Return the device of that name; "auto" is a GPU if torch sees one. Raises ``InvalidInput`` for an absent one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("device cuda", "a GPU that torch sees", "device='auto' or 'cpu'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
