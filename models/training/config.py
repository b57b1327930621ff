"""What decides a training run beside network and data: one frozen value, read from TOML, kept in the checkpoint."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from certify.errors import InvalidFile, InvalidInput, unknown_name
from models.training.adversarial import Standard
from models.training.fields import between, known, read
from models.training.recipe import RECIPES, Recipe

#: The largest seed that torch's generators and ours both take.
MOST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights follow gradients: "sgd" (Nesterov), "adam" or "adamw" (decoupled weight decay).

    ``lr`` is the peak of the schedule. KAF parameters get ``kaf_lr`` times that and no weight decay. ``clip`` bounds
    the l2 norm of the whole gradient. ``average`` is the decay of an exponential moving average of the weights (EMA),
    which is then what is validated and kept; 0.999 is usual.
    """

    name: str = "adam"
    lr: float = 5e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    kaf_lr: float = 1.0
    clip: float | None = None
    average: float | None = None

    def __post_init__(self) -> None:
        known("optimizer", self.name, ("sgd", "adam", "adamw"))
        for name in ("lr", "weight_decay", "kaf_lr"):
            between(name, getattr(self, name), 0, math.inf)
        between("momentum", self.momentum, 0, 0.9999)
        if self.clip is not None:
            between("clip", self.clip, 1e-12, math.inf)
        if self.average is not None:
            between("average", self.average, 0, 0.999999)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate's share of its peak: "one-cycle" (a triangle), "cosine" or "constant".

    ``rise`` is the share of the steps on which it rises linearly.
    """

    name: str = "one-cycle"
    rise: float = 0.3

    def __post_init__(self) -> None:
        known("schedule", self.name, ("one-cycle", "cosine", "constant"))
        between("rise", self.rise, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to training images: ``crop`` pads by so many pixels and cuts back, ``flip`` mirrors half of them,
    ``cutout`` blanks a square of that side."""

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        between("crop", self.crop, 0, 1024)
        between("cutout", self.cutout, 0, 1024)


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """What is added to the loss, each times its weight; 0 leaves it out.

    ``lipschitz``: sum of certified layer norms. ``slope`` and ``curvature``: mean certified max |f'| and max |f''| of
    the KAFs. ``gradalign``: 1 - cos of the input gradients at the image and at a random point of its ball
    (Andriushchenko, Flammarion, "Understanding and improving fast adversarial training", 2020, equation 5).
    """

    lipschitz: float = 0.0
    slope: float = 0.0
    curvature: float = 0.0
    gradalign: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            between(name, value, 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is looked at after every epoch, on ``images`` random validation images.

    ``patience`` stops after that many epochs without a better score. ``overfitting`` says what happens when fast
    training overfits to its own attack, which PGD on these images shows: "switch" goes back to the best weights and on
    with PGD training, "stop" ends there, "report" only says so. ``certify`` bounds them too; recipes that train on
    bounds always do.
    """

    images: int = 500
    patience: int | None = None
    overfitting: str = "switch"
    certify: bool = False

    def __post_init__(self) -> None:
        between("images", self.images, 1, math.inf)
        if self.patience is not None:
            between("patience", self.patience, 1, math.inf)
        known("answer to overfitting", self.overfitting, ("switch", "stop", "report"))


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where and how it is computed, without a part in the result beyond rounding.

    ``compile``: "none"; "kaf" fuses the KAFs' kernels (``models.fuse``); "model" compiles the network's forward and
    backward passes. ``precision``: "auto" is bfloat16 autocast on a GPU, float32 elsewhere.
    """

    device: str = "auto"
    compile: str = "none"
    precision: str = "auto"

    def __post_init__(self) -> None:
        known("device", self.device, ("auto", "cpu", "cuda"))
        known("compile mode", self.compile, ("none", "kaf", "model"))
        known("precision", self.precision, ("auto", "float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a training run beside network and data; equal ones give equal weights on one CPU.

    ``recipe`` is what is trained on (``certify ops`` lists them), ``smoothing`` that of the labels. Raises
    ``InvalidInput`` for values that cannot be meant.
    """

    epochs: int = 20
    batch: int = 128
    seed: int = 0
    smoothing: float = 0.0
    recipe: Recipe = field(default_factory=Standard)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    augment: Augment = field(default_factory=Augment)
    penalties: Penalties = field(default_factory=Penalties)
    watch: Watch = field(default_factory=Watch)
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        between("epochs", self.epochs, 1, math.inf)
        between("batch", self.batch, 1, math.inf)
        between("seed", self.seed, 0, MOST_SEED)
        between("smoothing", self.smoothing, 0, 1)
        if self.penalties.gradalign and self.recipe.threat is None:
            raise InvalidInput("gradalign without a radius", "an adversarial recipe", "--method fast --radius 8/255")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON and TOML; options that are None are left out."""
        return {**_plain(asdict(self)), "recipe": self.recipe.to_dict()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> TrainConfig:
        """Return the config that plain data describes: ``to_dict``'s, or less. Raises ``InvalidInput``."""
        recipe = given.get("recipe", {})
        if not isinstance(recipe, Mapping):
            raise InvalidInput(f"recipe = {recipe!r}", "a table with a name", 'recipe = {name = "fast", radius = 0.1}')
        name = recipe.get("name", Standard.name)
        if not isinstance(name, str) or name not in RECIPES:
            raise unknown_name("recipe", name, RECIPES)
        options = {key: value for key, value in recipe.items() if key != "name"}
        if options and not fields(RECIPES[name]):  # type: ignore[arg-type]  # all are dataclasses
            got = f"{', '.join(options)} for the recipe {name!r}, which takes no options"
            raise InvalidInput(got, "a recipe that has such options", "--method fast, pgd, ... (see `certify ops`)")
        rest = {key: value for key, value in given.items() if key != "recipe"}
        return read(cls, rest, recipe=read(RECIPES[name], options, where="recipe"))


def load_config(path: str | Path) -> TrainConfig:
    """Return the config of a TOML file: tables [recipe], [optimizer], ... with the fields of the classes above.

    Raises ``InvalidFile`` for a file that cannot be read, ``InvalidInput`` for what it says.
    """
    return TrainConfig.from_dict(load_toml(path))


def load_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file; raises ``InvalidFile`` if it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise InvalidFile(f"cannot read {path}: {reason}", "a TOML file", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidFile(f"{path} is not TOML: {error}", "lines such as: epochs = 20", "check that line") from None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without None, which TOML lacks, at every depth."""
    return {
        key: _plain(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }
