"""Data sets with a fixed split in train, validation and test: digits, torchvision's, and .npz files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from certify.errors import InvalidFile, InvalidInput, unknown_name
from models.files import tensor_digest

#: The seed of every split: a split is part of the data set, not of an experiment.
SPLIT_SEED = 0

Images = Float[Tensor, "n *shape"]
Labels = Int[Tensor, "n"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in [0, 1] (float32, [n, *input_shape]) and true labels (int64, 0..classes-1) in three splits.

    ``mean`` and ``std`` are those of the training images, per channel; (0,) and (1,) for files with a test
    split alone, whose train and validation splits are empty.
    """

    name: str
    train_x: Images
    train_y: Labels
    val_x: Images
    val_y: Labels
    test_x: Images
    test_y: Labels
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.test_x.shape[1:])

    def digest(self) -> str:
        """Return a SHA-256 of all images and labels."""
        return tensor_digest({name: value for name, value in vars(self).items() if isinstance(value, Tensor)})


def trainable(data: Dataset) -> Dataset:
    """Return the data set. Raises ``InvalidInput`` where it has test images alone."""
    if len(data.train_x) == 0 or len(data.val_x) == 0:
        raise InvalidInput(
            f"{data.name} has test images alone, no training images",
            "training and validation images",
            "train_images in the file",
        )
    return data


def load(name: str, *, data_dir: str | Path | None = None, download: bool = False) -> Dataset:
    """Return a data set by name: digits, mnist, fashion-mnist, cifar10, or npz:PATH.

    ``data_dir`` is torchvision's root folder; nothing is fetched unless ``download``. An .npz file holds
    ``images`` (floats in [0, 1]) or ``images_u8`` (0..255), [n, C, H, W] or [n, features], and ``labels``
    [n]: its test split; optionally ``train_images`` (or ``train_images_u8``) and ``train_labels``, and
    ``classes``. ``npz:TRAIN,TEST`` takes the training images from a file of their own, as ``images`` there.

    Raises ``InvalidInput`` for unknown names, ``InvalidFile`` for absent or damaged data.
    """
    if name.startswith("npz:"):
        return _load_npz(*_npz_paths(name.removeprefix("npz:")))
    if name == "digits":
        return _load_digits()
    if name in TORCHVISION:
        return _load_torchvision(name, data_dir, download)
    raise unknown_name("dataset", name, ("digits", *TORCHVISION, "npz:PATH"))


def subset(x: Images, y: Labels, n: int, seed: int) -> tuple[Images, Labels, Int[Tensor, "n"]]:
    """Return ``n`` samples drawn at random without replacement, their labels, and their (increasing) places.

    The same seed draws the same samples on every device. Raises ``InvalidInput`` unless 1 <= n <= len(x).
    """
    if not 1 <= n <= len(x):
        raise InvalidInput(
            f"{n} samples asked for", f"1 to {len(x)}, as many as there are", "ask for fewer, at least 1"
        )
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    return x[index], y[index], index


