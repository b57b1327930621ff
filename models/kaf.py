"""The kernel activation function (KAF): a trainable activation, one kernel expansion per neuron or channel.

Reference: S. Scardapane, S. Van Vaerenbergh, S. Totaro, A. Uncini, "Kafnets: kernel-based non-parametric
activation functions for neural networks", Neural Networks 110 (2019), arXiv 1707.04035.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from certify.errors import InvalidInput, unknown_name
from models.gaussian import gaussian_sum
from models.kernels import KERNELS, kernel_sum
from models.plan import Plan, make_plan
from models.ridge import RidgeFit, Target, ridge_fit

TARGETS: dict[str, Target] = {"elu": F.elu, "silu": F.silu, "relu": F.relu, "tanh": torch.tanh}


@dataclass(frozen=True)
class Convention:
    """The constants of a published KAF: range, gamma = 1 / (scale step^2), ridge, spread of random alpha."""

    bound: float
    scale: float
    ridge: float
    spread: float


CONVENTIONS = {
    "paper": Convention(bound=3.0, scale=6.0, ridge=1e-6, spread=0.3),
    "authors": Convention(bound=4.0, scale=8.0, ridge=1e-4, spread=0.8),
}


class KAF(nn.Module):
    """Kernel activation function: f(s) = sum_i alpha_i k(s, d_i), plus base(s) if one is given.

    The kernel k is exp(-gamma (s - d)^2) unless ``kernel`` names another of ``models.kernels``, which can be trained
    and attacked but has no certified facts. ``tails`` "linear" continues the function along its tangents outside
    [-bound, bound], where Gaussians fall off a cliff ("fall").

    Every channel (dimension 1 of the input) has its own trainable alpha; ``num_parameters`` is the number of
    channels, or 1 for one function shared by all. The dictionary d has ``size`` points, evenly on [-bound,
    bound].

    ``convention`` fills what is left open: "paper" (bound 3, gamma 1/(6 step^2)) or "authors" (the authors'
    code: bound 4, gamma 1/(8 step^2)). ``init`` is "random", or the function that the KAF starts as, fitted
    by kernel ridge regression: "elu", "silu", "relu", "tanh" or a callable; ``ridge`` is its term, the convention's
    or "auto" (see ``ridge_fit``), and ``fit`` tells what came out. ``trainable`` trains the dictionary and the
    bandwidth too. Memory is that of the input, not of the input times ``size``. ``fuse`` has it
    computed by compiled loops: several times faster, after seconds of compilation.

    Raises ``InvalidInput`` for other names, sizes below 2, and bounds or bandwidths that are not positive.
    """

    base: nn.Module | None
    dictionary: Tensor
    gamma: Tensor
    log_gamma: Tensor

    def __init__(
        self,
        num_parameters: int,
        *,
        size: int = 20,
        bound: float | None = None,
        gamma: float | None = None,
        convention: str = "paper",
        init: str | Target = "random",
        kernel: str = "gaussian",
        ridge: float | str | None = None,
        tails: str = "fall",
        base: nn.Module | None = None,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        if convention not in CONVENTIONS:
            raise unknown_name("convention", convention, CONVENTIONS)
        if kernel not in KERNELS:
            raise unknown_name("kernel", kernel, KERNELS)
        if tails not in ("fall", "linear"):
            raise unknown_name("kind of tails", tails, ("fall", "linear"))
        if tails == "linear" and (kernel != "gaussian" or base is not None):
            got = f"linear tails with {'a base' if base is not None else f'the kernel {kernel!r}'}"
            raise InvalidInput(got, "a gaussian KAF without a base", "tails='fall'")
        chosen = CONVENTIONS[convention]
        bound = chosen.bound if bound is None else bound
        _check("num_parameters", num_parameters, num_parameters >= 1, "at least 1")
        _check("size", size, size >= 2, "at least 2 dictionary points")
        _check("trainable", trainable, isinstance(trainable, bool), "True or False")
        _check("bound", bound, 0 < bound < torch.inf, "a positive number")
        gamma = 1 / (chosen.scale * (2 * bound / (size - 1)) ** 2) if gamma is None else gamma
        _check("gamma", gamma, 0 < gamma < torch.inf, "a positive number")
        points, bandwidth = torch.linspace(-bound, bound, size), torch.tensor(gamma)
        self.base, self.kernel, self.tails, self.bound = base, kernel, tails, float(bound)
        self.alpha = nn.Parameter(torch.empty(num_parameters, size))
        if trainable:
            self.dictionary = nn.Parameter(points)
            self.log_gamma = nn.Parameter(bandwidth.log())
        else:
            self.register_buffer("dictionary", points)
            self.register_buffer("gamma", bandwidth)
        self.trainable, self.fused = trainable, False
        self.fit = self._start(init, chosen.ridge if ridge is None else ridge, chosen.spread)
        self._plan = self._made()

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Return f(x), elementwise, in the dtype of x; half precision is computed in float32."""
        channels = len(self.alpha)
        if x.ndim < 2 or channels not in (1, x.shape[1]):
            raise InvalidInput(
                f"a KAF of {channels} channels on an input of shape {tuple(x.shape)}",
                f"[batch, {'channels' if channels == 1 else channels}, *space]",
                "KAF(num_parameters=channels), or 1 to share one function",
            )
        y = self.expansion(x)
        return y if self.base is None else self.base(x) + y

    def expansion(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Return the sum of kernels alone, with its tails, in the dtype of x; half precision is computed in float32."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.alpha.dtype), torch.float32)
        wide = x.to(dtype)
        if self.tails == "fall":
            return self._sum(wide).to(x.dtype)
        inner = torch.where(wide > self.bound, self.bound, torch.where(wide < -self.bound, -self.bound, wide))
        left, right = (slope.to(dtype).view(-1, *[1] * (x.ndim - 2)) for slope in self.end_slopes())
        return (self._sum(inner) + torch.where(wide > 0, right, left) * (wide - inner)).to(x.dtype)

    def end_slopes(self) -> tuple[Float[Tensor, "parameters"], Float[Tensor, "parameters"]]:
        """Return f' at -bound and at bound."""
        alpha, dictionary, gamma = self.gaussian()
        ends = alpha.new_tensor([[-self.bound], [self.bound]])
        away = ends - dictionary
        slopes = -2 * gamma * away * torch.exp(-gamma * away.square())
        left, right = (alpha[:, None] * slopes).sum(2).unbind(1)  # no matrix product: autocast would round it
        return left, right

    def _sum(self, x: Tensor) -> Tensor:
        """The sum of kernels in the dtype of x."""
        alpha, dictionary, gamma = (value.to(x.dtype) for value in self.gaussian())
        if self.kernel != "gaussian":
            return kernel_sum(KERNELS[self.kernel], x, alpha, dictionary, gamma)
        fused = self.fused and x.dtype == torch.float32  # doubles are for checks, not worth a compilation
        return gaussian_sum(x, alpha, dictionary, gamma, self._planned(x.dtype), fused=fused)

    def gaussian(
        self,
    ) -> tuple[Float[Tensor, "parameters size"], Float[Tensor, "size"], Float[Tensor, ""]]:
        """Return alpha, the dictionary and gamma as the forward pass uses them."""
        return self.alpha, self.dictionary, self._gamma()

    def extra_repr(self) -> str:
        flags = "" if self.kernel == "gaussian" else f", kernel={self.kernel!r} (no certified facts)"
        flags += "" if self.tails == "fall" else ", tails='linear'"
        flags += "".join(f", {name}=True" for name in ("trainable", "fused") if getattr(self, name))
        return f"{len(self.alpha)}, size={len(self.dictionary)}, gamma={float(self._gamma().detach()):.4g}{flags}"

    def _planned(self, dtype: torch.dtype) -> Plan | None:
        """The plan of the sum for the present dictionary and gamma; under torch.compile the last one made."""
        if self.trainable or torch.compiler.is_compiling():
            return self._plan
        if self._plan is None or not self._plan.fits(self.dictionary, self.gamma, dtype):
            self._plan = self._made(dtype)
        return self._plan

    def _made(self, dtype: torch.dtype = torch.float32) -> Plan | None:
        if self.trainable or self.dictionary.is_meta:
            return None
        return make_plan(self.dictionary, self.gamma, torch.promote_types(dtype, self.dictionary.dtype))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._plan = self._made()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> KAF:
        super()._apply(fn, recurse)
        self._plan = self._made()
        return self

    def _gamma(self) -> Tensor:
        return self.log_gamma.exp() if self.trainable else self.gamma

    @torch.no_grad()
    def _start(self, init: str | Target, ridge: float | str, spread: float) -> RidgeFit | None:
        if isinstance(init, str) and init == "random":
            self.alpha.normal_(std=spread)
            return None
        if isinstance(init, str) and init not in TARGETS:
            raise unknown_name("init", init, ("random", *TARGETS))
        target = TARGETS[init] if isinstance(init, str) else init
        fit = ridge_fit(target, self.dictionary, self._gamma(), ridge, KERNELS[self.kernel])
        self.alpha.copy_(fit.alpha)
        return fit


def fuse(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Let every KAF of ``model`` run as one compiled loop (or no longer), in place, and return ``model``.

    About 2.5 times faster than the eager sum, with errors within the same bound. The first call of each kind of input
    compiles for 5 to 13 seconds, for up to a minute where the dictionary is trained or not evenly spaced. Kernels other
    than the Gaussian, and doubles, stay eager. Where torch.compile finds no working compiler, one warning says so and
    the eager sum runs.
    """
    for module in model.modules():
        if isinstance(module, KAF):
            module.fused = enabled
    return model


def _check(name: str, value: float, valid: bool, expected: str) -> None:
    if not valid:
        raise InvalidInput(f"{name} = {value!r}", expected, f"KAF(channels, {name}=...) or leave it out")
