"""Crops and flips: each view is a piece of its image."""

import jax
import numpy as np
import pytest
from conftest import run_config
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_jax import augment


def images(batch: int, size: int, channels: int) -> np.ndarray:
    """Images in which every pixel says where it is."""
    return np.arange(batch * size * size * channels).astype(np.uint8).reshape(batch, size, size, channels)


def data_config(**changes):
    return run_config(
        **{f"data.{key}": value for key, value in {"mean": (0.0,), "std": (1.0,), **changes}.items()}
    ).data


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 9), border=st.integers(0, 4), flip=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_a_random_view_is_a_crop_of_its_image_or_the_mirror_of_one(
    size: int, border: int, flip: bool, seed: int
) -> None:
    batch = images(5, size + border, 3)
    config = data_config(crop=size, **{"augment.random_crop": True, "augment.flip": flip})
    views = np.asarray(augment.random_views(batch, config, jax.random.key(seed)))
    for image, view in zip(batch, views, strict=True):
        crops = [image[i : i + size, j : j + size] for i in range(border + 1) for j in range(border + 1)]
        crops += [crop[:, ::-1] for crop in crops] if flip else []
        assert any(np.array_equal(view, crop) for crop in crops)


def test_every_crop_and_mirror_comes_up_about_equally_often() -> None:
    batch = np.repeat(images(1, 4, 1), 4000, axis=0)
    config = data_config(crop=2, **{"augment.random_crop": True, "augment.flip": True})
    views = np.asarray(augment.random_views(batch, config, jax.random.key(0)))
    _, counts = np.unique(views.reshape(4000, -1), axis=0, return_counts=True)
    assert len(counts) == 3 * 3 * 2
    # 4000/18 = 222 each; the standard deviation is 14.5
    assert counts.min() > 222 - 5 * 14.5
    assert counts.max() < 222 + 5 * 14.5


def test_switched_off_training_sees_what_evaluation_sees() -> None:
    batch = images(3, 9, 1)
    config = data_config(crop=6, **{"augment.random_crop": False, "augment.flip": False})
    views = augment.random_views(batch, config, jax.random.key(0))
    np.testing.assert_array_equal(views, augment.centre_views(batch, config))
    np.testing.assert_array_equal(views, batch[:, 1:7, 1:7])


@pytest.mark.parametrize("mean", [(10.0,), (10.0, 20.0, 30.0)])
def test_the_mean_is_subtracted_before_the_scale(mean: tuple[float, ...]) -> None:
    batch = images(2, 4, 3)
    views = augment.centre_views(batch, data_config(crop=4, mean=mean, std=(2.0,)))
    np.testing.assert_allclose(views, (batch.astype(np.float32) - np.array(mean)) / 2, rtol=1e-6)


@pytest.mark.parametrize("chunk", [4, 5])
def test_images_of_a_chunk_are_cropped_and_flipped_alike(chunk: int) -> None:
    """As in the 2012 code, where a chunk has 32 images; the last one may be cut off."""
    batch = np.repeat(images(1, 12, 1), 14, axis=0)
    views = np.asarray(augment.random_views(batch, data_config(crop=5, **{"augment.chunk": chunk}), jax.random.key(0)))
    kinds = [np.unique(views[i : i + chunk], axis=0) for i in range(0, 14, chunk)]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(np.unique(np.concatenate(kinds), axis=0)) > 1


COLOUR = {"stds": (9.0, 5.0, 2.0), "axes": ((0.6, 0.0, 0.8), (0.0, 1.0, 0.0), (-0.8, 0.0, 0.6))}


def test_colour_noise_has_the_covariance_of_the_colours() -> None:
    """Section 4.1, by standard deviations: covariance axes' diag(0.1 std)^2 axes; the same on all pixels."""
    config = data_config(crop=2, **{f"augment.colour.{key}": value for key, value in {"noise": 0.1, **COLOUR}.items()})
    batch = np.full((20_000, 2, 2, 3), 100, np.uint8)
    noise = np.asarray(augment.random_views(batch, config, jax.random.key(0))) - 100
    np.testing.assert_array_equal(noise, np.broadcast_to(noise[:, :1, :1], noise.shape))
    axes, deviations = np.array(COLOUR["axes"]), 0.1 * np.array(COLOUR["stds"])
    expected = axes.T @ np.diag(deviations**2) @ axes
    # The standard error of a covariance is at most variance * sqrt(2 / n).
    tolerance = 5 * deviations.max() ** 2 * (2 / 20_000) ** 0.5
    np.testing.assert_allclose(np.cov(noise[:, 0, 0].T), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(noise.mean((0, 1, 2)), 0, atol=5 * deviations.max() / 20_000**0.5)


def test_the_2012_code_shrinks_noisy_images_and_ends_the_noise() -> None:
    """The colours' noise is added first, then all is divided by 1.1; neither is done once the noise has ended."""
    changes = {"mean": (50.0,), "augment.random_crop": False, "augment.flip": False, "augment.colour.noise": 0.1}
    batch, key = images(3, 4, 3), jax.random.key(0)
    plain, shrunk = (
        np.asarray(
            augment.random_views(batch, data_config(crop=4, **changes, **{"augment.colour.shrink": shrink}), key)
        )
        for shrink in (False, True)
    )
    np.testing.assert_allclose(shrunk, plain / 1.1, rtol=1e-5)
    config = data_config(crop=4, **changes)
    over = augment.random_views(batch, config, key, colours=False)
    np.testing.assert_array_equal(over, augment.centre_views(batch, config))


def test_imagenets_axes_are_at_right_angles() -> None:
    """From cuda-convnet2, to four digits; the first is grey."""
    axes = np.array(run_config("imagenet2012").data.augment.colour.axes)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=2e-4)
    assert np.ptp(axes[0]) < 0.03
