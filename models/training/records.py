"""What a training run recorded, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import nn


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch: mean loss and accuracy on what was trained on, accuracies on validation images.

    ``val_robust`` is the accuracy under PGD at the recipe's radius, ``val_step`` that under a single gradient step,
    where the recipe trains with one, ``val_certified`` that proved by interval bounds (None where not asked for).
    ``recipe`` is the one in force; ``gradients`` are the norms by layer on one batch of validation images. ``score``
    decides which weights are kept.
    """

    epoch: int
    recipe: str
    loss: float
    train_accuracy: float
    val_accuracy: float
    val_robust: float | None = None
    val_step: float | None = None
    val_certified: float | None = None
    lr: float
    seconds: float
    images_per_second: float
    gradients: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The mean of clean validation accuracy and the certified one, else the robust one, where there is one."""
        second = self.val_robust if self.val_certified is None else self.val_certified
        return self.val_accuracy if second is None else (self.val_accuracy + second) / 2


#: Accuracy under a single step below which a network has not learned enough to be judged.
LEARNED = 0.2

Status = Literal["finished", "stopped early", "interrupted", "overfitted"]
OnEpoch = Callable[[EpochRecord], None]


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """The network with its best weights by validation, in eval mode, and how it got them.

    ``best_epoch`` counts from 1; 0 means that training was interrupted before the first epoch ended. ``overfitted``
    lists the epochs after which the recipe was found to have overfitted to its own attack.
    """

    model: nn.Module
    records: tuple[EpochRecord, ...]
    best_epoch: int
    status: Status
    seconds: float
    overfitted: tuple[int, ...] = ()


def overfits(record: EpochRecord) -> bool:
    """Whether an epoch shows catastrophic overfitting: images that withstand one gradient step fall to several.

    That is: under PGD less than half as many validation images stay right as under a single step of the same length.
    Reference: Wong, Rice, Kolter (2020), section 5.4, who met it and stopped there.
    """
    step, robust = record.val_step, record.val_robust
    return step is not None and robust is not None and step >= LEARNED and robust < step / 2
