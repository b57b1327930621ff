"""Training: one loop for every recipe, best weights by validation, resumed exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.attacks import FGSM
from certify.attacks.base import evaluating
from certify.errors import InvalidInput, InvalidModel
from models import checkpoint
from models.data import Dataset, subset
from models.files import prepare
from models.kaf import fuse
from models.networks import Network
from models.training.adversarial import PGDTraining
from models.training.augment import augmented
from models.training.average import Average
from models.training.config import TrainConfig
from models.training.gradients import gradient_norms
from models.training.group import Group
from models.training.log import log
from models.training.optimizers import optimizer_for
from models.training.penalty import penalty
from models.training.recipe import Batch, Recipe
from models.training.records import EpochRecord, OnEpoch, Status, TrainingResult, overfits
from models.training.resume import Progress, identity_of, load_progress, save_progress
from models.training.schedule import share
from models.training.validation import PROBE, accuracy, certified_accuracy, robust_accuracy


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


class Run:
    """One training run: data on the device, the optimizer, and the progress that a resume restores."""

    def __init__(self, model: nn.Module, data: Dataset, config: TrainConfig, device: torch.device) -> None:
        self.model, self.data, self.config, self.device, self.classes = model, data, config, device, data.classes
        self.group = Group.current()
        self.train = data.train_x.to(device), data.train_y.to(device)
        self.val = data.val_x.to(device), data.val_y.to(device)
        probe = subset(data.val_x, data.val_y, min(config.watch.images, len(data.val_x)), config.seed)
        self.probe = probe[0].to(device), probe[1].to(device)
        self.rates, optimizer = optimizer_for(model, config.optimizer)
        decay = config.optimizer.average
        average = None if decay is None else Average(model, decay)
        self.progress = Progress(model, optimizer, torch.Generator().manual_seed(config.seed), average)
        self.steps_per_epoch = len(batches(torch.arange(len(self.train[0])), config.batch))
        if 4 * self.group.size > min(config.batch, len(self.train[0])):
            raise InvalidInput(
                f"batches of {min(config.batch, len(self.train[0]))} for {self.group.size} processes",
                "at least four images for each",
                "a larger --batch, or fewer processes",
            )
        if config.engine.compile == "kaf":
            fuse(model)
        elif config.engine.compile == "model":
            model.compile()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a resume must find unchanged."""
        return identity_of(self.model, self.config, self.data)

    def ended(self) -> Status | None:
        """How the run ended; None while it goes on."""
        progress, watch = self.progress, self.config.watch
        if progress.overfitted and watch.overfitting == "stop":
            return "overfitted"
        if progress.epoch >= self.config.epochs:
            return "finished"
        if watch.patience is not None and progress.stale >= watch.patience:
            return "stopped early"
        return None

    @property
    def recipe(self) -> Recipe:
        """The recipe in force: PGD training where the configured one overfitted to its own attack."""
        recipe, switch = self.config.recipe, self.config.watch.overfitting == "switch"
        if not (self.progress.overfitted and switch and recipe.threat is not None):
            return recipe
        return PGDTraining(radius=recipe.threat.radius, norm=recipe.threat.norm)

    def epoch(self) -> EpochRecord:
        """Train one epoch, validate, keep the weights if they are the best so far."""
        started, progress, config = time.perf_counter(), self.progress, self.config
        name = self.recipe.name
        self.model.train()
        loss, hits = self._pass(progress.epoch)
        trained = time.perf_counter() - started
        self.group.share_buffers(self.model)
        self.model.eval()
        average = progress.average
        with nullcontext() if average is None else average.worn(self.model):
            record = EpochRecord(
                epoch=progress.epoch + 1,
                recipe=name,
                loss=loss,
                train_accuracy=hits,
                **self._validated(),
                lr=progress.optimizer.param_groups[0]["lr"],
                seconds=time.perf_counter() - started,
                images_per_second=len(self.train[0]) / trained,
                gradients=gradient_norms(self.model, *(part[: config.batch] for part in self.probe)),
            )
            _require_finite("gradients", record.gradients.values(), record.epoch)
            progress.advance(record)
        self._watch()
        return record

    def _watch(self) -> None:
        """Note overfitting to the recipe's own attack, and go back to the best weights where it will be switched."""
        progress = self.progress
        if overfits(progress.records[-1]) and not progress.overfitted:
            progress.overfitted.append(progress.epoch)
            if self.config.watch.overfitting == "switch":
                self.model.load_state_dict(progress.best)
                if progress.average is not None:
                    progress.average.state.update({name: value.clone() for name, value in progress.best.items()})

    def _validated(self) -> dict[str, float]:
        """Return accuracies on the validation images: clean, attacked and certified."""
        recipe, threat = self.recipe, self.recipe.threat
        found = {"val_accuracy": accuracy(self.model, *self.val)}
        if threat is not None:
            found["val_robust"] = robust_accuracy(self.model, *self.probe, threat, PROBE, classes=self.classes)
        if threat is not None and recipe.one_step:
            found["val_step"] = robust_accuracy(self.model, *self.probe, threat, FGSM(), classes=self.classes)
        if threat is not None and (recipe.certified or self.config.watch.certify):
            found["val_certified"] = certified_accuracy(self.model, *self.probe, threat, classes=self.classes)
        return found

    def _pass(self, epoch: int) -> tuple[float, float]:
        """One pass over the training images in random order; return mean loss and accuracy."""
        recipe, memory = self.recipe, dict[str, Tensor]()
        steps, count = self.config.epochs * self.steps_per_epoch * recipe.repeats, len(self.train[0])
        order = torch.randperm(count, generator=self.progress.generator).to(self.device)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, rows in enumerate(batches(order, self.config.batch)):
            first = (epoch * self.steps_per_epoch + index) * recipe.repeats
            batch = self.batch(rows, memory, step=first, steps=steps)
            for step in range(first, first + recipe.repeats):
                height = share(self.config.schedule, step, steps)
                totals += self.step(recipe, replace(batch, step=step), height) / recipe.repeats
        loss, hits = (self.group.total(totals) / count).tolist()
        _require_finite("loss", [loss], epoch + 1)
        return loss, hits

    def batch(self, rows: Tensor, memory: dict[str, Tensor], *, step: int, steps: int) -> Batch:
        """Return this process's part of the training images ``rows``, augmented, at ``step`` of ``steps``."""
        mine = self.group.mine
        draws = torch.rand(len(rows), 5, generator=self.progress.generator)[mine].to(self.device)
        return Batch(
            model=self.model,
            x=augmented(self.train[0][rows[mine]], self.config.augment, draws),
            y=self.train[1][rows[mine]],
            classes=self.classes,
            generator=self.progress.generator,
            step=step,
            steps=steps,
            smoothing=self.config.smoothing,
            memory=memory,
            whole=len(rows),
            mine=mine,
        )

    def step(self, recipe: Recipe, batch: Batch, height: float) -> Tensor:
        """One optimizer step at ``height`` times the peak rates; return this process's summed loss and hits."""
        config, optimizer = self.config, self.progress.optimizer
        for rate, group in zip(self.rates, optimizer.param_groups, strict=True):
            group["lr"] = rate * height
        optimizer.zero_grad()
        with self._autocast():
            outcome = recipe(batch)
        loss, extra = outcome.loss, penalty(batch, config.penalties, recipe.threat)
        # Every process averages over its own images: weighted so that the mean over processes is the step's.
        weight = len(batch.x) * self.group.size / (batch.whole or len(batch.x))
        ((loss if extra is None else loss + extra) * weight).backward()
        hits = (outcome.logits.argmax(1) == batch.y).sum()
        self.group.average(self.model)
        if config.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip)
        optimizer.step()
        if self.progress.average is not None:
            self.progress.average.update(self.model)
        return torch.stack([loss.detach().double() * len(batch.x), hits.double()])

    def _autocast(self) -> AbstractContextManager[None]:
        wanted, kind = self.config.engine.precision, self.device.type
        low = wanted == "bfloat16" or (wanted == "auto" and kind == "cuda")
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=low)


