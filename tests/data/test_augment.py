"""What the net sees of an image: each view is a piece of it, less the mean, with noise along the colours' axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import any_pixels, run_config
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from alexnet_jax import augment
from alexnet_jax.pixels import Pixels
from alexnet_jax.towers import Executor

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def images(batch: int, size: int, channels: int) -> np.ndarray:
    """Images in which every pixel says where it is."""
    return np.arange(batch * size * size * channels).astype(np.uint8).reshape(batch, size, size, channels)


def data_config(image_size: int, crop: int, **changes) -> ConfigDict:
    values = {"subtract": "mean_image", "std": (1.0,), "image_size": image_size, "crop": crop}
    return run_config(**{f"data.{key}": value for key, value in {**values, **changes}.items()}).data


def seen(config: ConfigDict, channels: int = 3) -> Pixels:
    """A mean image of whole numbers, so that differences are exact."""
    pixels = any_pixels(ConfigDict({"data": config}), channels)
    return pixels._replace(mean=pixels.mean.round())


def random_inputs(batch: np.ndarray, config: ConfigDict, seed: int = 0, **arguments) -> np.ndarray:
    pixels = seen(config, batch.shape[-1])

    @jax.jit
    def inputs(key: jax.Array) -> jax.Array:
        return augment.random_inputs(batch, jnp.arange(len(batch)), config, pixels, key, **arguments)

    return np.asarray(inputs(jax.random.key(seed)))


@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 9), border=st.integers(0, 4), flip=st.booleans(), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("subtract", ["mean_image", "central_mean_image"])
def test_a_random_view_is_a_crop_less_the_mean_or_the_mirror_of_one(
    subtract: str, size: int, border: int, flip: bool, seed: int
) -> None:
    """Less the mean's same crop, as section 2 has it; or its central crop, mirrored or not, as the 2012 code has it."""
    batch = images(5, size + border, 3)
    config = data_config(size + border, size, subtract=subtract, **{"augment.random_crop": True, "augment.flip": flip})
    mean, middle = seen(config).mean, slice(border // 2, border // 2 + size)
    for image, view in zip(batch, random_inputs(batch, config, seed), strict=True):
        squares = [(slice(i, i + size), slice(j, j + size)) for i in range(border + 1) for j in range(border + 1)]
        if subtract == "mean_image":
            crops = [image[square] - mean[square] for square in squares]
            crops += [crop[:, ::-1] for crop in crops] if flip else []
        else:
            crops = [image[square] - mean[middle, middle] for square in squares]
            crops += [image[square][:, ::-1] - mean[middle, middle] for square in squares] if flip else []
        assert any(np.array_equal(view, crop) for crop in crops)


def test_every_crop_and_mirror_comes_up_about_equally_often() -> None:
    batch = np.repeat(images(1, 4, 1), 4000, axis=0)
    config = data_config(4, 2, subtract="mean", **{"augment.random_crop": True, "augment.flip": True})
    _, counts = np.unique(random_inputs(batch, config).reshape(4000, -1), axis=0, return_counts=True)
    assert len(counts) == 3 * 3 * 2
    # 4000/18 = 222 each; the standard deviation is 14.5
    assert counts.min() > 222 - 5 * 14.5
    assert counts.max() < 222 + 5 * 14.5


@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 9), border=st.integers(0, 5))
def test_ten_views_are_corners_and_centre_and_their_mirror_images(size: int, border: int) -> None:
    """Against a transcription of section 4.1 to NumPy."""
    (image,) = images(1, size + border, 3)
    config = data_config(size + border, size, std=(2.0,))
    less = image - seen(config).mean
    expected = [less[:size, :size], less[:size, border:], less[border:, :size], less[border:, border:]]
    middle = slice(border // 2, border // 2 + size)
    expected.append(less[middle, middle])
    expected += [np.flip(view, axis=1) for view in expected]
    views = augment.evaluation_views(10, size + border, size)
    assert augment.evaluation_views(1, size + border, size) == [views[4]]
    for view, square in zip(views, expected, strict=True):
        found = augment.inputs(image[None], view, config, seen(config))
        np.testing.assert_array_equal(found[0], square / 2)


def test_the_papers_views_begin_at_0_16_and_32() -> None:
    assert {(view.top, view.left) for view in augment.evaluation_views(10, 256, 224)} == {
        (0, 0), (0, 32), (32, 0), (32, 32), (16, 16),
    }  # fmt: skip


def test_switched_off_training_sees_the_centre() -> None:
    batch = images(3, 9, 1)
    config = data_config(9, 6, **{"augment.random_crop": False, "augment.flip": False})
    np.testing.assert_array_equal(random_inputs(batch, config), (batch - seen(config, 1).mean)[:, 1:7, 1:7])


@pytest.mark.parametrize("chunk", [4, 5])
def test_images_of_a_chunk_are_cropped_and_flipped_alike(chunk: int) -> None:
    """As in the 2012 code, where a chunk has 32 images; the last one may be cut off."""
    batch = np.repeat(images(1, 12, 1), 14, axis=0)
    views = random_inputs(batch, data_config(12, 5, **{"augment.chunk": chunk}))
    kinds = [np.unique(views[i : i + chunk], axis=0) for i in range(0, 14, chunk)]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(np.unique(np.concatenate(kinds), axis=0)) > 1


@pytest.mark.parametrize("unit", [None, 1.0, 255.0])
def test_colour_noise_has_the_covariance_of_theory(unit: float | None) -> None:
    """Section 4.1: axes' diag(s^2) axes, the same on all pixels.

    By standard deviations s is 0.1 of each; by the literal formula, 0.1 of the variance, in the unit that it is
    measured in.
    """
    colour = {"augment.colour.noise": 0.1, "augment.colour.eigenvalue_unit": unit}
    config = data_config(2, 2, **{"augment.flip": False, **colour})
    batch = np.full((20_000, 2, 2, 3), 100, np.uint8)
    noise = random_inputs(batch, config) - (100 - seen(config).mean)
    deviations, axes = np.array([60.0, 30.0, 10.0]), seen(config).axes
    spread = 0.1 * (deviations if unit is None else deviations**2 / unit)
    expected = axes.T @ np.diag(spread**2) @ axes
    # The standard error of a covariance is at most variance * sqrt(2 / n).
    tolerance = 5 * spread.max() ** 2 * (2 / 20_000) ** 0.5
    np.testing.assert_allclose(np.cov(noise[:, 0, 0].T), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(noise, np.broadcast_to(noise[:, :1, :1], noise.shape), atol=1e-3)
    np.testing.assert_allclose(noise.mean((0, 1, 2)), 0, atol=5 * spread.max() / 20_000**0.5)


def test_the_2012_code_shrinks_noisy_images_and_ends_the_noise() -> None:
    """The colours' noise is added first, then all is divided by 1.1; neither is done once the noise has ended."""
    changes = {"augment.random_crop": False, "augment.flip": False, "augment.colour.noise": 0.1}
    batch = images(3, 4, 3)
    plain, shrunk = (
        random_inputs(batch, data_config(4, 4, **changes, **{"augment.colour.shrink": shrink}))
        for shrink in (False, True)
    )
    np.testing.assert_allclose(shrunk, plain / 1.1, rtol=1e-5)
    config = data_config(4, 4, **changes)
    np.testing.assert_array_equal(random_inputs(batch, config, colours=False), batch - seen(config).mean)


def test_both_executors_see_the_same() -> None:
    """Bit-equal, on every tower."""
    config = data_config(12, 8, **{"augment.colour.noise": 0.1})
    batch = images(6, 12, 3)

    def views(tower: jax.Array, seed: jax.Array) -> jax.Array:
        return (
            augment.random_inputs(batch, jnp.arange(len(batch)), config, seen(config), jax.random.key(seed)) + 0 * tower
        )

    one, two = (
        np.asarray(Executor(name, 2).map(views, in_axes=(0, None), out_axes=0)(np.zeros(2, np.float32), 7))
        for name in ("vmap", "pmap")
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[0], one[1])