def _load_digits() -> Dataset:
    """8x8 digits embedded in scikit-learn: 1149 train, 198 validation, 450 test images."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.from_numpy(raw.images).float().div(16).unsqueeze(1)
    y = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, rest = order[:450], order[450:]
    return _with_validation("digits", (x[rest], y[rest]), (x[test], y[test]), classes=10, held_out=198)


def _torchvision_images(dataset: Any) -> tuple[Images, Labels]:
    data = torch.as_tensor(dataset.data)
    data = data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2)
    return data.float().div_(255).contiguous(), torch.as_tensor(dataset.targets).long()


#: Name to (torchvision class, validation images).
TORCHVISION = {
    "mnist": ("MNIST", 5000),
    "fashion-mnist": ("FashionMNIST", 5000),
    "cifar10": ("CIFAR10", 5000),
}


def _load_torchvision(name: str, data_dir: str | Path | None, download: bool) -> Dataset:
    """Torchvision checks the MD5 sums of the files before it reads them (CIFAR-10's hold pickles)."""
    if data_dir is None:
        raise InvalidInput(f"no folder for {name}", "torchvision's root folder", "--data-dir FOLDER (data_dir=)")
    from torchvision import datasets

    kind, held_out = TORCHVISION[name]
    make: Callable[..., Any] = getattr(datasets, kind)
    try:
        splits = [_torchvision_images(make(str(data_dir), train=train, download=download)) for train in (True, False)]
    except Exception as error:  # torchvision raises RuntimeError, OSError, URLError, EOFError, ...
        raise InvalidFile(
            f"no readable {name} in {data_dir} ({type(error).__name__})",
            f"the files of torchvision.datasets.{kind}",
            "check the folder, or fetch the data with --download (download=True)",
        ) from None
    return _with_validation(name, *splits, classes=10, held_out=held_out)


def _with_validation(
    name: str, train: tuple[Images, Labels], test: tuple[Images, Labels], *, classes: int, held_out: int
) -> Dataset:
    """Hold ``held_out`` random training images out for validation."""
    x, y = train
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    val, rest = order[:held_out], order[held_out:]
    train_x = x[rest]
    mean, std = _statistics(train_x)
    return Dataset(name, train_x, y[rest], x[val], y[val], *test, classes, mean, std)


def _statistics(x: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images; one pair for rows of features."""
    channels = x.transpose(0, 1).flatten(1) if x.ndim == 4 else x.reshape(1, -1)
    mean, std = channels.mean(1), channels.std(1).clamp(min=1e-6)
    return tuple(mean.tolist()), tuple(std.tolist())


def _npz_paths(words: str) -> tuple[Path, ...]:
    """The file of the test images, and that of the training images if there is one; a name may hold commas itself."""
    first, comma, second = words.partition(",")
    return (Path(words),) if not comma or Path(words).exists() else (Path(second), Path(first))


def _load_npz(path: Path, training: Path | None = None) -> Dataset:
    arrays = _read_npz(path)
    test = _labelled(path, arrays, "")
    has_train = training is not None or "train_labels" in arrays
    if training is not None:
        train = _labelled(training, _read_npz(training), "")
    else:
        train = _labelled(path, arrays, "train_") if has_train else (test[0][:0], test[1][:0])
    classes = max(2, 1 + int(max(labels.max() for _, labels in (train, test) if len(labels))))
    if "classes" in arrays:
        if arrays["classes"].size != 1 or int(arrays["classes"].item()) < classes:
            raise _bad(path, f"'classes' is {arrays['classes']}", f"one number, at least {classes}")
        classes = int(arrays["classes"].item())
    if train[0].shape[1:] != test[0].shape[1:]:
        raise _bad(path, "train and test images of different shapes", "one shape")
    name = f"npz:{path}" if training is None else f"npz:{training},{path}"
    if not has_train:
        return Dataset(name, *train, *train, *test, classes, (0.0,), (1.0,))
    return _with_validation(name, train, test, classes=classes, held_out=max(1, len(train[0]) // 10))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream:  # numpy forgets to close what it cannot read
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            with file:
                return {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise InvalidFile(f"no file {path}", "an .npz file with images and labels", "check the path") from None
    except (OSError, ValueError, EOFError, TypeError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise _bad(path, f"unreadable ({type(error).__name__})", "an .npz file without pickles") from None


def _labelled(path: Path, arrays: dict[str, np.ndarray], prefix: str) -> tuple[Images, Labels]:
    """Validate one split and return it as tensors."""
    key = f"{prefix}images_u8" if f"{prefix}images_u8" in arrays else f"{prefix}images"
    for needed in (key, f"{prefix}labels"):
        if needed not in arrays:
            raise _bad(path, f"no array {needed!r} among {sorted(arrays)}", "images (or images_u8) and labels")
    images, labels = arrays[key], arrays[f"{prefix}labels"]
    if images.ndim not in (2, 3, 4) or labels.shape != images.shape[:1] or images.size == 0:
        raise _bad(
            path,
            f"{key} {images.shape}, labels {labels.shape}",
            "[n, C, H, W] or [n, features] and [n], not empty",
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise _bad(path, f"labels {labels.dtype} from {labels.min()}", "integers from 0")
    bytes_ = key.endswith("_u8")
    if images.dtype.kind not in ("u" if bytes_ else "f") or (bytes_ and images.dtype.itemsize != 1):
        raise _bad(path, f"{key} of type {images.dtype}", "floats in images, uint8 in images_u8")
    x = torch.from_numpy(images.astype(np.float32)) / (255 if bytes_ else 1)
    if not bool(torch.isfinite(x).all()) or x.min() < 0 or x.max() > 1:
        raise _bad(path, f"{key} in [{float(x.min()):.4g}, {float(x.max()):.4g}]", "finite numbers in [0, 1]")
    return (x.unsqueeze(1) if x.ndim == 3 else x), torch.from_numpy(labels.astype(np.int64))


def _bad(path: Path, got: str, expected: str) -> InvalidFile:
    return InvalidFile(f"{path}: {got}", expected, "numpy.savez(path, images=..., labels=...)")
