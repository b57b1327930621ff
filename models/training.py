"""Training: standard or adversarial, one-cycle, best weights by validation, resumed exactly."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certify.errors import InvalidInput, InvalidModel
from models import checkpoint
from models.adversary import accuracy, robust_accuracy, training_inputs
from models.data import Dataset, subset
from models.kaf import KAF
from models.networks import Network
from models.recipe import EpochRecord, OnEpoch, Recipe, Status, TrainingResult
from models.resume import Progress, load_progress, save_progress

#: Validation images attacked after every epoch.
ATTACKED = 500


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
) -> TrainingResult:
    """Train ``model`` in place and return it with its best weights by validation, in eval mode.

    With ``directory`` the best weights are a checkpoint there after every epoch, beside the state from which
    ``resume`` continues: a run in parts ends with the same weights as a run in one piece (bitwise on one
    CPU). Ctrl-C ends with the best weights so far and status "interrupted". ``on_epoch`` is called after each
    epoch.

    Raises ``InvalidInput`` for data without training images or a device that is absent, ``InvalidModel`` when
    the loss is no longer finite, ``InvalidFile`` when there is nothing to resume, or from another run.
    """
    _check(model, data, directory)
    home, device = next(model.parameters()).device, _device(recipe.device)
    started = time.perf_counter()
    model.to(device)
    run = _Run(model, data, recipe, device)
    place = None if directory is None else Path(directory)
    if resume:
        if place is None:
            raise InvalidInput("resume without a directory", "the folder of the run", "directory=FOLDER")
        load_progress(place, run.progress, recipe, data)
    status: Status = "finished"
    try:
        while run.progress.epoch < recipe.epochs:
            if recipe.patience is not None and run.progress.stale >= recipe.patience:
                status = "stopped early"
                break
            record = run.epoch()
            if place is not None:
                _save(place, run, data)
            if on_epoch is not None:
                on_epoch(record)
    except KeyboardInterrupt:
        status = "interrupted"
    progress = run.progress
    if progress.best:
        model.load_state_dict(progress.best)
    model.to(home).eval()
    seconds = time.perf_counter() - started
    return TrainingResult(model, tuple(progress.records), progress.best_epoch, status, seconds)


def one_cycle(step: int, steps: int, *, rise: float = 0.3) -> float:
    """Return the learning rate's share of its peak: a line up over ``rise`` of the steps, then down to 0.

    Reference: L. Smith, N. Topin, "Super-convergence" (2018), with the first cycle alone.
    """
    peak = max(1, round(rise * steps))
    return (step + 1) / peak if step < peak else (steps - step) / (steps - peak + 1)


class _Run:
    """One training run: data on the device, the optimizer, and the progress that a resume restores."""

    def __init__(self, model: nn.Module, data: Dataset, recipe: Recipe, device: torch.device) -> None:
        self.model, self.recipe, self.device, self.classes = model, recipe, device, data.classes
        self.train = data.train_x.to(device), data.train_y.to(device)
        self.val = data.val_x.to(device), data.val_y.to(device)
        probe = subset(data.val_x, data.val_y, min(ATTACKED, len(data.val_x)), recipe.seed)
        self.probe = probe[0].to(device), probe[1].to(device)
        self.rates, groups = _groups(model, recipe)
        self.steps_per_epoch = -(-len(self.train[0]) // recipe.batch)
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)
        else:
            optimizer = torch.optim.Adam(groups, lr=recipe.lr)
        self.progress = Progress(model, optimizer, torch.Generator().manual_seed(recipe.seed))

    def epoch(self) -> EpochRecord:
        """Train one epoch, validate, keep the weights if they are the best so far."""
        started, progress = time.perf_counter(), self.progress
        number = progress.epoch + 1
        self.model.train()
        loss, hits = self._pass(number)
        self.model.eval()
        robust = None
        if self.recipe.method != "standard":
            robust = robust_accuracy(self.model, *self.probe, self.recipe, classes=self.classes)
        record = EpochRecord(
            epoch=number,
            loss=loss,
            train_accuracy=hits,
            val_accuracy=accuracy(self.model, *self.val),
            val_robust=robust,
            lr=progress.optimizer.param_groups[0]["lr"],
            seconds=time.perf_counter() - started,
        )
        progress.advance(record)
        return record

    def _pass(self, number: int) -> tuple[float, float]:
        """One pass over the training images in random order; return mean loss and accuracy."""
        x, y = self.train
        order = torch.randperm(len(x), generator=self.progress.generator).to(self.device)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, rows in enumerate(order.split(self.recipe.batch)):
            self._set_rate((number - 1) * self.steps_per_epoch + index)
            totals += self._step(x[rows], y[rows])
        loss, hits = (totals / len(x)).tolist()
        if loss != loss or loss == float("inf"):
            raise InvalidModel(f"the training loss became {loss} in epoch {number}", "a finite loss", "a lower --lr")
        return loss, hits

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step; return the summed loss and the number of hits."""
        with self._autocast():
            inputs = training_inputs(
                self.model, x, y, self.recipe, classes=self.classes, generator=self.progress.generator
            )
            logits = self.model(inputs)
            loss = F.cross_entropy(logits, y)
        self.progress.optimizer.zero_grad()
        loss.backward()
        self.progress.optimizer.step()
        return torch.stack([loss.detach().double() * len(x), (logits.argmax(1) == y).sum().double()])

    def _set_rate(self, step: int) -> None:
        share = one_cycle(step, self.recipe.epochs * self.steps_per_epoch)
        for rate, group in zip(self.rates, self.progress.optimizer.param_groups, strict=True):
            group["lr"] = rate * share

    def _autocast(self) -> AbstractContextManager[None]:
        cuda = self.device.type == "cuda"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=cuda)


