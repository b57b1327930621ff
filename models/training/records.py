"""What a training run recorded, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch: mean loss and accuracy on what was trained on, accuracies on validation images.

    ``val_robust`` is the accuracy under PGD at the recipe's radius, ``val_certified`` that proved by interval bounds
    (None where the recipe asks for neither). ``recipe`` is the one in force; ``gradients`` are the norms by layer on
    one batch of validation images. ``score`` decides which weights are kept.
    """

    epoch: int
    recipe: str
    loss: float
    train_accuracy: float
    val_accuracy: float
    val_robust: float | None = None
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


def overfits(records: Sequence[EpochRecord]) -> bool:
    """Whether the last epoch shows catastrophic overfitting: a recipe good at its own attack and at no other.

    Accuracy under PGD fell to less than half of the best before, while accuracy on what was trained on did not fall.
    Reference: Wong, Rice, Kolter (2020), section 5.4, who met it and stopped there.
    """
    if len(records) < 2 or records[-1].val_robust is None:
        return False
    *before, last = records
    best = max(record.val_robust or 0.0 for record in before)
    held = last.train_accuracy >= before[-1].train_accuracy - 0.02
    return best >= 0.1 and last.val_robust is not None and last.val_robust < best / 2 and held
