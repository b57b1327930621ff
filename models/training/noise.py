"""Training on noise: what randomised smoothing certifies well."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.training.fields import between
from models.training.recipe import Batch, Outcome, Recipe, register_recipe


@register_recipe("noise")
@dataclass(frozen=True, kw_only=True)
class NoiseTraining(Recipe):
    """Cross-entropy on images with Gaussian noise of standard deviation ``sigma``, beyond the data range too.

    Reference: Cohen, Rosenfeld, Kolter, "Certified adversarial robustness via randomized smoothing" (2019), section 4.
    """

    sigma: float

    def __post_init__(self) -> None:
        between("sigma", self.sigma, 1e-12, 1e6)

    def __call__(self, batch: Batch) -> Outcome:
        # From uniform numbers, which are shared out among processes; 1 itself would become infinite.
        share = (batch.uniform().double() + 1) / 2
        noise = torch.special.ndtri(share.clamp(2.0**-25, 1 - 2.0**-25)).to(batch.x.dtype)
        logits = batch.model(batch.x + self.sigma * noise)
        return Outcome(batch.loss(logits), logits)
