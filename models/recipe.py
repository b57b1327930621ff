"""How to train: the recipe, what one epoch recorded, and the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from certify.errors import InvalidInput, unknown_name

METHODS = ("standard", "fast", "pgd")
OPTIMIZERS = ("sgd", "adam")
NORMS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a training run beside network and data; equal recipes give equal weights.

    ``method`` is "standard", "fast" (one gradient step of 1.25 radius from a random start) or "pgd"
    (``steps`` of ``step_size``, None for 2.5 radius / steps). ``radius`` is in the units of images in [0, 1].
    ``lr`` is the peak of the one-cycle schedule; KAF parameters get ``kaf_lr`` times that and no weight
    decay. ``patience`` stops after that many epochs without a better validation score. Raises
    ``InvalidInput`` for values that cannot be meant.
    """

    epochs: int = 20
    batch: int = 128
    optimizer: str = "adam"
    lr: float = 5e-3
    kaf_lr: float = 1.0
    weight_decay: float = 0.0
    method: str = "standard"
    radius: float = 0.0
    norm: str = "linf"
    steps: int = 7
    step_size: float | None = None
    seed: int = 0
    device: str = "auto"
    patience: int | None = None

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("method", self.method, METHODS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("norm", self.norm, NORMS),
            ("device", self.device, DEVICES),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)
        for name, smallest in (("epochs", 1), ("batch", 1), ("steps", 1), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InvalidInput(f"{name} = {value}", f"at least {smallest}", f"--{name} {smallest} or more")
        for name in ("lr", "kaf_lr", "weight_decay", "radius"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidInput(f"{name} = {value}", "a finite number >= 0", f"leave {name} out")
        if self.method != "standard" and self.radius == 0:
            raise InvalidInput(f"method {self.method!r} at radius 0", "a radius > 0", "--radius 0.1")
        if self.method == "fast" and self.norm == "l1":
            raise InvalidInput("fast training in l1", "linf or l2", "method='pgd' for l1")

    @property
    def p(self) -> float:
        """The norm's exponent."""
        return NORMS[self.norm]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: mean loss and accuracy on what was trained on, accuracies on the validation split.

    ``val_robust`` is the accuracy under PGD at the recipe's radius (None for standard training): it falls to
    0 when fast training overfits to its own attack. ``score`` decides which weights are kept.
    """

    epoch: int
    loss: float
    train_accuracy: float
    val_accuracy: float
    val_robust: float | None
    lr: float
    seconds: float

    @property
    def score(self) -> float:
        """Clean validation accuracy; its mean with the robust one where there is one."""
        return self.val_accuracy if self.val_robust is None else (self.val_accuracy + self.val_robust) / 2


Status = Literal["finished", "stopped early", "interrupted"]
OnEpoch = Callable[[EpochRecord], None]


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """The network with its best weights by validation, in eval mode, and how it got them.

    ``best_epoch`` counts from 1; 0 means that training was interrupted before the first epoch ended.
    """

    model: nn.Module
    records: tuple[EpochRecord, ...]
    best_epoch: int
    status: Status
    seconds: float
