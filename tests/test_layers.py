"""The operations against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import layers


def numpy_lrn(x: np.ndarray, n: int, k: float, alpha: float, beta: float) -> np.ndarray:
    """The formula of section 3.3, channel by channel."""
    channels = x.shape[-1]
    normalised = np.empty_like(x)
    for i in range(channels):
        first, last = max(0, i - n // 2), min(channels - 1, i + (n - 1) // 2)
        squares = sum(x[..., j] ** 2 for j in range(first, last + 1))
        normalised[..., i] = x[..., i] / (k + alpha * squares) ** beta
    return normalised


@pytest.mark.parametrize(("n", "alpha"), [(5, 1e-4), (5, 0.5), (3, 0.5), (4, 0.5), (1, 0.5)])
def test_lrn_is_the_papers_formula(n: int, alpha: float) -> None:
    x = np.random.default_rng(0).normal(0, 3, (2, 4, 4, 7))
    constants = {"n": n, "k": 2.0, "alpha": alpha, "beta": 0.75}
    np.testing.assert_allclose(layers.lrn(jnp.array(x), **constants), numpy_lrn(x, **constants), rtol=1e-5)


def test_lrn_gradient_is_that_of_the_formula() -> None:
    generator = np.random.default_rng(0)
    x, weights = generator.normal(0, 3, (2, 2, 2, 7))
    constants = {"n": 5, "k": 2.0, "alpha": 0.5, "beta": 0.75}
    gradient = jax.grad(lambda x: (layers.lrn(x, **constants) * weights).sum())(jnp.array(x))
    step = 1e-6
    for position in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[position] = step
        change = numpy_lrn(x + moved, **constants) - numpy_lrn(x - moved, **constants)
        slope = (change * weights).sum() / (2 * step)
        np.testing.assert_allclose(gradient[position], slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("size", [55, 27, 13, 6])
def test_max_pool_takes_the_maximum_of_each_window(size: int, window: int, stride: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x, (window, window), (1, 2))[:, ::stride, ::stride]
    np.testing.assert_array_equal(layers.max_pool(x, window=window, stride=stride, ceil=False), windows.max((-2, -1)))


@pytest.mark.parametrize(("size", "pooled"), [(55, 27), (27, 13), (13, 6)])
def test_both_poolings_of_the_paper_give_the_same_map(size: int, pooled: int) -> None:
    x = jnp.zeros((1, size, size, 1))
    assert layers.max_pool(x, window=3, stride=2, ceil=False).shape == (1, pooled, pooled, 1)
    assert layers.max_pool(x, window=2, stride=2, ceil=False).shape == (1, pooled, pooled, 1)


def test_a_window_larger_than_the_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window of 3x3 does not fit a map of 2x5: use larger images"):
        layers.max_pool(jnp.zeros((1, 2, 5, 1)), window=3, stride=2, ceil=False)


@pytest.mark.parametrize(("size", "pooled"), [(32, 16), (16, 8), (8, 4), (24, 12), (12, 6), (6, 3), (55, 27), (13, 6)])
def test_a_last_window_may_hang_over_the_edge(size: int, pooled: int) -> None:
    """cuda-convnet's maps of 32 and 24 pixels; no difference to the paper's own."""
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    tops = range(0, 2 * pooled, 2)
    pieces = [[x[:, i : i + 3, j : j + 3] for j in tops] for i in tops]
    for pool, reduce in ((layers.max_pool, np.max), (layers.avg_pool, np.mean)):
        expected = np.stack([np.stack([reduce(piece, (1, 2)) for piece in row], 1) for row in pieces], 1)
        np.testing.assert_allclose(pool(x, window=3, stride=2, ceil=True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [3, 5])
def test_spatial_lrn_is_its_formula(window: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype(np.float32)
    half = window // 2
    expected = np.zeros_like(x)
    for i, j in np.ndindex(6, 7):
        around = x[:, max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1]
        expected[:, i, j] = x[:, i, j] / (1.5 + 0.3 * (around**2).sum((1, 2))) ** 0.75
    normalised = layers.spatial_lrn(jnp.array(x), window=window, k=1.5, alpha=0.3, beta=0.75)
    np.testing.assert_allclose(normalised, expected, rtol=1e-5)
