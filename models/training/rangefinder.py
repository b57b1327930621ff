"""The learning-rate range test: what rates a network bears before its loss rises."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import InvalidInput
from models.data import Dataset
from models.training.config import TrainConfig
from models.training.loop import device_of, require_trainable, seeded
from models.training.run import Run, batches


@dataclass(frozen=True)
class RateCurve:
    """Rates tried and the smoothed loss at each; ``suggestion`` is where it falls fastest, ``limit`` where it is least.

    The one-cycle peak lies between the two.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float
    limit: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def find_rate(
    model: nn.Module, data: Dataset, config: TrainConfig, *, low: float = 1e-5, high: float = 1.0, steps: int = 100
) -> RateCurve:
    """Train a copy with rates that grow from ``low`` to ``high`` geometrically, one step each, and return the losses.

    They are smoothed by an exponential average of memory .9, without its bias; the test ends once the loss is four
    times its least or not finite. The model is left as it is. Reference: L. Smith, "Cyclical learning rates for
    training neural networks" (2017), section 3.3. Raises ``InvalidInput`` for ranges that are none.
    """
    require_trainable(model, data)
    if not (0 < low < high < math.inf and steps >= 10):
        raise InvalidInput(f"rates from {low} to {high} in {steps} steps", "0 < low < high, at least 10 steps")
    if config.optimizer.lr == 0:
        raise InvalidInput("optimizer.lr = 0", "a rate that can be scaled", "leave it out for its default")
    twin, device = copy.deepcopy(model), device_of(config.engine.device)
    twin.to(device).train()
    run = Run(twin, data, config, device)
    with seeded(config.seed, device):
        rates, losses = _climbed(run, low, high, steps)
    if len(rates) < 3:
        raise InvalidInput(f"a loss that leaves all bounds at rate {low:g}", "rates that are borne", "a smaller low")
    return RateCurve(tuple(rates), tuple(losses), *_turning(rates, losses))


def _climbed(run: Run, low: float, high: float, steps: int) -> tuple[list[float], list[float]]:
    """The rates that were borne, and the smoothed loss at each."""
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    order = torch.randperm(len(run.train[0]), generator=run.progress.generator)
    parts, repeats, memory = batches(order.to(run.device), run.config.batch), run.recipe.repeats, dict[str, Tensor]()
    for index in range(steps):
        if index % repeats == 0:
            batch = run.batch(parts[index // repeats % len(parts)], memory, step=steps - 1, steps=steps)
        rate = low * (high / low) ** (index / (steps - 1))
        loss = float(run.step(run.recipe, batch, rate / run.config.optimizer.lr)[0]) / len(batch.x)
        average = 0.9 * average + 0.1 * loss
        smooth = average / (1 - 0.9 ** (index + 1))
        if not math.isfinite(smooth) or (losses and smooth > 4 * min(losses)):
            break
        rates.append(rate)
        losses.append(smooth)
    return rates, losses


def _turning(rates: list[float], losses: list[float]) -> tuple[float, float]:
    """The rates at which the loss falls fastest (against the logarithm of the rate) and is least."""
    lowest = losses.index(min(losses))
    falls = [losses[i + 1] - losses[i - 1] for i in range(1, max(2, lowest))]
    return rates[1 + falls.index(min(falls))], rates[lowest]
