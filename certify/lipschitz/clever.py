"""CLEVER: the local constant as extreme value theory guesses it from sampled gradients. An estimate, not a bound.

The largest gradient norms of batches of samples follow, in the limit, a reverse Weibull distribution, whose end point
is the constant. The end point of a fit can lie on either side of it: "an estimate of a bound is not a bound", and
gradients can be masked so that it is too small by any factor.
References: Weng et al., "Evaluating the robustness of neural networks: an extreme value theory approach" (2018),
arXiv 1801.10578; Goodfellow, "Gradient masking causes CLEVER to overestimate adversarial perturbation size" (2018),
arXiv 1804.07870.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from certify.errors import InvalidInput, UnsupportedOperation
from certify.lipschitz.estimate import Question
from certify.lipschitz.sampled import claims, jacobian, jacobian_norms
from certify.registry import register_estimator
from certify.results import LipschitzEstimate

FARTHEST = 10.0  # spreads of the maxima: a fit that ends beyond has become a Gumbel distribution, which has no end
SHAPES = (0.3, 1.0, 3.0, 10.0)  # where fits start; the one with the smallest Kolmogorov-Smirnov distance is taken


@register_estimator("clever")
@dataclass(frozen=True, kw_only=True)
class Clever:
    """An estimate of the local constant, on neither side of it for certain: the end point of a reverse Weibull fit.

    ``batches`` maxima, each over ``samples`` gradient norms at random points of the domain, per sample of the domain
    and per row of the spec. Needs a domain: there is no uniform sample of the whole space. ``generator`` None means a
    fixed seed.
    """

    batches: int = 50
    samples: int = 64
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.batches < 3 or self.samples < 1:
            raise InvalidInput(f"batches={self.batches}, samples={self.samples}", "batches >= 3, samples >= 1")

    def estimate(self, question: Question) -> LipschitzEstimate:
        """Return the estimate, side "estimate"; raises ``UnsupportedOperation`` without a domain."""
        if question.domain is None:
            raise UnsupportedOperation(
                "CLEVER without a domain", "a set to sample from", 'domain=certify.LpBall(x, r), or method="jacobian"'
            )
        found = _end_points(self._maxima(question))
        rows = () if question.spec is None else tuple(map(tuple, found.tolist()))
        return LipschitzEstimate(float(found.max()), "estimate", "clever", question.p, {}, rows)

    def _maxima(self, question: Question) -> Float64[Tensor, "batches batch quantities"]:
        """The largest norm of every batch of samples."""
        generator = self.generator if self.generator is not None else torch.Generator().manual_seed(0)
        domain, spec, graph = question.domain, question.spec, question.graph
        assert domain is not None
        C, found = claims(spec, domain.batch * self.samples, self.samples, domain), []
        for _ in range(self.batches):
            x = domain.sample(self.samples, generator).transpose(0, 1).flatten(0, 1).to(graph.device)
            with torch.enable_grad():
                slopes = jacobian(graph.model, x.requires_grad_(), C).detach()
            norms = jacobian_norms(slopes, question.p, rows=spec is not None).nan_to_num(nan=0.0)
            found.append(norms.view(domain.batch, self.samples, -1).amax(1))
        return torch.stack(found)


def _end_points(maxima: Float64[Tensor, "batches *n"]) -> Float64[Tensor, "*n"]:
    flat = maxima.flatten(1).T.cpu().numpy()
    return torch.tensor([_end_point(row) for row in flat], dtype=torch.float64).view(maxima.shape[1:])


def _end_point(maxima: np.ndarray) -> float:
    """The location of the best reverse Weibull fit; the largest value itself if none fits, or all are the same."""
    from scipy.stats import kstest, weibull_max  # slow to import

    top, spread = float(maxima.max()), float(np.ptp(maxima))
    if spread <= 1e-9 * top:
        return top
    scaled = (maxima - top) / spread  # in [-1, 0]: the fit then knows no units
    best, location = np.inf, 0.0
    for shape in SHAPES:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # trial values outside the support
            fit = weibull_max.fit(scaled, shape, loc=0.1, scale=1.0)
            distance = float(kstest(scaled, weibull_max.cdf, fit).statistic)
        if 0 <= fit[1] <= FARTHEST and distance < best:
            best, location = distance, float(fit[1])
    return top + spread * location
