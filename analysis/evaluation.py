"""Robust accuracy for certain and under attack, per radius: clean >= attacked >= certified, or an alarm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.arrays import save_arrays
from analysis.records import Evaluation, Outcome, RadiusRow, Rate, SampleRecord
from certify import LpBall, class_margins, prove
from certify.attacks import PGD, Attack
from certify.errors import InvalidInput, InvalidModel, SoundnessAlarm
from certify.graph import trace
from certify.propagate.methods import resolve_method
from certify.rounding import resolve_arithmetic

#: Called with the number of (sample, task) pairs just done.
Tick = Callable[[int], None]
#: Called with a radius, places of samples in their data set, and the worst point met for each.
Keep = Callable[[Fraction, Tensor, Tensor], None]
#: Samples per batch and radius that the attack just broke and that are bounded nevertheless, to check the bounds:
#: those broken by the least, which an unsound bound would certify first.
AUDIT = 16


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is asked of every network alike: perturbations, methods, attack, arithmetic and seed.

    ``radii`` are in the units of x, ascending order is not needed; ``p`` is 1, 2 or inf; ``clip`` the data range.
    One attack per radius serves all ``methods``; without methods nothing is certified. ``arithmetic`` is that of
    ``certify.prove``. Raises ``InvalidInput`` for empty, negative or infinite radii and unknown methods.
    """

    radii: tuple[Fraction, ...]
    p: float = torch.inf
    clip: tuple[float, float] | None = (0.0, 1.0)
    methods: tuple[str, ...] = ("crown",)
    attack: Attack = field(default_factory=PGD)
    arithmetic: str = "float"
    seed: int = 0
    batch: int = 500

    def __post_init__(self) -> None:
        if not self.radii or not all(math.isfinite(radius) and radius >= 0 for radius in self.radii):
            raise InvalidInput(
                f"radii {tuple(map(str, self.radii))}", "finite numbers >= 0", "radii=(Fraction(8, 255),)"
            )
        if self.batch < 1:
            raise InvalidInput(f"batch {self.batch}", "at least 1", "batch=500")
        for method in self.methods:
            resolve_method(method)
        resolve_arithmetic(self.arithmetic, torch.float32)
        object.__setattr__(self, "radii", tuple(sorted({Fraction(radius) for radius in self.radii})))

    @property
    def norm(self) -> str:
        """The norm's name: linf, l2 or l1."""
        return "linf" if self.p == torch.inf else f"l{self.p:g}"

    def ball(self, x: Tensor, radius: Fraction) -> LpBall:
        """Return the perturbations of ``x`` [batch, *shape] within ``radius``."""
        return LpBall(x, radius, self.p, self.clip)

    def generator(self, first: int = 0) -> torch.Generator:
        """Return the random source of the batch that starts at sample ``first``."""
        return torch.Generator().manual_seed(self.seed + first)

    def work(self, samples: int) -> int:
        """Return how many (sample, task) pairs ``evaluate`` ticks off."""
        return samples * len(self.radii) * (1 + len(self.methods))


def evaluate(
    model: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, "n"],
    protocol: Protocol,
    *,
    index: Int[Tensor, "n"] | None = None,
    dump: str | Path | None = None,
    tick: Tick = lambda _: None,
    keep: Keep = lambda *_: None,
) -> Evaluation:
    """Return certified <= attacked <= clean accuracy per radius, over all samples.

    ``y`` are true labels; a misclassified sample counts as not robust. ``index`` are the samples' places in their
    data set (0, 1, ... by default). A sample broken at some radius stays broken at the larger ones, whose sets hold
    its witness. Samples that stand are bounded, and ``AUDIT`` of those that just fell, to check the bounds. ``keep``
    receives the worst points met.

    Raises ``SoundnessAlarm`` if a sample is both certified, in float arithmetic, and attacked, after writing it to
    the folder ``dump``; beside what ``certify.prove`` raises for models and sets that cannot be bounded.
    """
    x, y, classes = fit(model, x, y)
    index = torch.arange(len(x)) if index is None else index
    records: list[SampleRecord] = []
    seconds = {radius: dict.fromkeys(("attack", *protocol.methods), 0.0) for radius in protocol.radii}
    for part in torch.arange(len(x)).split(protocol.batch):
        run = _Batch(model, x[part], y[part], classes, protocol, None if dump is None else Path(dump))
        for radius in protocol.radii:
            run.step(radius, index[part], seconds[radius], tick)
            keep(radius, index[part], run.witness)
        records += run.records(index[part])
    total = len(records)
    return Evaluation(
        clean=Rate(sum(record.correct for record in records), total),
        rows=tuple(_row(records, place, protocol, seconds[radius]) for place, radius in enumerate(protocol.radii)),
        norm=protocol.norm,
        clip=protocol.clip,
        methods=protocol.methods,
        attack=describe(protocol.attack),
        arithmetic=resolve_arithmetic(protocol.arithmetic, x.dtype).name,
        seed=protocol.seed,
        samples=tuple(records),
    )


