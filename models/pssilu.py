"""The parametric shifted SiLU, with its certified facts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from certify import Activation, Interval, register_activation
from certify.activations.smooth import ClosedForm, Formula, SiLU
from certify.errors import UnsupportedOperation
from certify.graph import Call


class PSSiLU(nn.Module):
    """f(x) = x (s(alpha x) - beta) / (1 - beta), s the sigmoid; alpha and beta are trained, one pair per layer.

    It starts as SiLU (alpha 1, beta 0). Reference: Dai, Mahloujifar, Mittal, "Parameterizing activation functions for
    adversarial robustness" (2022), arXiv 2110.05626, section 4.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.0) -> None:
        super().__init__()
        self.alpha, self.beta = (nn.Parameter(torch.tensor(float(value))) for value in (alpha, beta))

    def forward(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Return f(x), elementwise."""
        return x * (torch.sigmoid(self.alpha * x) - self.beta) / (1 - self.beta)


@register_activation(PSSiLU)
class PSSiLUFacts(ClosedForm):
    """f = (g(alpha x) / alpha - beta x) / (1 - beta) with g = SiLU: every derivative is one of g, scaled."""

    def __init__(self, module: PSSiLU, *, live: bool = False) -> None:
        held = (module.alpha, module.beta)
        self.alpha, self.beta = ((value if live else value.detach()).double() for value in held)
        a, b = (float(value.detach()) for value in held)
        if a != 0:
            self.inflections = tuple(sorted(point / a for point in SiLU.inflections))
            self.extrema = tuple(sorted(point / a for point in _level(b)))
        # What cancels is s - beta, and its error grows by 1 / (1 - beta).
        self.units = 32.0 * (1 + abs(b)) / (1 - b)

    @classmethod
    def from_call(cls, call: Call) -> PSSiLUFacts:
        module = call.module
        assert isinstance(module, PSSiLU)
        if not float(module.beta.detach()) < 1:
            raise UnsupportedOperation(
                f"a PSSiLU with beta = {float(module.beta):.4g} at {call.name!r}",
                "beta < 1: the function has a pole at 1",
                "train with a smaller rate for it",
            )
        return cls(module, live=torch.is_grad_enabled())

    @classmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        pairs = ((1.0, 0.0), (2.5, 0.3), (-1.5, -0.05), (0.7, 0.9), (1.2, -0.5), (0.0, 0.2))
        return [(cls(PSSiLU(alpha, beta)), 1) for alpha, beta in pairs]

    def forward(self, x: Tensor) -> Tensor:
        return self.formula().value(x.double()).to(x.dtype)

    def formula(self) -> Formula:
        a, b, silu = self.alpha, self.beta, SiLU().formula()

        def value(s: Tensor) -> Tensor:
            factor = torch.sigmoid(a * s.clamp(-1e300, 1e300)) - b
            return torch.where(factor == 0, 0.0, s * factor) / (1 - b)  # s may be infinite

        return Formula(
            value,
            lambda s: (silu.first(a * s) - b) / (1 - b),
            lambda s: a * silu.second(a * s) / (1 - b),
            lambda r, up: (a.abs() ** 3 * silu.bound(a.abs() * r, up) / (1 - b)).detach(),
        )

    def rounding_error(self, z: Interval) -> Tensor:
        """The usual units, and those of |x|: s(alpha x) - beta may cancel."""
        return super().rounding_error(z) + 8 * torch.finfo(z.lower.dtype).eps * z.magnitude / (1 - float(self.beta))


def _level(b: float) -> list[float]:
    """Where the slope of SiLU is b: once between its inflections, and once left of them for small negative b."""
    slope = SiLU().formula().first
    low, high = SiLU.inflections
    found = []
    for left, right in ((low, high), (-700.0, low)):
        ends = torch.tensor([left, right], dtype=torch.float64)
        signs = (slope(ends) - b).sign()
        if float(signs.prod()) >= 0:
            continue
        for _ in range(80):
            middle = ends.mean()
            same = (slope(middle) - b).sign() == signs[0]
            ends = torch.stack([middle, ends[1]]) if bool(same) else torch.stack([ends[0], middle])
        found.append(float(ends.mean()))
    return found
