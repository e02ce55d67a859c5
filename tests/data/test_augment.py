"""Tests of the input transformations: views, mean subtraction and colour noise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from alexnet_jax.data import augment
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.parallel import DATA, TOWER, global_positions, make_executor
from support import random_statistics, run_config


def numbered_images(batch: int, size: int, channels: int) -> np.ndarray:
    """Return images whose pixels differ by their position."""
    return np.arange(batch * size * size * channels).astype(np.uint8).reshape(batch, size, size, channels)


def make_config(image_size: int, crop: int, **changes: Any) -> ConfigDict:
    values = {"subtract": "mean_image", "std": (1.0,), "image_size": image_size, "crop": crop}
    return run_config(**{f"data.{key}": value for key, value in {**values, **changes}.items()}).data


def make_statistics(config: ConfigDict, channels: int = 3) -> Statistics:
    """Return statistics with a mean image of whole numbers, so that differences are exact."""
    statistics = random_statistics(ConfigDict({"data": config}), channels)
    return statistics._replace(mean=statistics.mean.round())


def random_inputs(batch: np.ndarray, config: ConfigDict, seed: int = 0, noise_on: bool = True) -> np.ndarray:
    """Return the training inputs of a batch, compiled with the statistics as an argument."""

    @jax.jit
    def inputs(statistics: Statistics, key: jax.Array) -> jax.Array:
        return augment.random_inputs(batch, jnp.arange(len(batch)), config, statistics, key, noise_on)

    return np.asarray(inputs(make_statistics(config, batch.shape[-1]), jax.random.key(seed)))


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(size=st.integers(1, 9), border=st.integers(0, 4), flip=st.booleans(), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("subtract", ["mean_image", "central_mean_image"])
def test_random_view_is_crop_minus_mean_or_its_mirror_image(
    subtract: str, size: int, border: int, flip: bool, seed: int
) -> None:
    """The mean is cropped like the image (section 2), or at its centre and never mirrored (the 2012 code)."""
    batch = numbered_images(5, size + border, 3)
    config = make_config(size + border, size, subtract=subtract, **{"augment.random_crop": True, "augment.flip": flip})
    mean, middle = make_statistics(config).mean, slice(border // 2, border // 2 + size)
    for image, view in zip(batch, random_inputs(batch, config, seed), strict=True):
        squares = [(slice(i, i + size), slice(j, j + size)) for i in range(border + 1) for j in range(border + 1)]
        if subtract == "mean_image":
            crops = [image[square] - mean[square] for square in squares]
            crops += [crop[:, ::-1] for crop in crops] if flip else []
        else:
            crops = [image[square] - mean[middle, middle] for square in squares]
            crops += [image[square][:, ::-1] - mean[middle, middle] for square in squares] if flip else []
        assert any(np.array_equal(view, crop) for crop in crops)


@pytest.mark.slow
def test_crops_and_flips_are_uniform() -> None:
    batch = np.repeat(numbered_images(1, 4, 1), 4000, axis=0)
    config = make_config(4, 2, subtract="mean", **{"augment.random_crop": True, "augment.flip": True})
    _, counts = np.unique(random_inputs(batch, config).reshape(4000, -1), axis=0, return_counts=True)
    assert len(counts) == 3 * 3 * 2
    # 4000/18 = 222 each; the standard deviation is 14.5
    assert counts.min() > 222 - 5 * 14.5
    assert counts.max() < 222 + 5 * 14.5


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(size=st.integers(1, 9), border=st.integers(0, 5))
def test_ten_views_match_numpy(size: int, border: int) -> None:
    """Corners, centre and their mirror images, written in NumPy after section 4.1."""
    (image,) = numbered_images(1, size + border, 3)
    config = make_config(size + border, size, std=(2.0,))
    centred = image - make_statistics(config).mean
    middle = slice(border // 2, border // 2 + size)
    corners = [centred[:size, :size], centred[:size, border:], centred[border:, :size], centred[border:, border:]]
    expected = [*corners, centred[middle, middle]]
    expected += [np.flip(view, axis=1) for view in expected]
    views = augment.evaluation_views(10, size + border, size)
    assert augment.evaluation_views(1, size + border, size) == [views[4]]
    for view, square in zip(views, expected, strict=True):
        inputs = augment.inputs(image[None], view, config, make_statistics(config))
        np.testing.assert_array_equal(inputs[0], square / 2)


def test_paper_views_begin_at_0_16_and_32() -> None:
    assert {(view.top, view.left) for view in augment.evaluation_views(10, 256, 224)} == {
        (0, 0), (0, 32), (32, 0), (32, 32), (16, 16),
    }  # fmt: skip


def test_training_uses_centre_crop_without_augmentation() -> None:
    batch = numbered_images(3, 9, 1)
    config = make_config(9, 6, **{"augment.random_crop": False, "augment.flip": False})
    mean = make_statistics(config, 1).mean
    np.testing.assert_array_equal(random_inputs(batch, config), (batch - mean)[:, 1:7, 1:7])


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 5])
def test_consecutive_images_share_crop_and_flip(count: int) -> None:
    """As in the 2012 code, with 32 images; the last group may be smaller."""
    batch = np.repeat(numbered_images(1, 12, 1), 14, axis=0)
    views = random_inputs(batch, make_config(12, 5, **{"augment.code2012.images_per_crop": count}))
    groups = [np.unique(views[i : i + count], axis=0) for i in range(0, 14, count)]
    assert all(len(group) == 1 for group in groups)
    assert len(np.unique(np.concatenate(groups), axis=0)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("unit", [None, 1.0, 255.0])
def test_colour_noise_has_expected_covariance(unit: float | None) -> None:
    """Section 4.1: the covariance is axes' diag(s^2) axes, the same on all pixels.

    s is 0.1 of the standard deviations, or, by the paper's formula, 0.1 of the variances in the unit of measurement.
    """
    colour = {"augment.colour.noise": 0.1, "augment.colour.eigenvalue_unit": unit}
    config = make_config(2, 2, **{"augment.flip": False, **colour})
    batch = np.full((20_000, 2, 2, 3), 100, np.uint8)
    noise = random_inputs(batch, config) - (100 - make_statistics(config).mean)
    deviations, axes = np.array([60.0, 30.0, 10.0]), make_statistics(config).axes
    spread = 0.1 * (deviations if unit is None else deviations**2 / unit)
    expected = axes.T @ np.diag(spread**2) @ axes
    # The standard error of a covariance is at most variance * sqrt(2 / n).
    tolerance = 5 * spread.max() ** 2 * (2 / 20_000) ** 0.5
    np.testing.assert_allclose(np.cov(noise[:, 0, 0].T), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(noise, np.broadcast_to(noise[:, :1, :1], noise.shape), atol=1e-3)
    np.testing.assert_allclose(noise.mean((0, 1, 2)), 0, atol=5 * spread.max() / 20_000**0.5)


@pytest.mark.slow
def test_2012_code_shrinks_noisy_images_and_ends_noise() -> None:
    """The image is divided by 1.1 after the noise is added; once the noise has ended, neither is done."""
    changes = {"augment.random_crop": False, "augment.flip": False, "augment.colour.noise": 0.1}
    batch = numbered_images(3, 4, 3)
    shrink = make_config(4, 4, **changes, **{"augment.code2012.shrink_noise": True})
    plain = random_inputs(batch, make_config(4, 4, **changes))
    np.testing.assert_allclose(random_inputs(batch, shrink), plain / 1.1, rtol=1e-5)
    np.testing.assert_array_equal(random_inputs(batch, shrink, noise_on=False), batch - make_statistics(shrink).mean)
    assert not np.array_equal(plain, batch - make_statistics(shrink).mean)


@pytest.mark.slow
def test_all_executors_augment_alike() -> None:
    """Bit-identical on every tower; equal where the batch is sharded."""
    config = make_config(12, 8, **{"augment.colour.noise": 0.1})
    batch = numbered_images(6, 12, 3)

    def views(tower: jax.Array, images: jax.Array, statistics: Statistics, seed: jax.Array) -> jax.Array:
        positions = global_positions(len(images))
        return augment.random_inputs(images, positions, config, statistics, jax.random.key(seed)) + 0 * tower

    def run(name: str, towers: int, out_axes: str) -> np.ndarray:
        mapped = make_executor(name, towers, 6).map(views, in_axes=(TOWER, DATA, None, None), out_axes=out_axes)
        return np.asarray(mapped(np.zeros(towers, np.float32), batch, make_statistics(config), 7))

    one_device, two_devices = run("vmap", 2, TOWER), run("pmap", 2, TOWER)
    np.testing.assert_array_equal(one_device, two_devices)
    np.testing.assert_array_equal(one_device[0], one_device[1])
    np.testing.assert_allclose(run("shard_map", 1, DATA), one_device[0], rtol=1e-6, atol=1e-5)