def fit(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return x and y as the model takes them (its dtype and device), and its number of classes.

    Raises ``InvalidInput`` for empty or mismatched samples and labels outside the classes, and what tracing the
    model raises.
    """
    if len(x) == 0 or len(x) != len(y):
        raise InvalidInput(f"{len(x)} samples with {len(y)} labels", "one label each, at least one sample")
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    x = x if first is None else x.to(first.device, first.dtype)
    graph = trace(model, x[:1])
    shape = graph.shape(graph.output)
    if len(shape) != 1 or shape[0] < 2:
        raise InvalidInput(f"a model with outputs of shape {tuple(shape)}", "one logit per class, at least two classes")
    class_margins(y, shape[0])
    return x, y.to(x.device), shape[0]


def describe(attack: Attack) -> str:
    """Return the attack's name with its numbers of steps and restarts, and what differs from its defaults."""
    options = [(item.name, getattr(attack, item.name), item.default) for item in fields(attack)]  # type: ignore[arg-type]
    shown = [f"{name}={value}" for name, value, default in options if name in ("steps", "restarts") or value != default]
    return f"{type(attack).__name__}({', '.join(shown)})"


class _Batch:
    """One batch under all radii: what fell so far, and the witnesses of it."""

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, classes: int, protocol: Protocol, dump: Path | None
    ) -> None:
        self.model, self.x, self.y, self.protocol, self.dump = model, x, y, protocol, dump
        self.spec = class_margins(y, classes, x.dtype)
        with torch.no_grad():
            outputs = model(x)
        if not bool(torch.isfinite(outputs).all()):
            raise InvalidModel("the model's outputs hold NaN or infinities", "finite outputs", "check weights and data")
        self.predicted = outputs.argmax(1)
        self.margin = self.spec.rows(outputs).amin(1)
        self.right = self.margin > 0  # a tie of the top logits is nobody's class
        self.worst, self.witness = self.margin.clone(), x.clone()
        self.outcomes: list[list[Outcome]] = [[] for _ in x]

    @property
    def standing(self) -> Tensor:
        """The samples that are right and not broken yet."""
        return (self.right & (self.worst >= 0)).nonzero()[:, 0]

    def records(self, index: Tensor) -> list[SampleRecord]:
        """Return the records of the batch's samples, after all steps."""
        columns = (column.tolist() for column in (index, self.y, self.predicted, self.margin))
        facts = zip(*columns, map(tuple, self.outcomes), strict=True)
        return [SampleRecord(*row) for row in facts]

    def step(self, radius: Fraction, index: Tensor, seconds: dict[str, float], tick: Tick) -> None:
        """Attack and bound at a radius not below those before; add the time spent to ``seconds``."""
        before = self.standing
        if len(before):
            seconds["attack"] += _timed(lambda: self._attack(before, radius, int(index[0])))
        tick(len(self.x))
        bounded = self._bounded(before)
        lower: list[dict[str, float | None]] = [dict.fromkeys(self.protocol.methods) for _ in self.x]
        for method in self.protocol.methods:
            if len(bounded):
                start = time.perf_counter()
                bound = self._bound(bounded, radius, method)
                seconds[method] += time.perf_counter() - start
                for sample, value in zip(bounded.tolist(), bound.tolist(), strict=True):
                    lower[sample][method] = value if math.isfinite(value) else None
                self._check(bounded, bound, radius, index, method)
            tick(len(self.x))
        fallen = ~self.right | (self.worst < 0)
        for outcomes, *found in zip(self.outcomes, fallen.tolist(), self.worst.tolist(), lower, strict=True):
            outcomes.append(Outcome(radius, *found))

    def _attack(self, standing: Tensor, radius: Fraction, first: int) -> None:
        ball, spec = self.protocol.ball(self.x[standing], radius), self.spec.take(standing)
        found = self.protocol.attack(self.model, ball, spec, generator=self.protocol.generator(first))
        self.worst[standing] = torch.minimum(self.worst[standing], found.margin.amin(1))
        self.witness[standing] = found.witness

    def _bounded(self, before: Tensor) -> Tensor:
        """Of the samples that stood before the attack: those that still do, and the ones to audit."""
        fallen = before[self.worst[before] < 0]
        audited = fallen[self.worst[fallen].argsort(descending=True)[:AUDIT]]
        return torch.cat([self.standing, audited]).sort().values

    def _bound(self, samples: Tensor, radius: Fraction, method: str) -> Tensor:
        """The certified lower bound of the smallest margin; the attack is over, so none is given."""
        ball, spec = self.protocol.ball(self.x[samples], radius), self.spec.take(samples)
        proof = prove(self.model, ball, spec, method, arithmetic=self.protocol.arithmetic)
        return proof.margin.lower.amin(1)

    def _check(self, samples: Tensor, bound: Tensor, radius: Fraction, index: Tensor, method: str) -> None:
        """Stop the run where a certified sample was attacked: one of the two answers is wrong."""
        wrong = (bound > 0) & (self.worst[samples] < 0)
        if self.protocol.arithmetic != "float" or not bool(wrong.any()):
            return  # real-number bounds may differ from float networks by their rounding; the witness counts
        sample = int(samples[wrong.nonzero()[0, 0]])
        place = int(index[sample])
        saved = "no folder was given for the sample"
        if self.dump is not None:
            saved = f"the sample is in {self._dump(sample, place, radius, method)}"
        raise SoundnessAlarm(
            f"sample {place} is both certified by {method} and attacked at radius {radius}",
            "certified <= attacked: one of the two is wrong, and the run stops",
            f"report it as a bug; {saved}",
        )

    def _dump(self, sample: int, place: int, radius: Fraction, method: str) -> Path:
        assert self.dump is not None
        facts = {"label": int(self.y[sample]), "index": place, "radius": float(radius), "p": self.protocol.p}
        points = {"image": self.x[sample].cpu().numpy(), "witness": self.witness[sample].cpu().numpy()}
        return save_arrays(self.dump / f"alarm-{place}.npz", {**points, **facts, "method": method})


def _row(records: list[SampleRecord], place: int, protocol: Protocol, seconds: dict[str, float]) -> RadiusRow:
    found = [record.outcomes[place] for record in records]
    certified = {
        method: Rate(sum(outcome.certified(method) for outcome in found), len(found)) for method in protocol.methods
    }
    return RadiusRow(
        protocol.radii[place], Rate(sum(not outcome.attacked for outcome in found), len(found)), certified, seconds
    )


def _timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
