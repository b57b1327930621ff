"""Checkpoints: NAME.safetensors with the weights beside NAME.json with all that is needed to use them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import InvalidFile, InvalidInput
from models.files import pack, read_bytes, read_json, read_state_dict, unpack, write
from models.networks import Network, build

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained network in eval mode, and what is known about it.

    ``meta`` holds architecture, activation, normalisation (mean, std), versions, schema_version and
    weights_sha256, beside what training adds: data, recipe, seed, metrics.
    """

    model: Network
    meta: dict[str, Any]


def save(
    path: str | Path,
    model: nn.Module,
    meta: Mapping[str, Any] | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint ``path`` (a folder, or NAME.json / NAME.safetensors) and return the JSON's path.

    ``weights`` are kept in place of the model's own if given: a state_dict of it. Both files are written whole before
    either takes its name, the weights first; they carry a copy of the JSON, which holds their hash. Raises
    ``InvalidInput`` for models that carry no architecture: user's networks, or an activation made by a factory.
    """
    if not isinstance(model, Network) or model.architecture is None:
        raise InvalidInput(
            f"a {type(model).__name__} without an architecture",
            "a network of models.build, or of mlp or cnn with an activation's name",
            "torch.save(model.state_dict(), FILE) for your own",
        )
    stem = _stem(Path(path))
    record = {**(meta or {}), **_describe(model.architecture)}
    packed = pack(model.state_dict() if weights is None else weights, {"record": record})
    text = json.dumps({**record, "weights_sha256": _hash(packed)}, indent=2, allow_nan=False) + "\n"
    write({_file(stem, "safetensors"): packed, _file(stem, "json"): text.encode()})
    return _file(stem, "json")


def load(path: str | Path) -> Checkpoint:
    """Return the checkpoint at ``path``: its folder, its .json or its .safetensors file.

    Raises ``InvalidFile`` if a file is missing, damaged, a pickle, of another schema, belongs to other
    weights, or holds NaN.
    """
    stem = _find(Path(path))
    meta, weights_file = read_json(_file(stem, "json")), _file(stem, "safetensors")
    data = read_bytes(weights_file)
    tensors, header = unpack(weights_file, data)
    if meta.get("schema_version") != SCHEMA_VERSION or not isinstance(meta.get("architecture"), dict):
        raise InvalidFile(
            f"{_file(stem, 'json')} has schema version {meta.get('schema_version')!r}",
            f"a checkpoint of schema version {SCHEMA_VERSION} with an architecture",
            "use the version of kafcert that wrote it",
        )
    if meta.get("weights_sha256") != _hash(data) and _follows(header.get("record"), meta):
        meta = {**header["record"], "weights_sha256": _hash(data)}  # killed between its two renames
    if meta.get("weights_sha256") != _hash(data):
        raise InvalidFile(
            f"{weights_file} does not belong to the JSON file beside it",
            "the weights that were saved with it (weights_sha256)",
            "copy both files again",
        )
    try:
        model = build(meta["architecture"])
    except (InvalidInput, ValueError, RuntimeError, OverflowError) as error:
        reason = getattr(error, "got", type(error).__name__)
        raise InvalidFile(f"{_file(stem, 'json')}: {reason}", "an architecture that builds") from None
    fill(model, tensors, weights_file)
    return Checkpoint(model.eval(), meta)


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Fill ``model`` from a state_dict: safetensors, or torch.save read with ``weights_only=True``.

    Names and shapes must match exactly. Raises ``InvalidFile`` otherwise, or for damaged files and NaN.
    """
    fill(model, read_state_dict(Path(file)), Path(file))


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy ``tensors`` in the model's parameters and buffers, after all of them were checked.

    A model whose floats are narrower than the file's follows the file's dtype.
    """
    own = model.state_dict()
    for name in (*own, *tensors):
        if name not in tensors or name not in own:
            problem = "is missing in the file" if name not in tensors else "is unknown to the network"
            raise InvalidFile(f"{source}: {name!r} {problem}", "the names of the network's state_dict")
        if own[name].shape != tensors[name].shape:
            raise InvalidFile(f"{source}: {name!r} has shape {tuple(tensors[name].shape)}", f"{tuple(own[name].shape)}")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise InvalidFile(
                f"{source}: {name!r} holds NaN or infinities", "finite weights", "train again at a lower rate"
            )
    if any(value.dtype == torch.float64 for value in tensors.values()):
        model.double()
    model.load_state_dict(dict(tensors))


def _follows(record: Any, meta: Mapping[str, Any]) -> bool:
    """Whether weights' own record is that of a later epoch of the run that ``meta`` describes."""
    try:
        later = record["metrics"]["epoch"] > meta["metrics"]["epoch"]
    except (TypeError, KeyError):
        return False
    lasting = {*record, *meta} - {"metrics", "weights_sha256"}
    return later and all(record.get(key) == meta.get(key) for key in lasting)


def _describe(architecture: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "architecture": architecture,
        "activation": architecture["activation"],
        "normalisation": {key: architecture.get(key, []) for key in ("mean", "std")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kafcert": _own_version(),
        },
    }


def _own_version() -> str:
    try:
        return version("kafcert")
    except PackageNotFoundError:
        return "unknown"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}.{kind}")


def _stem(path: Path) -> Path:
    """Return the path of both files without their endings: those of a folder are called model."""
    return path.with_suffix("") if path.suffix in (".json", ".safetensors") else path / "model"


def _find(path: Path) -> Path:
    """Return the stem of the checkpoint that exists at ``path``."""
    if path.is_file() and path.suffix not in (".json", ".safetensors"):
        unpack(path, read_bytes(path))  # teaches the case of a pickle
        raise InvalidFile(f"{path} has an unknown ending", "a folder, .json or .safetensors", "rename it")
    stem = _stem(path)
    if not _file(stem, "json").is_file():
        raise InvalidFile(
            f"no checkpoint at {path}",
            f"a folder with model.json, or {_file(stem, 'json').name} beside its weights",
            "certify train --out FOLDER writes one",
        )
    return stem
