"""What a recipe is: how one batch becomes a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from certify.sets import LpBall
from models.training.fields import between, known

NORMS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
#: Images live here; every adversarial image does too.
CLIP = (0.0, 1.0)


@dataclass(frozen=True)
class Threat:
    """What is trained and judged against: perturbations of images in [0, 1] up to ``radius`` in ``norm``."""

    radius: float
    norm: str = "linf"

    def __post_init__(self) -> None:
        between("radius", self.radius, 1e-12, 1e6)
        known("norm", self.norm, NORMS)

    def ball(self, x: Float[Tensor, "batch *shape"], share: float = 1.0) -> LpBall:
        """Return the balls around ``x``, of ``share`` of the radius."""
        return LpBall(x, share * self.radius, NORMS[self.norm], CLIP)


@dataclass(frozen=True, eq=False)
class Batch:
    """One step of training, as a recipe sees it.

    It is step ``step`` of ``steps``; ``memory`` is what a recipe keeps from step to step of an epoch. Of the ``whole``
    images of the step this process holds those at ``mine``.
    """

    model: nn.Module
    x: Float[Tensor, "batch *shape"]
    y: Int[Tensor, "batch"]
    classes: int
    generator: torch.Generator
    step: int = 0
    steps: int = 1
    smoothing: float = 0.0
    memory: dict[str, Tensor] = field(default_factory=dict)
    whole: int | None = None
    mine: slice = field(default_factory=lambda: slice(None))

    @property
    def done(self) -> float:
        """The share of all steps that are behind it."""
        return self.step / self.steps

    def loss(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
        """Return the mean cross-entropy with the true labels, smoothed as configured."""
        return F.cross_entropy(logits, self.y, label_smoothing=self.smoothing)

    def uniform(self) -> Float[Tensor, "batch *shape"]:
        """Return noise in [-1, 1] of the shape of ``x``.

        Drawn for the whole step on the generator's device: as many processes as there are, and whatever device they
        use, a seed gives the same noise.
        """
        shape = (len(self.x) if self.whole is None else self.whole, *self.x.shape[1:])
        draws = torch.rand(shape, generator=self.generator, dtype=self.x.dtype, device=self.generator.device)
        return draws[self.mine].to(self.x.device) * 2 - 1


@dataclass(frozen=True, eq=False)
class Outcome:
    """The loss to descend, and logits of what was trained on, for the accuracy."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "batch classes"]


class Recipe(ABC):
    """A way to train. Authors write a frozen dataclass with a ``__call__`` and register it under a name."""

    name: ClassVar[str]
    #: Whether it trains on certified bounds: validation then bounds too.
    certified: ClassVar[bool] = False
    #: Whether its attack is a single step, to which a network can overfit: the watch then looks for that.
    one_step: ClassVar[bool] = False

    @property
    def threat(self) -> Threat | None:
        """What validation attacks with (none for standard training)."""
        return None

    @property
    def repeats(self) -> int:
        """Steps taken on every batch."""
        return 1

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the options that are set, as plain data."""
        options = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return {"name": self.name, **{key: value for key, value in options.items() if value is not None}}

    @abstractmethod
    def __call__(self, batch: Batch) -> Outcome:
        """Return the loss of a batch; the model is in train mode and must be left so."""


RECIPES: dict[str, type[Recipe]] = {}

T = TypeVar("T", bound=type[Recipe])


def register_recipe(name: str) -> Callable[[T], T]:
    """Register a recipe under the name that configs and the command line use."""

    def register(kind: T) -> T:
        kind.name = name
        RECIPES[name] = kind
        return kind

    return register
