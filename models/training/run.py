"""One training run: its epochs and steps, on one device, for every recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from certify.attacks import FGSM
from certify.errors import InvalidInput, InvalidModel
from models.data import Dataset, subset
from models.kaf import fuse
from models.training.adversarial import PGDTraining
from models.training.augment import augmented
from models.training.average import Average
from models.training.config import TrainConfig
from models.training.gradients import gradient_norms
from models.training.group import Group
from models.training.optimizers import optimizer_for
from models.training.penalty import penalty
from models.training.recipe import Batch, Recipe
from models.training.records import EpochRecord, Status, overfits
from models.training.resume import Progress, identity_of
from models.training.schedule import share
from models.training.validation import PROBE, accuracy, certified_accuracy, robust_accuracy


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


def _require_finite(what: str, values: Iterable[float], epoch: int) -> None:
    bad = [value for value in values if not math.isfinite(value)]
    if bad:
        raise InvalidModel(
            f"the {what} became {bad[0]} in epoch {epoch}",
            f"finite {what}",
            "a lower --lr, or certify diagnose to see where it began",
        )