def batches(order: Tensor, size: int) -> list[Tensor]:
    """Return ``order`` in parts of ``size``; a rest of less than a quarter of that joins the part before.

    So no step sees a single image, whose deviation batch normalisation could not tell, and every process has its share.
    """
    parts = list(order.split(size))
    if len(parts) > 1 and 4 * len(parts[-1]) < size:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _save(place: Path, run: Run) -> None:
    """Write the best weights if the last epoch brought them, then the log and the state to resume from."""
    progress, config = run.progress, run.config
    if progress.best_epoch == progress.epoch:
        metrics = asdict(progress.records[-1])
        meta = {"data": run.data.name, "config": config.to_dict(), "seed": config.seed, "metrics": metrics}
        checkpoint.save(place, run.model, meta, weights=progress.best)
    log(place, progress.records)
    save_progress(place, progress, run.identity)


def _require_finite(what: str, values: Iterable[float], epoch: int) -> None:
    bad = [value for value in values if not math.isfinite(value)]
    if bad:
        raise InvalidModel(
            f"the {what} became {bad[0]} in epoch {epoch}",
            f"finite {what}",
            "a lower --lr, or certify diagnose to see where it began",
        )


def require_trainable(model: nn.Module, data: Dataset) -> None:
    """Raise ``InvalidInput`` unless there are images to train on and the model has an output for each class."""
    if len(data.train_x) == 0 or len(data.val_x) == 0:
        raise InvalidInput(f"{data.name} has no training images", "train and validation images", "add train_images")
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
