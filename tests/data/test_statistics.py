"""Tests of the dataset statistics: measured once on all training images, stored beside them and in a run."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from alexnet_jax.config import SUBTRACT
from alexnet_jax.data import datasets, loader, prepare, sources, statistics
from alexnet_jax.run_dir import DamagedFileError
from support import run_config

SIZE = 24


@pytest.fixture
def prepared(photos: Path, tmp_path: Path) -> Path:
    """Prepare `photos`; return the folder of datasets."""
    prepare.prepare(sources.folder(photos), SIZE, str(tmp_path))
    return tmp_path


@pytest.fixture
def counted_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one element with each pass over the training images."""
    passes: list[int] = []
    moments = statistics.moments

    def counting_moments(*arguments: Any) -> Any:
        passes.append(1)
        return moments(*arguments)

    monkeypatch.setattr(statistics, "moments", counting_moments)
    return passes


def data_config(folder: Path, **changes: Any) -> ConfigDict:
    values = {
        "name": "photos",
        "data_dir": str(folder),
        "image_size": SIZE,
        "eval_split": "validation",
        "subtract": "mean_image",
        "augment.colour.noise": 0.1,
        **changes,
    }
    return run_config("cifar10", **{f"data.{key}": value for key, value in values.items()}).data


def train_images(dataset: datasets.Dataset) -> np.ndarray:
    return loader.read(dataset.train, np.arange(len(dataset.train)), SIZE)["image"].astype(np.float64)


def assert_equal(one: statistics.Statistics, other: statistics.Statistics | None) -> None:
    assert other is not None
    for array, other_array in zip(one, other, strict=True):
        np.testing.assert_array_equal(array, other_array)


def test_statistics_match_numpy(prepared: Path) -> None:
    config = data_config(prepared)
    dataset = datasets.load(config)
    measured = statistics.measure(dataset, config)
    images = train_images(dataset)
    np.testing.assert_allclose(measured.mean, images.mean(axis=0), rtol=1e-6)
    covariance = np.cov(images.reshape(-1, 3).T, bias=True)
    np.testing.assert_allclose(measured.axes @ measured.axes.T, np.eye(3), atol=1e-6)
    rebuilt = measured.axes.T @ np.diag(measured.deviations**2) @ measured.axes
    np.testing.assert_allclose(rebuilt, covariance, rtol=1e-5, atol=1e-4 * covariance.max())
    assert list(measured.deviations) == sorted(measured.deviations, reverse=True)


def test_moments_are_exact_in_any_order(prepared: Path) -> None:
    """The sums are of integers, so the number of threads changes nothing."""
    dataset = datasets.load(data_config(prepared))
    one = statistics.moments(dataset, data_config(prepared, threads=1))
    four = statistics.moments(dataset, data_config(prepared, threads=4))
    np.testing.assert_array_equal(one[0], four[0])
    np.testing.assert_array_equal(one[1], four[1])
    np.testing.assert_array_equal(one[0], train_images(dataset).sum(0) / 40)


@pytest.mark.parametrize("subtract", SUBTRACT)
def test_mean_follows_config(prepared: Path, subtract: str) -> None:
    config = data_config(prepared, subtract=subtract, mean=(1.0, 2.0, 3.0))
    dataset = datasets.load(config)
    mean = statistics.measure(dataset, config).mean
    image = train_images(dataset).mean(0)
    colours: dict[str, Any] = {"mean": (1, 2, 3), "mean_pixel": image.mean((0, 1))}
    colour = colours.get(subtract)
    np.testing.assert_allclose(mean, image if colour is None else np.broadcast_to(colour, image.shape), rtol=1e-6)
    assert mean.dtype == np.float32


def test_images_are_not_read_for_constant_mean_without_noise(prepared: Path, counted_passes: list[int]) -> None:
    config = data_config(prepared, subtract="mean", mean=(7.0,), **{"augment.colour.noise": 0.0})
    assert (statistics.measure(datasets.load(config), config).mean == 7).all()
    assert not counted_passes


def test_statistics_are_measured_again_only_when_images_change(prepared: Path, counted_passes: list[int]) -> None:
    config = data_config(prepared)
    dataset = datasets.load(config)
    first = statistics.measure(dataset, config)
    assert_equal(first, statistics.measure(datasets.load(config), config))
    assert len(counted_passes) == 1
    assert dataset.folder is not None
    assert len(list(dataset.folder.glob("statistics_*.npz"))) == 1
    half = data_config(prepared, train_split="train[:50%]")
    statistics.measure(datasets.load(half), half)
    assert len(counted_passes) == 2
    statistics.measure(dataclasses.replace(dataset, fingerprint="of other images"), config)
    assert len(counted_passes) == 3


def test_read_only_dataset_folder_is_no_error(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(statistics, "atomic_write", refuse)
    config = data_config(prepared)
    assert statistics.measure(datasets.load(config), config).mean.shape == (SIZE, SIZE, 3)


def test_run_keeps_its_statistics(prepared: Path, tmp_path: Path) -> None:
    """The file of a run wins over the dataset."""
    config, path = data_config(prepared), tmp_path / "run" / "statistics.npz"
    dataset = datasets.load(config)
    assert statistics.read(path) is None
    measured = statistics.load_or_measure(path, dataset, config)
    assert_equal(measured, statistics.read(path))
    changed = measured._replace(mean=measured.mean + 1)
    statistics.write(path, changed)
    assert_equal(changed, statistics.load_or_measure(path, dataset, config))


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY"])
def test_statistics_that_cannot_be_read_are_measured_again(
    prepared: Path, tmp_path: Path, counted_passes: list[int], content: bytes
) -> None:
    config, file = data_config(prepared), tmp_path / "run" / "statistics.npz"
    dataset = datasets.load(config)
    measured = statistics.load_or_measure(file, dataset, config)
    assert dataset.folder is not None
    (stored,) = dataset.folder.glob("statistics_*.npz")
    for path in (file, stored):
        path.write_bytes(content or path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"statistics.npz: cannot be read .*must have the arrays mean, dev"):
        statistics.read(file)
    assert_equal(measured, statistics.load_or_measure(file, dataset, config))
    assert len(counted_passes) == 2
    assert_equal(measured, statistics.read(file))
