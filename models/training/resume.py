"""The state of a training run between two epochs, in one safetensors file: resumed exactly or refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import InvalidFile
from models.checkpoint import fill
from models.data import Dataset
from models.files import pack, read_bytes, unpack, write
from models.networks import Network
from models.training.average import Average
from models.training.config import TrainConfig
from models.training.records import EpochRecord

FILE = "resume.safetensors"


@dataclass(eq=False)
class Progress:
    """Where a run stands: all that the next epoch depends on, and the best weights so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    average: Average | None = None
    records: list[EpochRecord] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    overfitted: list[int] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.records)

    @property
    def stale(self) -> int:
        """Epochs since the best one."""
        return self.epoch - self.best_epoch

    def advance(self, record: EpochRecord) -> None:
        """Count an epoch; the model's present weights are kept unless an earlier epoch has a higher score."""
        self.records.append(record)
        if self.best_epoch == 0 or record.score >= self.records[self.best_epoch - 1].score:
            self.best_epoch = record.epoch
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def save_progress(directory: Path, progress: Progress, identity: dict[str, Any]) -> None:
    """Write the state of the run of that identity atomically. The learning rate, a function of the step, needs none."""
    tensors = {
        **{f"model.{name}": value for name, value in progress.model.state_dict().items()},
        **{f"best.{name}": value for name, value in progress.best.items()},
        **_optimizer_tensors(progress.optimizer),
        "rng.generator": progress.generator.get_state(),
        "rng.torch": torch.get_rng_state(),
    }
    if progress.average is not None:
        tensors |= {f"average.{name}": value for name, value in progress.average.tensors().items()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    header = {
        "identity": identity,
        "records": [asdict(record) for record in progress.records],
        "best_epoch": progress.best_epoch,
        "overfitted": progress.overfitted,
    }
    write({directory / FILE: pack(tensors, header)})


def load_progress(directory: Path, progress: Progress, identity: dict[str, Any]) -> None:
    """Bring ``progress`` to the state in ``directory``, torch's global generators included.

    Raises ``InvalidFile`` if there is none, it is damaged, or it comes from a run of another identity.
    """
    path = directory / FILE
    tensors, header = unpack(path, read_bytes(path))
    theirs = header.get("identity")
    if theirs != identity:
        known = theirs if isinstance(theirs, dict) else {}
        changed = sorted(key for key in {*known, *identity} if known.get(key) != identity.get(key))
        raise InvalidFile(
            f"{path} comes from another run: {', '.join(changed)} changed",
            "the config, network and data that it was started with",
            "start anew without --resume",
        )
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}, "rng": {}, "average": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    fill(progress.model, parts["model"], path)
    try:
        progress.records = [EpochRecord(**record) for record in header["records"]]
        progress.best_epoch, progress.best = int(header["best_epoch"]), parts["best"]
        progress.overfitted = [int(epoch) for epoch in header["overfitted"]]
        _restore_optimizer(progress.optimizer, parts["optimizer"])
        if progress.average is not None:
            progress.average.restore(parts["average"])
        progress.generator.set_state(parts["rng"]["generator"])
        torch.set_rng_state(parts["rng"]["torch"])
        if "cuda" in parts["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(parts["rng"]["cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise InvalidFile(
            f"{path} is incomplete ({type(error).__name__})", "a state that this version wrote", "start anew"
        ) from None


def identity_of(model: nn.Module, config: TrainConfig, data: Dataset) -> dict[str, Any]:
    """Return what must be equal for a resume to be exact, by dotted names; where it is computed may differ."""
    options = {key: value for key, value in _flat(config.to_dict()).items() if not key.startswith("engine.")}
    network = model.architecture if isinstance(model, Network) else None
    return {**options, **_flat({"network": network}), "data": data.name, "images": data.digest()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten the per-parameter state; its settings come from the config."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{key}": value
        for index, entries in state.items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
