"""Randomised smoothing: probabilistic certificates of another classifier, the smoothed one. Never mixed with proofs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from certify.attacks.base import evaluating
from certify.draws import Draws, Source
from certify.errors import InvalidInput, InvalidModel
from certify.notebook import table

#: Random numbers drawn at once, at most.
NUMBERS = 2**23
#: The prediction of a smoothed classifier that is not sure enough.
ABSTAIN = -1


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """How a classifier is smoothed and asked: g(x) is its likeliest class under N(x, ``sigma``^2 I).

    ``select`` noisy copies choose the class, ``count`` others estimate its probability; each certificate is wrong with
    probability ``alpha`` at most. ``batch`` copies are classified at once, fewer where inputs are large.
    """

    sigma: float
    alpha: float = 0.001
    select: int = 100
    count: int = 10_000
    batch: int = 1000

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise InvalidInput(f"sigma={self.sigma}", "a positive number in the units of x", "sigma=0.25")
        if not 0 < self.alpha < 0.5:
            raise InvalidInput(f"alpha={self.alpha}", "a probability below 1/2", "alpha=0.001")
        if min(self.select, self.count, self.batch) < 1:
            raise InvalidInput(
                f"select={self.select}, count={self.count}, batch={self.batch}", "at least 1 of each", "count=10000"
            )


@dataclass(frozen=True, eq=False)
class SmoothedCertificate:
    """Per sample, with probability 1 - alpha at least: g(z) = ``predicted`` for every ||z - x||_2 < ``radius``.

    ``predicted`` [batch] is ``ABSTAIN`` (-1) and ``radius`` [batch] 0 where the class is not likely enough.
    ``probability`` [batch] is the lower confidence bound of the class's probability.
    """

    predicted: Int[Tensor, "batch"]
    radius: Float64[Tensor, "batch"]
    probability: Float64[Tensor, "batch"]
    smoothing: Smoothing

    def certified(self, labels: Int[Tensor, "batch"], radius: float) -> Bool[Tensor, "batch"]:
        """Return where g is right and stays so within ``radius`` (l2), by these certificates."""
        return (self.predicted == labels.to(self.predicted.device)) & (self.radius > radius)

    def _repr_html_(self) -> str:
        facts = enumerate(zip(self.predicted.tolist(), self.radius.tolist(), strict=True))
        rows = ((place, "abstains" if word == ABSTAIN else word, radius) for place, (word, radius) in facts)
        caption = f"PROBABLE, not proved: smoothed, each to {100 * (1 - self.smoothing.alpha):g} %"
        return table(caption, ("sample", "class", "l2 radius"), rows)


def certify_smoothed(
    model: nn.Module, x: Float[Tensor, "batch *shape"], smoothing: Smoothing, *, generator: Source = None
) -> SmoothedCertificate:
    """Return sigma Phi^-1(p), p the Clopper-Pearson lower bound of the top class's probability, where p > 1/2.

    Raises ``InvalidModel`` for outputs that are not finite, ``InvalidInput`` for outputs that are no logits per class.
    ``generator`` may be one integer seed per sample.
    Reference: Cohen, Rosenfeld, Kolter, "Certified adversarial robustness via randomized smoothing" (2019), theorem 1
    and algorithm CERTIFY. Exclusion: noise and sums are floats, the theorem's are real numbers.
    """
    draws = Draws(generator, len(x), x.device)
    with evaluating(model), torch.no_grad():
        places = torch.arange(len(x), device=x.device).split(1)
        found = [_certify_one(model, x[int(i)], smoothing, draws.take(i)) for i in places]
    predicted = torch.tensor([chosen for chosen, _ in found], device=x.device)
    probability = torch.tensor([lower for _, lower in found], dtype=torch.float64, device=x.device)
    sure = probability > 0.5
    radius = torch.where(sure, smoothing.sigma * torch.special.ndtri(probability), 0.0)
    return SmoothedCertificate(torch.where(sure, predicted, ABSTAIN), radius, probability, smoothing)


def _certify_one(model: nn.Module, x: Tensor, smoothing: Smoothing, draws: Draws) -> tuple[int, float]:
    """The class that the first copies choose, and the lower bound of its probability by the others."""
    from scipy.stats import beta

    chosen = int(_counts(model, x, smoothing, draws, smoothing.select).argmax())
    hits = int(_counts(model, x, smoothing, draws, smoothing.count)[chosen])
    lower = float(beta.ppf(smoothing.alpha, hits, smoothing.count - hits + 1)) if hits else 0.0
    return chosen, lower


def _counts(model: nn.Module, x: Tensor, smoothing: Smoothing, draws: Draws, count: int) -> Int[Tensor, "classes"]:
    """How often each class wins among so many noisy copies."""
    total: Tensor | None = None
    batch = max(1, min(smoothing.batch, NUMBERS // x.numel()))
    for start in range(0, count, batch):
        noise = draws.normal(min(batch, count - start), *x.shape)[0]
        y = model(x + smoothing.sigma * noise.to(x.dtype))
        if y.ndim != 2 or y.shape[1] < 2:
            raise InvalidInput(f"outputs of shape {tuple(y.shape)}", "[batch, classes]", "a classifier with logits")
        if not bool(torch.isfinite(y).all()):
            raise InvalidModel(
                "the model's outputs hold NaN or infinities", "finite logits", "check weights and inputs"
            )
        wins = torch.bincount(y.argmax(1), minlength=y.shape[1])
        total = wins if total is None else total + wins
    assert total is not None
    return total
