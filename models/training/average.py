"""The exponential moving average of a model's weights (EMA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """a <- decay a + (1 - decay) w after every step, for floating-point parameters and buffers; others are copied.

    Young averages forget faster: the decay is at most (1 + n) / (10 + n) after n steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's present weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)

    @contextmanager
    def worn(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights for a while."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state for a resume."""
        return {**self.state, "steps": torch.tensor(self.steps)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up the state of ``tensors``; raises ``KeyError`` where something is missing."""
        self.steps = int(tensors["steps"])
        for name, value in self.state.items():
            value.copy_(tensors[name])
