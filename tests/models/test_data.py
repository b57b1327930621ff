"""Data sets: fixed disjoint splits, honest refusals, random subsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from certify.errors import InvalidFile, InvalidInput
from models.data import Dataset, load, subset

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def check(data: Dataset) -> None:
    """What every data set promises."""
    for x, y in ((data.train_x, data.train_y), (data.val_x, data.val_y), (data.test_x, data.test_y)):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert len(x) == len(y)
        if len(x):
            assert 0 <= float(x.min()) <= float(x.max()) <= 1
            assert 0 <= int(y.min()) <= int(y.max()) < data.classes
            assert tuple(x.shape[1:]) == data.input_shape


def test_digits_are_split_once_and_for_all() -> None:
    data, again = load("digits"), load("digits")
    check(data)
    assert (len(data.train_x), len(data.val_x), len(data.test_x)) == (1149, 198, 450)
    assert data.input_shape == (1, 8, 8)
    assert torch.equal(data.test_x, again.test_x)
    assert torch.equal(data.train_y, again.train_y)
    from sklearn.datasets import load_digits

    rows = torch.cat([data.train_x, data.val_x, data.test_x]).flatten(1).mul(16).int().tolist()
    assert sorted(rows) == sorted(load_digits().data.astype(int).tolist())


def test_mean_and_std_are_those_of_the_training_images() -> None:
    data = load("digits")
    assert data.mean[0] == pytest.approx(float(data.train_x.double().mean()), rel=1e-5)
    assert data.std[0] == pytest.approx(float(data.train_x.double().std()), rel=1e-5)


@pytest.mark.shared
def test_mnist_comes_from_torchvisions_files() -> None:
    if not (SHARED / "torchvision").is_dir():
        pytest.skip("the shared MNIST files are absent")
    data = load("mnist", data_dir=SHARED / "torchvision")
    check(data)
    assert (len(data.train_x), len(data.val_x), len(data.test_x)) == (55_000, 5_000, 10_000)
    assert data.input_shape == (1, 28, 28)
    first = np.load(SHARED / "images" / "mnist_test100.npz")
    assert torch.equal(data.test_x[:100].mul(255).round().byte(), torch.from_numpy(first["images_u8"]))
    assert data.test_y[:100].tolist() == first["labels"].tolist()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_absent_data_says_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="--download") as error:
        load(name, data_dir=tmp_path)
    assert error.value.exit_code == 5
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidInput, match="data-dir"):
        load(name)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="cifar10, digits"):
        load("imagenet")


def test_a_test_only_file(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images_u8=images, labels=np.arange(6))
    data = load(f"npz:{tmp_path / 'a.npz'}")
    check(data)
    assert (len(data.train_x), len(data.val_x), len(data.test_x)) == (0, 0, 6)
    assert (data.classes, data.mean, data.std) == (6, (0.0,), (1.0,))
    torch.testing.assert_close(data.test_x, torch.from_numpy(images).float() / 255)


def test_a_file_with_training_rows(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    np.savez(
        tmp_path / "b.npz",
        images=draw.random((5, 7)),
        labels=np.array([0, 1, 0, 1, 1]),
        train_images=draw.random((40, 7)),
        train_labels=draw.integers(0, 2, 40),
        classes=3,
    )
    data = load(f"npz:{tmp_path / 'b.npz'}")
    check(data)
    assert (len(data.train_x), len(data.val_x), len(data.test_x), data.classes) == (36, 4, 5, 3)


X, Y = np.random.default_rng(0).random((4, 1, 3, 3)), np.array([0, 1, 2, 1])


@pytest.mark.parametrize(
    "arrays",
    [
        {"labels": Y},
        {"images": X},
        {"images": X[:3], "labels": Y},
        {"images": X[:0], "labels": Y[:0]},
        {"images": X * 255, "labels": Y},
        {"images": X - 1, "labels": Y},
        {"images": np.where(X > 0.5, np.nan, X), "labels": Y},
        {"images": X, "labels": -Y},
        {"images": X, "labels": Y.astype(float)},
        {"images": (X * 255).astype(np.uint8), "labels": Y},
        {"images_u8": X, "labels": Y},
        {"images": X, "labels": Y, "classes": 2},
        {"images": X.astype(object), "labels": Y},
        {"images": X, "labels": Y, "train_images": X[:, :, :2], "train_labels": Y},
    ],
)
def test_refuses_bad_arrays(arrays: dict, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InvalidFile, match=r"bad\.npz") as error:
        load(f"npz:{tmp_path / 'bad.npz'}")
    assert len(str(error.value).splitlines()) <= 3


def test_refuses_what_is_no_npz_file(tmp_path: Path) -> None:
    np.save(tmp_path / "single.npy", X)
    np.savez(tmp_path / "whole.npz", images=X, labels=Y)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:300])
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("not an archive")
    torch.save({"images": torch.rand(2)}, tmp_path / "pickle.npz")
    for name in ("single.npy", "cut.npz", "empty.npz", "text.npz", "pickle.npz", "absent.npz", ""):
        with pytest.raises(InvalidFile) as error:
            load(f"npz:{tmp_path / name}")
        assert len(str(error.value).splitlines()) <= 3


def test_subsets_are_random_seeded_and_know_their_places() -> None:
    data = load("digits")
    x, y, index = subset(data.test_x, data.test_y, 50, 3)
    again, other = (subset(data.test_x, data.test_y, 50, seed)[2] for seed in (3, 4))
    assert torch.equal(index, again)
    assert not torch.equal(index, other)
    assert not torch.equal(index, torch.arange(50))
    assert len(set(index.tolist())) == 50
    assert torch.equal(x, data.test_x[index])
    assert torch.equal(y, data.test_y[index])
    for n in (0, 451):
        with pytest.raises(InvalidInput):
            subset(data.test_x, data.test_y, n, 0)


def test_training_images_may_come_from_a_file_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, n in (("train", 30), ("test", 12), ("a,b", 5)):
        np.savez(tmp_path / f"{name}.npz", images=rng.random((n, 1, 4, 4)), labels=np.arange(n) % 3)
    data = load(f"npz:{tmp_path / 'train.npz'},{tmp_path / 'test.npz'}")
    check(data)
    assert (len(data.train_x), len(data.val_x), len(data.test_x)) == (27, 3, 12)
    assert load(data.name).name == data.name
    assert len(load(f"npz:{tmp_path / 'a,b.npz'}").test_x) == 5
    with pytest.raises(InvalidFile, match=r"absent\.npz"):
        load(f"npz:{tmp_path / 'absent.npz'},{tmp_path / 'test.npz'}")
