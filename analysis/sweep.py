"""A sweep: networks x activations x recipes x seeds, each trained, attacked and certified alike, in one table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from analysis.evaluation import Protocol, evaluate
from analysis.plain import Record
from analysis.records import Evaluation, Rate
from certify.attacks import PGD
from certify.errors import InvalidFile, InvalidInput, InvalidModel, UnsupportedOperation
from models.data import Dataset, subset
from models.files import read_json, write
from models.networks import architecture, build, said_elsewhere
from models.training import TrainConfig, train
from models.training.config import MOST_SEED, load_toml
from models.training.fields import between, exact_radius, read
from models.training.recipe import NORMS
from models.training.records import OnEpoch

#: The sweeps that come with the package, by name.
SHIPPED = Path(__file__).parent / "sweeps"

#: What says the options of a network that its table must not say.
SAID_BY = {"activation": "activations", "input_shape": "data", "classes": "data", "sizes": "hidden"}


@dataclass(frozen=True, kw_only=True)
class Judge:
    """How every trained network is judged, on ``samples`` random test images (all where there are fewer)."""

    radii: tuple[str, ...]
    norm: str = "linf"
    steps: int = 50
    restarts: int = 10
    step: float | None = None
    samples: int = 1000
    methods: tuple[str, ...] = ()
    seed: int = 0

    def protocol(self) -> Protocol:
        """Return it as the protocol of ``analysis.evaluation``. Raises ``InvalidInput`` for what cannot be meant."""
        radii = tuple(exact_radius(radius) for radius in self.radii)
        _once("radii", radii)
        between("judge.seed", self.seed, 0, MOST_SEED)
        if self.norm not in NORMS or self.samples < 1:
            raise InvalidInput(f"norm {self.norm}, {self.samples} samples", "linf, l2 or l1 and at least one sample")
        attack = PGD(steps=self.steps, restarts=self.restarts, step=self.step)
        return Protocol(radii=radii, p=NORMS[self.norm], methods=self.methods, attack=attack, seed=self.seed)


@dataclass(frozen=True)
class Cell(Record):
    """One network to train."""

    network: str
    activation: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.network}-{self.activation}-{self.recipe}-{self.seed}"


@dataclass(frozen=True)
class Result(Record):
    """What came of one network; the rates are None where training failed, which ``status`` then explains.

    ``attacked`` and ``certified`` (by any method) are in the order of the judge's radii. Of a network that
    certification refuses nothing is certified: ``status`` says why.
    """

    cell: Cell
    status: str
    best_epoch: int
    epochs: int
    overfitted: tuple[int, ...]
    seconds: float
    clean: Rate | None
    attacked: tuple[Rate, ...]
    certified: tuple[Rate, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A plan: ``networks`` and ``recipes`` by name with their options, and how all are judged.

    A recipe's options are those of a training config; ``train`` holds those that recipes share.
    """

    title: str
    data: str
    activations: tuple[str, ...]
    networks: dict[str, dict[str, Any]]
    recipes: dict[str, dict[str, Any]]
    judge: Judge
    seeds: tuple[int, ...] = (0,)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.activations and self.networks and self.recipes and self.seeds):
            raise InvalidInput(f"the sweep {self.title!r} without networks", "activations, networks, recipes, seeds")
        _once("activations", self.activations)
        _once("seeds", self.seeds)
        self.judge.protocol()
        for recipe in self.recipes:
            for seed in self.seeds:
                self.config(recipe, seed)

    @property
    def cells(self) -> list[Cell]:
        """All networks, the seeds of one beside each other."""
        return [
            Cell(network, activation, recipe, seed)
            for network in self.networks
            for recipe in self.recipes
            for activation in self.activations
            for seed in self.seeds
        ]

    def config(self, recipe: str, seed: int) -> TrainConfig:
        """Return the training config of a recipe."""
        tables = _merged(self.train, self.recipes[recipe])
        return TrainConfig.from_dict(tables | {"seed": seed})

    def architecture(self, cell: Cell, data: Dataset) -> dict[str, Any]:
        """Return what ``models.networks.build`` makes of a cell; an option ``network`` names another than the key."""
        said_elsewhere(self.networks[cell.network], SAID_BY)
        options = {"mean": list(data.mean), "std": list(data.std), **self.networks[cell.network]}
        network = options.pop("network", cell.network)
        return architecture(network, data.input_shape, data.classes, cell.activation, **options)

    def identity(self, cell: Cell, data: Dataset, images: str) -> str:
        """Return a hash of all that decides a cell's result; ``images`` is one of the data's images and labels."""
        config = self.config(cell.recipe, cell.seed).to_dict()
        facts = {
            "architecture": self.architecture(cell, data),
            "config": {key: value for key, value in config.items() if key != "engine"},
            "judge": vars(self.judge),
            "data": [data.name, images],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=list).encode()).hexdigest()


