"""Robust accuracy for certain and under attack, per radius: clean >= attacked >= certified, or an alarm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.chunk import AUDIT, Batch, Keep, Tick, Watch, measure
from analysis.protocol import Protocol, describe
from analysis.records import Conditions, Evaluation, RadiusRow, Rate, SampleRecord
from certify import class_margins
from certify.attacks.base import evaluating
from certify.errors import InvalidInput
from certify.graph import trace
from certify.memory import is_shortage

__all__ = ["AUDIT", "Protocol", "describe", "evaluate", "fit", "tally"]


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
    if protocol.methods:
        trace(model, x[:1])  # what cannot be bounded is refused before anything is attacked
    batch = Batch(model, x, y, classes, torch.arange(len(x)) if index is None else index)
    watch = Watch(tick, keep, None if dump is None else Path(dump))
    parts = torch.arange(len(x)).split(protocol.batch)
    records = [record for part in parts for record in measure(batch.take(part), protocol, watch).records]
    return tally(records, protocol.conditions(x.dtype))


def fit(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return x and y as the model takes them (its dtype and device), and its number of classes.

    Raises ``InvalidInput`` for empty or mismatched samples, labels outside the classes, and inputs or outputs of the
    wrong shape.
    """
    if len(x) == 0 or len(x) != len(y):
        raise InvalidInput(f"{len(x)} samples with {len(y)} labels", "one label each, at least one sample")
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    x = x if first is None else x.to(first.device, first.dtype)
    shape = _output_shape(model, x[:1])
    if len(shape) != 1 or shape[0] < 2:
        raise InvalidInput(f"a model with outputs of shape {tuple(shape)}", "one logit per class, at least two classes")
    class_margins(y, shape[0])
    return x, y.to(x.device), shape[0]


def _output_shape(model: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The shape of one sample's outputs, in eval mode."""
    try:
        with evaluating(model), torch.no_grad():
            outputs = model(x)
    except Exception as error:  # the model is the user's, and so is what it raises
        if is_shortage(error):
            raise
        reason = f"{type(error).__name__}, {error}".splitlines()[0]
        raise InvalidInput(
            f"the model fails on an input of shape {tuple(x.shape)}: {reason}"[:300],
            "samples of the shape that the model takes",
            "the right --data or --input-shape",
        ) from None
    if not isinstance(outputs, Tensor):
        raise InvalidInput(f"a model that returns a {type(outputs).__name__}", "logits", "a wrapper that returns them")
    return tuple(outputs.shape[1:])


def tally(records: Sequence[SampleRecord], conditions: Conditions) -> Evaluation:
    """Return the rates of at least one sample that was examined under the conditions."""
    total = len(records)
    return Evaluation(
        clean=Rate(sum(record.correct for record in records), total),
        rows=tuple(_row(records, place, conditions) for place in range(len(conditions.radii))),
        norm=conditions.norm,
        clip=conditions.clip,
        methods=conditions.methods,
        attack=conditions.attack,
        arithmetic=conditions.arithmetic,
        seed=conditions.seed,
        samples=tuple(records),
    )


def _row(records: Sequence[SampleRecord], place: int, conditions: Conditions) -> RadiusRow:
    found = [record.outcomes[place] for record in records]
    certified = {
        method: Rate(sum(outcome.certified(method) for outcome in found), len(found)) for method in conditions.methods
    }
    return RadiusRow(
        conditions.radii[place], Rate(sum(not outcome.attacked for outcome in found), len(found)), certified
    )