def _groups(model: nn.Module, recipe: Recipe) -> tuple[list[float], list[dict]]:
    """Peak rates and parameter groups: KAF parameters at a rate of their own and without weight decay."""
    kaf = [p for m in model.modules() if isinstance(m, KAF) for p in m.parameters(recurse=False)]
    apart = {id(p) for p in kaf}
    rest = [p for p in model.parameters() if id(p) not in apart]
    parts = [(rest, recipe.lr, recipe.weight_decay), (kaf, recipe.lr * recipe.kaf_lr, 0.0)]
    parts = [part for part in parts if part[0]]
    return [rate for _, rate, _ in parts], [{"params": p, "weight_decay": decay} for p, _, decay in parts]


def _save(place: Path, run: _Run, data: Dataset) -> None:
    """Write the best weights if the last epoch brought them, then the state to resume from."""
    progress = run.progress
    if progress.best_epoch == progress.epoch:
        meta = {
            "data": data.name,
            "recipe": run.recipe.to_dict(),
            "seed": run.recipe.seed,
            "metrics": asdict(progress.records[-1]),
        }
        checkpoint.save(place, run.model, meta)
    save_progress(place, progress, run.recipe, data)


def _check(model: nn.Module, data: Dataset, directory: str | Path | None) -> None:
    if len(data.train_x) == 0 or len(data.val_x) == 0:
        raise InvalidInput(f"{data.name} has no training images", "train and validation images", "add train_images")
    if directory is not None and (not isinstance(model, Network) or model.architecture is None):
        raise InvalidInput(
            f"a {type(model).__name__} without an architecture",
            "a network whose checkpoint can be built again",
            "models.build(architecture), or no directory",
        )
    with torch.no_grad():
        first = next(model.parameters())
        shape = model(data.val_x[:2].to(first.device)).shape
    if shape[1:] != (data.classes,):
        raise InvalidInput(
            f"a network with outputs {tuple(shape)}",
            f"[batch, {data.classes}] for {data.name}",
            "change its number of classes",
        )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("device cuda", "a GPU that torch sees", "device='auto' or 'cpu'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
