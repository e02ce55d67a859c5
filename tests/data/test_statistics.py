"""Mean image and colours are those of all training images, measured once and kept beside them."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import run_config
from ml_collections import ConfigDict

from alexnet_jax import batches, data, originals, pixels, prepare

SIZE = 24


@pytest.fixture
def prepared(photos: Path, tmp_path: Path) -> Path:
    prepare.prepare(originals.folder(photos), SIZE, str(tmp_path))
    return tmp_path


def data_config(folder: Path, **changes) -> ConfigDict:
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


def all_images(dataset: data.DataSet) -> np.ndarray:
    return batches.read(dataset.train, np.arange(len(dataset.train)), SIZE)["image"].astype(np.float64)


def test_they_are_what_numpy_finds_in_all_images_at_once(prepared: Path) -> None:
    config = data_config(prepared)
    dataset = data.load(config)
    measured = pixels.measured(dataset, config)
    images = all_images(dataset)
    np.testing.assert_allclose(measured.mean, images.mean(axis=0), rtol=1e-6)
    covariance = np.cov(images.reshape(-1, 3).T, bias=True)
    # The axes are at right angles and diagonalise it.
    np.testing.assert_allclose(measured.axes @ measured.axes.T, np.eye(3), atol=1e-6)
    rebuilt = measured.axes.T @ np.diag(measured.deviations**2) @ measured.axes
    np.testing.assert_allclose(rebuilt, covariance, rtol=1e-5, atol=1e-4 * covariance.max())
    assert list(measured.deviations) == sorted(measured.deviations, reverse=True)


def test_the_moments_are_exact(prepared: Path) -> None:
    """Sums of whole numbers: the same to the last digit in any order."""
    dataset = data.load(data_config(prepared))
    one = pixels.moments(dataset, data_config(prepared, threads=1))
    two = pixels.moments(dataset, data_config(prepared, threads=4))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    np.testing.assert_array_equal(one[0], all_images(dataset).sum(0) / 40)


@pytest.mark.parametrize("subtract", pixels.SUBTRACT)
def test_what_is_subtracted_is_the_configs_choice(prepared: Path, subtract: str) -> None:
    config = data_config(prepared, subtract=subtract, mean=(1.0, 2.0, 3.0))
    dataset = data.load(config)
    mean = pixels.measured(dataset, config).mean
    image = all_images(dataset).mean(0)
    pixel = {"mean": (1, 2, 3), "mean_pixel": image.mean((0, 1))}.get(subtract)
    expected = image if pixel is None else np.broadcast_to(pixel, image.shape)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    assert mean.dtype == np.float32


def test_nothing_is_read_where_nothing_is_wanted(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_config(prepared, subtract="mean", mean=(7.0,), **{"augment.colour.noise": 0.0})
    monkeypatch.setattr(pixels, "moments", None)
    assert (pixels.measured(data.load(config), config).mean == 7).all()


def test_they_are_measured_once_and_again_when_the_images_change(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    moments = pixels.moments
    monkeypatch.setattr(pixels, "moments", lambda *arguments: passes.append(1) or moments(*arguments))
    config = data_config(prepared)
    first = pixels.measured(data.load(config), config)
    again = pixels.measured(data.load(config), config)
    assert len(passes) == 1
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    pixels.measured(data.load(data_config(prepared, train_split="train[:50%]")), config)
    assert len(passes) == 2
    (shard,) = (prepared / "photos" / f"{SIZE}px" / "1.0.0").glob("*train*")
    os.utime(shard)
    pixels.measured(data.load(config), config)
    assert len(passes) == 3


def test_a_set_in_a_folder_that_cannot_be_written_is_measured_all_the_same(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(pixels.records, "whole", refuse)
    config = data_config(prepared)
    assert pixels.measured(data.load(config), config).mean.shape == (SIZE, SIZE, 3)


def test_they_are_read_as_they_were_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    written = pixels.Pixels(*(generator.normal(size=shape).astype(np.float32) for shape in ((4, 4, 3), (3,), (3, 3))))
    assert pixels.read(tmp_path / pixels.FILE) is None
    pixels.write(tmp_path / pixels.FILE, written)
    for one, other in zip(written, pixels.read(tmp_path / pixels.FILE), strict=True):
        np.testing.assert_array_equal(one, other)
