"""What decides a run's results, as hashes: a run goes on only with the same models, data, settings and versions."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from analysis.chunk import Batch
from analysis.lines import SCHEMA_VERSION, digest
from analysis.plain import Record, encode
from analysis.units import Case, Stage
from certify.attacks.base import evaluating
from certify.errors import InvalidFile
from certify.graph import trace
from models.files import read_json, tensor_digest

#: How far outputs of one network may lie apart on two machines, relative to the largest.
SAME = 1e-4
#: Fields of a manifest, in words.
_WORDS = {
    "models": "weights of",
    "structures": "structure of",
    "data": "data",
    "configuration": "configuration",
    "versions": "version of",
}


@dataclass(frozen=True)
class Manifest(Record):
    """Hashes of the models' weights and structure and of the data, the configuration in full, and versions.

    ``outputs`` are those of the first sample: what a model computes may depend on what is neither weight nor structure.
    They differ where machines round differently, so they are no part of the identity. ``shard`` is "i/n", None for an
    undivided run.
    """

    schema_version: int
    identity: str
    models: dict[str, str]
    structures: dict[str, str]
    data: dict[str, str]
    configuration: dict[str, Any]
    versions: dict[str, str]
    outputs: dict[str, tuple[float, ...]]
    shard: str | None = None

    def of_shard(self, shard: str | None) -> Manifest:
        """Return the manifest of one shard of the run (None: of all of it)."""
        return replace(self, shard=shard)

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Return the manifest in a file. Raises ``InvalidFile`` where there is none."""
        try:
            return cls.from_dict(read_json(file))
        except (KeyError, TypeError, AttributeError):
            raise InvalidFile(f"{file} is no manifest", "that of a run", "copy it again") from None

    def text(self) -> bytes:
        """Return the content of manifest.json."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False).encode() + b"\n"

    def differences(self, other: Manifest) -> Iterator[str]:
        """Yield the words for what differs."""
        for name, words in _WORDS.items():
            yield from (f"{words} {key}" for key in _unequal(getattr(self, name), getattr(other, name)))
        yield from (f"outputs of {name}" for name in self.outputs if not _close(self.outputs, other.outputs, name))
        if self.shard != other.shard:
            yield f"shard {other.shard or 'none'}"


def manifest_of(stage: Stage) -> Manifest:
    """Return the manifest of an undivided run."""
    first = stage.cases[0].batch
    facts: dict[str, Any] = {
        "models": {case.about.name: case.about.weights_sha256 for case in stage.cases},
        "structures": {case.about.name: _structure(case.batch) for case in stage.cases},
        "data": {
            "images": tensor_digest({"x": first.x.flatten(1)}),
            "labels": tensor_digest({"y": first.y}),
            "places": tensor_digest({"index": first.index}),
        },
        "configuration": encode(_configuration(stage)),
        "versions": versions(),
    }
    identity = digest(json.dumps(facts, sort_keys=True, allow_nan=False).encode())
    return Manifest(SCHEMA_VERSION, identity, **facts, outputs={case.about.name: _first(case) for case in stage.cases})


def _first(case: Case) -> tuple[float, ...]:
    """The network's outputs on its first sample."""
    with evaluating(case.batch.model), torch.no_grad():
        return tuple(case.batch.model(case.batch.x[:1])[0].double().tolist())


def _close(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]], name: str) -> bool:
    """Whether both hold about the same outputs under that name."""
    a, b = ours[name], theirs.get(name, ())
    return len(a) == len(b) and all(abs(x - y) <= SAME * max(map(abs, a)) for x, y in zip(a, b, strict=True))


def _configuration(stage: Stage) -> dict[str, Any]:
    """All settings that decide a number."""
    protocol, cases = stage.protocol, stage.cases
    return {
        "networks": [case.about.name for case in cases],
        "normalisation": [case.about.normalisation for case in cases],
        "shapes": [tuple(case.batch.x.shape[1:]) for case in cases],
        **protocol.conditions(cases[0].batch.x.dtype).to_dict(),
        "arithmetic": [case.about.conditions.arithmetic for case in cases],
        "batch": protocol.batch,
        "sample_seconds": protocol.sample_seconds,
        "layer_radius": stage.layers.radius,
        "layer_samples": stage.layers.samples,
    }


def _structure(batch: Batch) -> str:
    """The hash of modules with their options, and of the nodes that the network is made of."""
    modules = re.sub(r"0x[0-9a-f]+", "", repr(batch.model))  # where an object lies in memory is no fact about it
    nodes = trace(batch.model, batch.x[:1]).nodes.values()
    return digest("\n".join([modules, *(f"{node.name} {node.kind} {node.shape}" for node in nodes)]).encode())


def versions() -> dict[str, str]:
    """Return the versions that can change a number."""
    found = {"python": platform.python_version()}
    for name in ("kafcert", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]
