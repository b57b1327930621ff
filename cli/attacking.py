"""Attack a network and keep the attacked samples."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis.arrays import save_arrays
from analysis.evaluation import Protocol, evaluate
from analysis.records import Evaluation
from cli.output import progress
from cli.subjects import Samples, Subject, inputs


@dataclass(frozen=True, eq=False)
class Attacked:
    """The evaluation, and the worst point met per sample and radius (the sample itself where it was wrong already)."""

    evaluation: Evaluation
    labels: Tensor
    witnesses: dict[Fraction, Tensor]


def attacked(network: Subject, given: Samples, protocol: Protocol) -> Attacked:
    """Attack all samples at all radii, with a progress bar on stderr."""
    parts: dict[Fraction, list[Tensor]] = {radius: [] for radius in protocol.radii}

    def keep(radius: Fraction, _: Tensor, witness: Tensor) -> None:
        parts[radius].append(witness.cpu().clone())

    x = inputs(network, given)
    with progress(network.name, protocol.work(len(x))) as tick:
        found = evaluate(network.model, x, given.y, protocol, index=given.index, tick=tick, keep=keep)
    return Attacked(found, given.y, {radius: torch.cat(met) for radius, met in parts.items()})


def save(path: Path, result: Attacked) -> None:
    """Write index, labels, and per radius the attacked images and whether they fool the network; atomically."""
    samples = result.evaluation.samples
    arrays = {"index": np.array([sample.index for sample in samples]), "labels": result.labels.cpu().numpy()}
    for place, (radius, witness) in enumerate(result.witnesses.items()):
        name = str(radius).replace("/", "_")
        arrays[f"images_{name}"] = witness.numpy()
        arrays[f"fooled_{name}"] = np.array([sample.outcomes[place].attacked for sample in samples])
    save_arrays(path, arrays)
