"""The operations against their definitions."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import layers

pytestmark = pytest.mark.usefixtures("quickly_compiled")


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


def test_lrn_of_bfloat16_is_computed_in_float32() -> None:
    constants = {"n": 5, "k": 2.0, "alpha": 0.5, "beta": 0.75}
    rough = jnp.array(np.random.default_rng(0).normal(0, 3, (2, 4, 4, 7)), jnp.bfloat16)
    exact = layers.lrn(rough.astype(jnp.float32), **constants).astype(jnp.bfloat16)
    np.testing.assert_array_equal(layers.lrn(rough, **constants), exact)


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


def gradients_on(platform: str, operation, *arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The value of an operation and the gradients of a weighted sum of it, in the form of a platform."""

    def platform_dependent(*given, cpu, default):
        return (cpu if platform == "cpu" else default)(*given)

    @jax.jit
    def value_and_gradients(*arguments: jax.Array):
        value, pullback = jax.vjp(operation, *arguments)
        weights = jnp.array(np.random.default_rng(1).normal(size=value.shape), value.dtype)
        return value, pullback(weights)

    with mock.patch.object(layers.lax, "platform_dependent", platform_dependent):
        return value_and_gradients(*arguments)


def convolution(*strides: int, padding: tuple[tuple[int, int], ...]):
    return lambda x, kernel: layers.conv(x, kernel, strides, padding)


OPERATIONS = {
    "conv1": (convolution(4, 4, padding=((0, 3), (0, 3))), (3, 24, 24, 3), (11, 11, 3, 8)),
    "conv2": (convolution(1, 1, padding=((2, 2), (2, 2))), (4, 27, 27, 4), (5, 5, 4, 8)),
    "conv5": (convolution(1, 1, padding=((1, 1), (1, 1))), (6, 13, 13, 4), (3, 3, 4, 8)),
    "small maps, some images at once": (convolution(1, 1, padding=((1, 1), (1, 1))), (6, 9, 9, 4), (3, 3, 4, 8)),
    "other heights than widths, pixels left over": (
        convolution(3, 2, padding=((0, 1), (2, 0))),
        (4, 18, 14, 3),
        (5, 3, 3, 8),
    ),
    "lrn": (lambda x: layers.lrn(x, n=5, k=2.0, alpha=0.5, beta=0.75), (2, 4, 4, 7)),
    "lrn of an even window": (lambda x: layers.lrn(x, n=4, k=2.0, alpha=0.5, beta=0.75), (2, 4, 4, 7)),
    "spatial lrn": (lambda x: layers.spatial_lrn(x, window=3, k=2.0, alpha=0.5, beta=0.75), (2, 6, 5, 3)),
    "max pool": (lambda x: layers.max_pool(x, window=3, stride=2, ceil=False), (2, 13, 13, 3)),
    "max pool without overlap": (lambda x: layers.max_pool(x, window=2, stride=2, ceil=False), (2, 13, 13, 3)),
    "max pool over the edge": (lambda x: layers.max_pool(x, window=3, stride=2, ceil=True), (2, 8, 6, 3)),
    "average pool": (lambda x: layers.avg_pool(x, window=3, stride=2, ceil=False), (2, 13, 13, 3)),
    "average pool without overlap": (lambda x: layers.avg_pool(x, window=2, stride=2, ceil=False), (2, 13, 13, 3)),
    "average pool over the edge": (lambda x: layers.avg_pool(x, window=3, stride=2, ceil=True), (2, 8, 6, 3)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_form_for_cpus_has_the_value_and_the_gradient_of_the_plain_one(name: str, dtype: type) -> None:
    """Among equal maxima, too, of which a map after ReLUs is full."""
    operation, *shapes = OPERATIONS[name]
    generator = np.random.default_rng(0)
    with jax.enable_x64(dtype == np.float64):
        arguments = [jnp.array(np.maximum(generator.normal(size=shape), 0), dtype) for shape in shapes]
        value, gradients = gradients_on("cpu", operation, *arguments)
        plain_value, plain_gradients = gradients_on("gpu", operation, *arguments)
        relative = 1e-12 if dtype == np.float64 else 1e-5
        for fast, plain in zip((value, *gradients), (plain_value, *plain_gradients), strict=True):
            assert fast.dtype == plain.dtype == dtype
            np.testing.assert_allclose(fast, plain, rtol=0, atol=relative * np.abs(plain).max())


def test_a_cpu_runs_the_form_for_cpus_and_a_tpu_the_plain_one() -> None:
    """Read off the program: XLA's gradient of a max pooling is a select-and-scatter."""
    x = jnp.zeros((1, 13, 13, 1))
    gradient = jax.jit(jax.grad(lambda x: layers.max_pool(x, window=3, stride=2, ceil=False).sum()))
    for platform, plain in (("cpu", False), ("tpu", True)):
        program = jax.export.export(gradient, platforms=[platform])(x).mlir_module()
        assert ("select_and_scatter" in program) == plain


@pytest.mark.parametrize("mapped", [(0, 0), (None, 0), (0, None)])
def test_mapped_convolutions_are_no_grouped_ones(mapped: tuple[int | None, int | None]) -> None:
    generator = np.random.default_rng(0)
    shapes = ((4, 9, 9, 2), (3, 3, 2, 4))
    images, kernels = (
        jnp.array(generator.normal(size=shape if axis is None else (2, *shape)), jnp.float32)
        for shape, axis in zip(shapes, mapped, strict=True)
    )
    conv = convolution(1, 1, padding=((1, 1), (1, 1)))

    def both(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        value, pullback = jax.vjp(conv, images, kernel)
        return value, *pullback(jnp.cos(value))

    together = jax.jit(jax.vmap(both, in_axes=mapped))
    assert "feature_group_count = 2" not in together.lower(images, kernels).as_text()
    for tower in range(2):
        alone = both(*(a if axis is None else a[tower] for a, axis in zip((images, kernels), mapped, strict=True)))
        for one, other in zip(together(images, kernels), alone, strict=True):
            np.testing.assert_allclose(one[tower], other, rtol=1e-5, atol=1e-5)


def test_gradients_keep_no_sums_and_no_padded_images() -> None:
    """Read off compiled gradients: of each layer of a chain, XLA keeps its convolution and its normalisation."""
    images, kernel = jnp.ones((4, 27, 27, 8)), jnp.ones((5, 5, 8, 8))
    conv = convolution(1, 1, padding=((2, 2), (2, 2)))

    def chain(images: jax.Array, kernels: list[jax.Array]) -> jax.Array:
        for kernel in kernels:
            images = layers.lrn(conv(images, kernel), n=5, k=2.0, alpha=0.5, beta=0.75)
        return images.sum()

    def kept(length: int) -> int:
        compiled = jax.jit(jax.grad(chain, 1)).lower(images, [kernel] * length).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert kept(16) - kept(8) < 8 * 2.2 * images.nbytes
