"""Whether an attack's numbers about a network can be trusted: known signs of masked gradients and weak attacks.

Each check has a verdict and its evidence. Flagged does not mean fragile, and passed does not mean robust: it says
whether "survived the attack" is worth anything here.
References: Croce, Hein, AutoAttack (2020), its five flags; Carlini et al., "On evaluating adversarial robustness"
(2019), section 3 and its checklist; Athalye, Carlini, Wagner, "Obfuscated gradients ..." (2018), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from analysis.evaluation import fit
from analysis.plain import Record
from analysis.protocol import Protocol
from certify import Box, LpBall, class_margins
from certify.attacks import APGD, APGDT, FGSM, PGD, RFGSM, Adaptive, Attack, Ensemble, Square, Transfer
from certify.attacks.adaptive import sloped
from certify.attacks.base import Objective, evaluating
from certify.attacks.losses import cross_entropy, margin
from certify.draws import Draws
from certify.errors import InvalidInput
from certify.notebook import table
from certify.sets import PerturbationSet

#: Images by which one attack may beat another by luck: one, or this share of them. On honest, adversarially trained
#: networks a black box still finds 1 % that strong white boxes miss (MNIST CNN-A at .3: 2 of 195 images).
LUCK = 0.02
#: Steps and restarts over which robust accuracy must level off, and by how much the last doubling may still lower it.
STEPS, RESTARTS, LEVEL = (10, 20, 40, 80, 160), (1, 2, 4, 8), 0.02
#: Random directions that a step along the gradient must beat, and on which share of the images.
DIRECTIONS, BEATEN = 10, 0.9
#: Images attacked together.
TOGETHER = 250
#: Images below which one image more or less decides: an audit of fewer is no evidence.
FEW = 50
#: Share of images with a gradient of exactly 0 beyond which gradients say nothing.
VANISHED = 0.01


@dataclass(frozen=True)
class Finding(Record):
    """One check: ``verdict`` is "passed", "flagged" or "not run"; ``evidence`` a sentence with the numbers."""

    check: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Audit(Record):
    """All findings about one network at one radius, on ``count`` correctly classified images.

    ``enough``: below ``FEW`` images nothing that is not flagged means anything.
    """

    radius: Fraction
    norm: str
    count: int
    findings: tuple[Finding, ...]
    derived: ClassVar[tuple[str, ...]] = ("trusted", "enough")

    @property
    def trusted(self) -> bool:
        """Whether no check was flagged."""
        return all(finding.verdict != "flagged" for finding in self.findings)

    @property
    def enough(self) -> bool:
        """Whether there were images enough for the checks to notice anything."""
        return self.count >= FEW

    def _repr_html_(self) -> str:
        caption = f"Audit at radius {self.radius} ({self.norm}), {self.count} images"
        rows = [(finding.check, finding.verdict, finding.evidence) for finding in self.findings]
        return table(caption, ("check", "verdict", "evidence"), rows)


def audit(
    model: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, "n"],
    protocol: Protocol,
    *,
    radius: Fraction,
    index: Int[Tensor, "n"] | None = None,
    surrogate: nn.Module | None = None,
) -> Audit:
    """Return what speaks for and against trusting attacks on ``model`` at ``radius``.

    Images that the model has wrong are left out. ``index`` are the images' places in their data set (0, 1, ... by
    default): they seed the attacks. ``surrogate`` is another network with the same inputs and classes, for the transfer
    attack. Raises ``InvalidInput`` for radius 0, and where no image is left.
    """
    if radius <= 0:
        raise InvalidInput(f"an audit at radius {radius}", "a radius above 0", "the radius that attacks are judged at")
    x, y, classes = fit(model, x, y)
    if surrogate is not None:
        theirs, _, outputs = fit(surrogate, x, y)
        if outputs != classes or theirs.dtype != x.dtype:
            got = f"a surrogate of {outputs} classes in {theirs.dtype}"
            raise InvalidInput(got, f"{classes} classes in {x.dtype}", "a network of the same task and precision")
    places = torch.arange(len(x)) if index is None else index
    with evaluating(model), torch.no_grad():
        right = (class_margins(y, classes, x.dtype).rows(model(x)) > 0).all(1).nonzero()[:, 0]
    if len(right) == 0:
        raise InvalidInput(f"none of {len(x)} images is classified right", "at least one", "more images, or training")
    seeds = protocol.seeds(places[right.cpu()])
    case = _Case(model, x[right], y[right], classes, protocol, radius, surrogate, seeds)
    with evaluating(model):
        findings = tuple(check(case) for check in CHECKS)
    return Audit(radius, protocol.norm, len(right), findings)


@dataclass(frozen=True, eq=False)
class _Case:
    """What all checks look at; attacks that several of them need are run once."""

    model: nn.Module
    x: Tensor
    y: Tensor
    classes: int
    protocol: Protocol
    radius: Fraction
    surrogate: nn.Module | None
    seeds: Int[Tensor, "n"]

    @cached_property
    def ball(self) -> LpBall:
        return self.protocol.ball(self.x, self.radius)

    @cached_property
    def white(self) -> Bool[Tensor, "n"]:
        """What falls to attacks that use the gradients as they are."""
        return self.broken(Ensemble(attacks=(PGD(restarts=2), APGD(), APGDT(targets=min(9, self.classes - 1)))))

    def broken(self, attack: Attack, domain: PerturbationSet | None = None) -> Bool[Tensor, "n"]:
        """Where the attack succeeds; the same seed every time."""
        spec = class_margins(self.y, self.classes, self.x.dtype)
        domain = self.ball if domain is None else domain
        parts = torch.arange(len(self.x)).split(TOGETHER)
        return torch.cat(
            [attack(self.model, domain.take(p), spec.take(p), generator=self.seeds[p]).success for p in parts]
        )

    def lucky(self, count: int) -> bool:
        """Whether so many images are no more than luck."""
        return count <= max(1, LUCK * len(self.x))


def _random_output(case: _Case) -> Finding:
    """The same image must give the same outputs, alone and in company."""
    with torch.no_grad():
        once, again = case.model(case.x), case.model(case.x)
        alone = torch.cat([case.model(part) for part in case.x[:8].split(1)])
    scale = float(once.abs().mean()) + 1e-12
    moved, company = float((once - again).abs().max()) / scale, float((once[:8] - alone).abs().max()) / scale
    evidence = f"outputs differ by {moved:.1e} of their size when asked twice, by {company:.1e} alone and in a batch"
    return _found("randomised output", moved > 1e-4 or company > 1e-2, evidence)


def _softmax_output(case: _Case) -> Finding:
    """Probabilities saturate, and with them every gradient: attacks need logits."""
    with torch.no_grad():
        outputs = case.model(case.x)
    sums = bool(((outputs.sum(1) - 1).abs() < 1e-4).all())
    evidence = f"outputs lie in [{float(outputs.min()):.3g}, {float(outputs.max()):.3g}]"
    if sums and float(outputs.min()) >= 0:
        return _found("softmax output", True, f"{evidence} and sum to 1: attack the logits before the softmax")
    return _found("softmax output", False, f"{evidence} and do not sum to 1")


def _zero_gradients(case: _Case) -> Finding:
    """A gradient of exactly 0 leads nowhere."""
    spec, objective = class_margins(case.y, case.classes, torch.float64), Objective(case.model)
    places = (case.x, case.ball.sample(1, case.seeds)[0])
    gone = [(objective.gradient(point, spec, cross_entropy)[1] == 0).flatten(1).all(1) for point in places]
    share = float(torch.cat(gone).double().mean())
    evidence = f"{100 * share:.1f} % of the gradients, at the images and at random points around, are exactly 0"
    return _found("zero gradients", share > VANISHED, evidence)


def _inference_optimises(case: _Case) -> Finding:
    """A network that computes gradients while it answers is no fixed function of its input."""
    with _counted_gradients() as calls, torch.no_grad():
        case.model(case.x[:2])
    return _found("optimisation at inference", bool(calls), f"the forward pass computed gradients {len(calls)} times")


def _single_step(case: _Case) -> Finding:
    """Many steps must break what one step breaks."""
    once = case.broken(FGSM()) | case.broken(RFGSM())
    only, many = int((once & ~case.white).sum()), int(case.white.sum())
    evidence = f"one step breaks {int(once.sum())} images, many steps {many}; {only} fall to one step alone"
    return _found("iterative at least as strong as single step", not case.lucky(only), evidence)


def _black_box(case: _Case) -> Finding:
    """A search without gradients must not find what gradients miss."""
    return _against_white(case, "black box no stronger than white box", "Square, which sees no gradients,", Square())


def _adaptive(case: _Case) -> Finding:
    """Other slopes for the activations must not find what the real ones miss."""
    words = "an attack with replaced slopes (secants, SiLU, mean over neighbours)"
    with sloped(case.model, lambda _, __, output: output) as modules:
        if modules == 0:
            words = "an attack with the mean gradient over neighbours (no known activation module to replace)"
    return _against_white(case, "replaced gradients no stronger", words, Adaptive())


def _transfer(case: _Case) -> Finding:
    """What breaks another network must not break what the white box leaves whole."""
    name = "transfer no stronger than white box"
    if case.surrogate is None:
        return Finding(name, "not run", "no surrogate was given")
    return _against_white(case, name, "what the surrogate falls to", Transfer(surrogate=case.surrogate))


def _unbounded(case: _Case) -> Finding:
    """Without a bound on the change, everything must fall."""
    low, high = case.protocol.clip or (float(case.x.min()) - 10, float(case.x.max()) + 10)
    everything = Box(torch.full_like(case.x, low), torch.full_like(case.x, high))
    whole = int((~case.broken(PGD(steps=100, restarts=2), everything)).sum())
    evidence = f"{whole} of {len(case.x)} images survive a change of all pixels to anything"
    return _found("unbounded radius reaches 0 %", not case.lucky(whole), evidence)


def _levels_off(case: _Case) -> Finding:
    """More steps and more restarts must stop to matter."""
    curves = {
        "steps": [int((~case.broken(PGD(steps=n))).sum()) for n in STEPS],
        "restarts": [int((~case.broken(PGD(steps=20, restarts=n))).sum()) for n in RESTARTS],
    }
    still = max(before - last for *_, before, last in curves.values())
    shown = "; ".join(
        f"{name} {', '.join(map(str, sizes))}: {', '.join(map(str, curves[name]))} survive"
        for name, sizes in (("steps", STEPS), ("restarts", RESTARTS))
    )
    return _found("steps and restarts level off", still > max(1, LEVEL * len(case.x)), shown)


def _surface(case: _Case) -> Finding:
    """A step along the gradient must lower the margin more than steps in random directions do."""
    spec, objective = class_margins(case.y, case.classes, torch.float64), Objective(case.model)
    small = case.protocol.ball(case.x, case.radius / 4)
    gradient = objective.gradient(case.x, spec, margin)[1]
    here = objective.rows(small.steepest(gradient), spec).amin(1)
    normal = Draws(case.seeds, len(case.x), case.x.device).normal(DIRECTIONS, *case.x.shape[1:])
    draws = normal.transpose(0, 1).to(case.x.dtype)
    random = torch.stack([objective.rows(small.steepest(draw), spec).amin(1) for draw in draws]).amin(0)
    share = float((here <= random).double().mean())
    evidence = f"on {100 * share:.0f} % of the images a quarter step along the gradient beats {DIRECTIONS} random ones"
    lost = len(here) - int((here <= random).sum())
    # As many as an honest share of 1 - BEATEN leaves to chance: two standard deviations of the count more.
    expected = (1 - BEATEN) * len(here)
    return _found("loss surface follows its gradient", lost > expected + 2 * (expected * BEATEN) ** 0.5, evidence)


def _against_white(case: _Case, name: str, words: str, attack: Attack) -> Finding:
    """Flag an attack that breaks more than a lucky few of what the white box leaves whole."""
    extra = int((case.broken(attack) & ~case.white).sum())
    left = int((~case.white).sum())
    return _found(name, not case.lucky(extra), f"of {left} images that survive the white box, {words} breaks {extra}")


def _found(check: str, flagged: bool, evidence: str) -> Finding:
    return Finding(check, "flagged" if flagged else "passed", evidence)


@contextmanager
def _counted_gradients() -> Iterator[list[None]]:
    """Collect an entry per backward pass, whichever function of torch asked for it and whatever name it was given."""
    calls: list[None] = []
    engine = torch.autograd._engine_run_backward  # where all of them end

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return engine(*arguments, **options)

    torch.autograd._engine_run_backward = counting
    try:
        yield calls
    finally:
        torch.autograd._engine_run_backward = engine


#: In the order of the report: cheap ones first.
CHECKS: tuple[Callable[[_Case], Finding], ...] = (
    _random_output,
    _softmax_output,
    _zero_gradients,
    _inference_optimises,
    _surface,
    _single_step,
    _unbounded,
    _levels_off,
    _black_box,
    _adaptive,
    _transfer,
)
