"""What a command works on: networks (ours or the user's) and samples."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from certify.errors import CertifyError, InvalidInput, InvalidModel
from cli.options import DataOptions, NetworkOptions
from cli.parsing import integers, numbers
from models import checkpoint, data
from models.networks import Normalize

#: Samples taken where none are asked for.
SAMPLES = 200


@dataclass(frozen=True, eq=False)
class Subject:
    """A network in eval mode and what is known about it; ``data`` is the data set that it was trained on.

    Samples come in ``input_shape`` if there is one; ``some_shape`` will do where there are no samples.
    """

    name: str
    source: str
    model: nn.Module
    network: str
    normalisation: str
    data: str | None = None
    input_shape: tuple[int, ...] | None = None
    some_shape: tuple[int, ...] | None = None

    @property
    def parameters(self) -> int:
        """The number of trainable numbers."""
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples with true labels, their places in the test split, and a sentence about them."""

    x: Tensor
    y: Tensor
    index: Tensor
    text: str


def subjects(options: NetworkOptions) -> list[Subject]:
    """Return the networks that the options name.

    Raises ``InvalidInput`` where they name none, both kinds, or one twice.
    """
    own = options.model is not None
    if own == bool(options.checkpoints):
        raise InvalidInput(
            "both checkpoints and --model" if own else "no network",
            "checkpoints, or --model with --weights",
            "certify demo, then certify report demo/relu demo/kaf",
        )
    if own:
        return [_users_own(options)]
    extra = [name for name in ("weights", "mean", "std") if getattr(options, name) is not None]
    if extra:
        raise InvalidInput(f"--{extra[0]} with a checkpoint", "a checkpoint alone: it knows its own", "use --model")
    paths = [Path(path) for path in options.checkpoints or ()]
    names = [_short(path) for path in paths]
    if len({*paths}) < len(paths):
        listed = ", ".join(map(str, paths))
        raise InvalidInput(f"the networks {listed}", "each of them once", "leave out what is there twice")
    shape = None if options.input_shape is None else integers(options.input_shape, "input-shape", "1,28,28")
    return [
        _checkpoint(path, name if names.count(name) == 1 else str(path), shape)
        for path, name in zip(paths, names, strict=True)
    ]


def samples(options: DataOptions, networks: list[Subject]) -> Samples:
    """Return the samples that the options ask for, of the networks' own data set by default."""
    names = {options.data or network.data for network in networks}
    name = names.pop()
    if names or name is None:
        raise InvalidInput("networks of several data sets" if names else "no data set", "one data set", "--data digits")
    return samples_of(data.load(name, data_dir=options.data_dir, download=options.download), options)


def samples_of(found: data.Dataset, options: DataOptions) -> Samples:
    """Return the samples that the options ask for, of a data set that is read already."""
    total = len(found.test_x)
    count = min(SAMPLES, total) if options.samples is None else options.samples
    x, y, index = data.subset(found.test_x, found.test_y, count, options.seed)
    which = "all" if count == total else f"{count} of"
    return Samples(x, y, index, f"{which} {total} test images of {found.name} (seed {options.seed})")


def _checkpoint(path: Path, name: str, shape: tuple[int, ...] | None) -> Subject:
    loaded = checkpoint.load(path)
    architecture = loaded.meta["architecture"]
    mean, std = architecture.get("mean") or [], architecture.get("std") or []
    return Subject(
        name=name,
        source=str(path),
        model=loaded.model,
        network=f"{architecture['network']} with {architecture['activation']}",
        normalisation=_normalisation(mean, std),
        data=loaded.meta.get("data"),
        input_shape=shape,
        some_shape=_some_shape(architecture, len(mean)),
    )


def _some_shape(architecture: dict[str, Any], channels: int) -> tuple[int, ...]:
    """A shape that the network takes; an mlp flattens its images, so any of its size and channels will do."""
    if "input_shape" in architecture:
        return tuple(architecture["input_shape"])
    features, channels = architecture["sizes"][0], max(1, channels)
    return (channels, features // channels, 1)


def _users_own(options: NetworkOptions) -> Subject:
    path = options.model or ""
    model = _made_by(path)
    if options.weights is not None:
        checkpoint.load_weights(model, options.weights)
    shape = None if options.input_shape is None else integers(options.input_shape, "input-shape", "1,28,28")
    mean, std = (
        () if text is None else numbers(text, name) for name, text in (("mean", options.mean), ("std", options.std))
    )
    network = type(model).__name__
    if mean or std:
        model = _normalized(model, Normalize(mean, std, dims=2 if shape is None else len(shape) - 1))
    source = path if options.weights is None else f"{path} with {options.weights}"
    return Subject(path.rpartition(":")[2], source, model, network, _normalisation(mean, std), input_shape=shape)


def _normalized(model: nn.Module, normalize: nn.Module) -> nn.Module:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is not None:
        normalize = normalize.to(first.device, first.dtype)
    return nn.Sequential(OrderedDict(normalize=normalize, model=model)).eval()


def _made_by(path: str) -> nn.Module:
    """Import ``package.module:factory``, also from the current folder, and call it."""
    module, _, name = path.partition(":")
    expected, remedy = "package.module:factory", "--model mynets:small, for def small() in mynets.py"
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise InvalidInput(f"--model {path!r}", expected, remedy)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: a user's models/ must not hide ours
    try:
        made = getattr(importlib.import_module(module), name)()
    except CertifyError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise InvalidInput(f"--model {path}: {reason}", f"{expected} without arguments", remedy) from None
    if not isinstance(made, nn.Module):
        raise InvalidInput(f"--model {path} made a {type(made).__name__}", "a torch.nn.Module", "return the network")
    if made.training:
        raise InvalidModel(
            f"--model {path} made a network in train mode", "eval mode", "return model.eval() in the factory"
        )
    return made


def _normalisation(mean: Any, std: Any) -> str:
    if not len(mean):
        return "none (the network takes images in [0, 1] as they are)"
    return f"mean {', '.join(f'{m:.4g}' for m in mean)}; std {', '.join(f'{s:.4g}' for s in std)}"


def _short(path: Path) -> str:
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return stem.parent.name if stem.name == "model" and stem.parent.name else stem.name or str(path)


def inputs(network: Subject, given: Samples) -> Tensor:
    """Return the samples in the shape that the network takes."""
    shape = network.input_shape
    if shape is None:
        return given.x
    if math.prod(shape) != given.x[0].numel():
        raise InvalidInput(
            f"samples of shape {tuple(given.x.shape[1:])} for {network.name}, which takes {shape}",
            "samples of the network's size",
            "another --data, or the right --input-shape",
        )
    return given.x.reshape(len(given.x), *shape)


def required_shape(network: Subject) -> tuple[int, ...]:
    """Return the shape of the network's inputs; raises ``InvalidInput`` where nobody said it."""
    shape = network.input_shape or network.some_shape
    if shape is None:
        raise InvalidInput(f"no input shape for {network.name}", "the shape of one input", "--input-shape 1,28,28")
    return shape