def load_sweep(source: str | Path, changes: Mapping[str, Any] | None = None) -> Sweep:
    """Return the sweep of a TOML file, or one that comes with the package by its name; ``changes`` are merged in.

    Raises ``InvalidFile`` for a file that cannot be read, ``InvalidInput`` for what it says.
    """
    shipped = SHIPPED / f"{source}.toml"
    tables = _merged(load_toml(shipped if shipped.is_file() else source), changes or {})
    return read(Sweep, tables)


def run(sweep: Sweep, data: Dataset, folder: Path, on_epoch: OnEpoch | None = None) -> Iterator[Result]:
    """Yield the result of every cell, in order; those that ``folder`` holds already are read, the rest is computed.

    A cell that was interrupted goes on where it stood. Training that fails, as by a loss that is no longer finite, is
    a result too, and so is a network that certification refuses. Raises ``InvalidInput`` for networks that cannot be
    built, before any is trained, ``InvalidFile`` for a folder that holds another sweep's results,
    ``KeyboardInterrupt``.
    """
    for cell in {(cell.network, cell.activation): cell for cell in sweep.cells}.values():
        build(sweep.architecture(cell, data), seed=cell.seed)
    images = data.digest()
    for cell in sweep.cells:
        place, identity = folder / cell.name, sweep.identity(cell, data, images)
        if (place / "result.json").exists():
            found = read_json(place / "result.json")
            if found.get("identity") != identity:
                raise InvalidFile(
                    f"{place} holds a result of another sweep", "the settings that it was made with", "another --out"
                )
            yield Result.from_dict(found["result"])
            continue
        result = _run(sweep, cell, data, place, on_epoch)
        text = json.dumps({"identity": identity, "result": result.to_dict()}, indent=1, allow_nan=False)
        write({place / "result.json": text.encode()})
        yield result


def _run(sweep: Sweep, cell: Cell, data: Dataset, place: Path, on_epoch: OnEpoch | None) -> Result:
    """Train and judge one cell."""
    model = build(sweep.architecture(cell, data), seed=cell.seed)
    config = sweep.config(cell.recipe, cell.seed)
    resume = (place / "resume.safetensors").exists()
    try:
        trained = train(model, data, config, directory=place, resume=resume, on_epoch=on_epoch)
        if trained.status == "interrupted":
            raise KeyboardInterrupt
        found, refusal = _judged(sweep.judge, trained.model, data, place)
    except (InvalidModel, UnsupportedOperation) as error:  # not finite, or a recipe without its bounds
        return Result(cell, f"failed: {error.got}", 0, 0, (), 0.0, None, (), ())
    order = [row.radius for row in found.rows]  # an evaluation's radii grow, the judge's are in any order
    places = [order.index(exact_radius(radius)) for radius in sweep.judge.radii]
    held = [sum(sample.outcomes[place].verdict == "holds" for sample in found.samples) for place in places]
    return Result(
        cell=cell,
        status=f"{trained.status}, not certified: {refusal}" if refusal else trained.status,
        best_epoch=trained.best_epoch,
        epochs=len(trained.records),
        overfitted=trained.overfitted,
        seconds=sum(record.seconds for record in trained.records),
        clean=found.clean,
        attacked=tuple(found.rows[place].attacked for place in places),
        certified=tuple(Rate(count, found.count) for count in held) if sweep.judge.methods else (),
    )


def _judged(judge: Judge, model: nn.Module, data: Dataset, place: Path) -> tuple[Evaluation, str]:
    """What the judge finds, and why certification refuses the network, which is attacked all the same (else "")."""
    x, y, index = subset(data.test_x, data.test_y, min(judge.samples, len(data.test_x)), judge.seed)
    protocol = judge.protocol()
    try:
        return evaluate(model, x, y, protocol, index=index, dump=place), ""
    except UnsupportedOperation as error:
        return evaluate(model, x, y, replace(protocol, methods=()), index=index, dump=place), error.got


def _once(name: str, values: Sequence[object]) -> None:
    """Raise ``InvalidInput`` for a value that is there twice, and would be counted twice."""
    if len(set(values)) < len(values):
        raise InvalidInput(
            f"{name} {', '.join(map(str, values))}", "each of them once", "leave out what is there twice"
        )


def _merged(tables: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables with those of ``changes`` going before."""
    found = dict(tables)
    for key, value in changes.items():
        below = found.get(key)
        found[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return found
