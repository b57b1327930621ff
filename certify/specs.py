"""What is claimed about the outputs: linear rows that must be positive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from certify.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Spec:
    """The claim that C y + d > 0 in every row, y being the flattened outputs of one sample.

    ``C`` is [batch, rows, outputs], ``d`` is [batch, rows]; both in the model's dtype and on its device. Attacks need
    nothing else: cross-entropy is log(1 + sum exp(-rows)), a targeted attack minimises one row.
    """

    C: Float[Tensor, "batch rows outputs"]
    d: Float[Tensor, "batch rows"]

    def __post_init__(self) -> None:
        if self.C.ndim != 3 or self.d.shape != self.C.shape[:2] or self.C.shape[1] == 0:
            raise InvalidInput(
                f"C {tuple(self.C.shape)} and d {tuple(self.d.shape)}",
                "C [batch, rows, outputs] and d [batch, rows], at least one row",
                "certify.class_margins(labels, classes)",
            )
        if not bool(torch.isfinite(self.C).all() & torch.isfinite(self.d).all()):
            raise InvalidInput("a Spec with NaN or infinities", "finite C and d", "check the bands or labels")

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self.C.shape[0]

    @property
    def all_rows(self) -> Int[Tensor, "batch"]:
        """The goal of an attack that aims at all rows at once: -1 for every sample."""
        return torch.full((self.batch,), -1, device=self.C.device)

    def rows(self, y: Float[Tensor, "batch *outputs"]) -> Float64[Tensor, "batch rows"]:
        """Return C y + d in float64 (differentiable): positive where the claim holds at the outputs ``y``."""
        return torch.einsum("bro,bo->br", self.C.double(), y.flatten(1).double()) + self.d.double()

    def take(self, index: Int[Tensor, "n"]) -> Spec:
        """Return the claims of the samples ``index``."""
        return Spec(self.C[index], self.d[index])

    def row(self, index: Int[Tensor, "batch"]) -> Spec:
        """Return the one-row claim ``index[i]`` of sample i: what a targeted attack tries to break."""
        pick = torch.arange(self.batch, device=self.C.device), index
        return Spec(self.C[pick][:, None], self.d[pick][:, None])

    def to(self, dtype: torch.dtype, device: torch.device) -> Spec:
        """Return the same claim in another dtype or on another device."""
        return Spec(self.C.to(device=device, dtype=dtype), self.d.to(device=device, dtype=dtype))


def class_margins(labels: Int[Tensor, "batch"], classes: int, dtype: torch.dtype = torch.float32) -> Spec:
    """Return the claim y_label - y_j > 0 for every j != label, j increasing: [batch, classes - 1] rows.

    ``labels`` are the TRUE labels, never predictions. Raises ``InvalidInput`` for labels outside 0..classes-1.
    """
    if labels.is_floating_point() or labels.ndim != 1 or labels.dtype == torch.bool:
        raise InvalidInput(
            f"labels {labels.dtype} of shape {tuple(labels.shape)}",
            "integers of shape [batch]",
            "labels.long()",
        )
    if classes < 2 or len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        span = f"{int(labels.min())}..{int(labels.max())}" if len(labels) else "none"
        raise InvalidInput(
            f"labels {span} with {classes} classes", f"labels in 0..{classes - 1}", "check the class count"
        )
    labels = labels.long()
    eye = torch.eye(classes, dtype=dtype, device=labels.device)
    others = torch.arange(classes, device=labels.device).expand(len(labels), -1)
    others = others[others != labels[:, None]].view(len(labels), classes - 1)
    return Spec(eye[labels][:, None] - eye[others], eye.new_zeros(len(labels), classes - 1))


def output_band(lower: Float[Tensor, "batch outputs"], upper: Float[Tensor, "batch outputs"]) -> Spec:
    """Return the claim lower < y < upper for every output: a regression band, [batch, 2 outputs] rows."""
    if lower.shape != upper.shape or not bool((lower < upper).all()):
        raise InvalidInput("a band with lower >= upper", "lower < upper, of one shape", "swap the ends")
    eye = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device).expand(len(lower), -1, -1)
    return Spec(torch.cat([eye, -eye], 1), torch.cat([-lower, upper], 1))


def logit_sign(labels: Int[Tensor, "batch"], dtype: torch.dtype = torch.float32) -> Spec:
    """Return the claim that a single logit is positive for label 1 and negative for label 0: [batch, 1] rows."""
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise InvalidInput("labels other than 0 and 1", "binary labels", "class_margins for several classes")
    sign = (2 * labels.long() - 1).to(dtype)
    return Spec(sign.view(-1, 1, 1), torch.zeros_like(sign).view(-1, 1))
