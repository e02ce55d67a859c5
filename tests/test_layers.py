"""The operations against their definitions, and the CPU kernels against the plain operations."""

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_jax import layers, parallel

LRN = {"k": 2.0, "alpha": 0.5, "beta": 0.75}


def numpy_lrn(x: np.ndarray, n: int, k: float, alpha: float, beta: float) -> np.ndarray:
    """Section 3.3's formula, channel by channel."""
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
    constants: dict[str, Any] = {"n": n, "k": 2.0, "alpha": alpha, "beta": 0.75}
    np.testing.assert_allclose(layers.lrn(jnp.array(x), **constants), numpy_lrn(x, **constants), rtol=1e-5)


@pytest.mark.slow
def test_lrn_gradient_matches_finite_differences() -> None:
    x, weights = np.random.default_rng(0).normal(0, 3, (2, 2, 2, 7))
    gradient = jax.grad(lambda x: (layers.lrn(x, n=5, **LRN) * weights).sum())(jnp.array(x))
    step = 1e-6
    for position in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[position] = step
        change = numpy_lrn(x + moved, n=5, **LRN) - numpy_lrn(x - moved, n=5, **LRN)
        slope = (change * weights).sum() / (2 * step)
        np.testing.assert_allclose(gradient[position], slope, rtol=1e-3, atol=1e-5)


def test_lrn_of_bfloat16_computes_in_float32() -> None:
    rough = jnp.array(np.random.default_rng(0).normal(0, 3, (2, 4, 4, 7)), jnp.bfloat16)
    exact = layers.lrn(rough.astype(jnp.float32), n=5, **LRN).astype(jnp.bfloat16)
    np.testing.assert_array_equal(layers.lrn(rough, n=5, **LRN), exact)


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


@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("size", [55, 27, 13, 6])
def test_max_pool_returns_the_maximum_of_each_window(size: int, window: int, stride: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x, (window, window), (1, 2))[:, ::stride, ::stride]
    pooled = layers.max_pool(jnp.array(x), window=window, stride=stride, ceil=False)
    np.testing.assert_array_equal(pooled, windows.max((-2, -1)))


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(("size", "pooled"), [(55, 27), (27, 13), (13, 6)])
def test_overlapping_and_other_pooling_of_the_paper_have_the_same_size(size: int, pooled: int, window: int) -> None:
    x = jnp.zeros((1, size, size, 1))
    assert layers.max_pool(x, window=window, stride=2, ceil=False).shape == (1, pooled, pooled, 1)


def test_window_larger_than_the_feature_map_raises() -> None:
    with pytest.raises(ValueError, match=r"window=3: must fit its feature map of 2x5; use larger images"):
        layers.max_pool(jnp.zeros((1, 2, 5, 1)), window=3, stride=2, ceil=False)


@pytest.mark.parametrize(("window", "stride"), [(2, 3), (1, 4), (2, 5), (3, 4)])
def test_with_ceil_and_gaps_no_window_lies_outside(window: int, stride: int) -> None:
    """As in Caffe, which clips the last window if it would start beyond the edge."""
    for size in range(window, 12):
        x = np.random.default_rng(0).normal(size=(1, size, size, 1)).astype(np.float32)
        starts = [start for start in range(0, size, stride) if start == 0 or start - stride + window < size]
        expected = [[x[:, i : i + window, j : j + window].max() for j in starts] for i in starts]
        pooled = layers.max_pool(jnp.array(x), window=window, stride=stride, ceil=True)
        np.testing.assert_array_equal(pooled[0, :, :, 0], np.array(expected))


@pytest.mark.parametrize(("size", "pooled"), [(32, 16), (16, 8), (8, 4), (24, 12), (12, 6), (6, 3), (55, 27), (13, 6)])
def test_with_ceil_a_last_window_extends_over_the_edge(size: int, pooled: int) -> None:
    """cuda-convnet's feature maps of 32 and 24 pixels; for the paper's it makes no difference."""
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    tops = range(0, 2 * pooled, 2)
    windows = [[x[:, i : i + 3, j : j + 3] for j in tops] for i in tops]
    for pool, reduce in ((layers.max_pool, np.max), (layers.avg_pool, np.mean)):
        expected = np.stack([np.stack([reduce(window, (1, 2)) for window in row], 1) for row in windows], 1)
        actual = pool(jnp.array(x), window=3, stride=2, ceil=True)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def convolution(*strides: int, padding: tuple[tuple[int, int], ...]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda x, kernel: layers.conv(x, kernel, strides, padding)


OPERATIONS: dict[str, tuple[Any, ...]] = {
    "conv1": (convolution(4, 4, padding=((0, 3), (0, 3))), (3, 24, 24, 3), (11, 11, 3, 8)),
    "conv2": (convolution(1, 1, padding=((2, 2), (2, 2))), (4, 27, 27, 4), (5, 5, 4, 8)),
    "conv5": (convolution(1, 1, padding=((1, 1), (1, 1))), (6, 13, 13, 4), (3, 3, 4, 8)),
    "conv, blocks of several images": (convolution(1, 1, padding=((1, 1), (1, 1))), (6, 9, 9, 4), (3, 3, 4, 8)),
    "conv, not square, pixels left over": (
        convolution(3, 2, padding=((0, 1), (2, 0))),
        (4, 18, 14, 3),
        (5, 3, 3, 8),
    ),
    "lrn": (lambda x: layers.lrn(x, n=5, **LRN), (2, 4, 4, 7)),
    "lrn, even window": (lambda x: layers.lrn(x, n=4, **LRN), (2, 4, 4, 7)),
    "spatial lrn": (lambda x: layers.spatial_lrn(x, window=3, **LRN), (2, 6, 5, 3)),
    "max pool": (lambda x: layers.max_pool(x, window=3, stride=2, ceil=False), (2, 13, 13, 3)),
    "max pool, no overlap": (lambda x: layers.max_pool(x, window=2, stride=2, ceil=False), (2, 13, 13, 3)),
    "max pool, ceil": (lambda x: layers.max_pool(x, window=3, stride=2, ceil=True), (2, 8, 6, 3)),
    "average pool": (lambda x: layers.avg_pool(x, window=3, stride=2, ceil=False), (2, 13, 13, 3)),
    "average pool, no overlap": (lambda x: layers.avg_pool(x, window=2, stride=2, ceil=False), (2, 13, 13, 3)),
    "average pool, ceil": (lambda x: layers.avg_pool(x, window=3, stride=2, ceil=True), (2, 8, 6, 3)),
}


@functools.cache
def plain_value_and_gradients(name: str, dtype: type) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return arguments of one of `OPERATIONS`, and the plain operation's value and gradients."""
    operation, *shapes = OPERATIONS[name]
    generator = np.random.default_rng(0)
    arguments = tuple(jnp.array(np.maximum(generator.normal(size=shape), 0), dtype) for shape in shapes)
    return arguments, value_and_gradients(operation, *arguments, own=False)


def value_and_gradients(operation: Callable[..., jax.Array], *arguments: jax.Array, own: bool) -> tuple[jax.Array, ...]:
    """Return an operation's value and the gradients of a weighted sum of it."""

    @jax.jit
    def compute(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        value, pullback = jax.vjp(operation, *arguments)
        weights = jnp.array(np.random.default_rng(1).normal(size=value.shape), value.dtype)
        return value, *pullback(weights)

    with contextlib.nullcontext() if own else layers.kernels():
        return compute(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernel_has_the_value_and_gradient_of_the_plain_operation(
    name: str, kind: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among equal maxima, too, which a feature map after ReLUs is full of. A CPU runs the kernels of both kinds."""
    monkeypatch.setattr(layers, "_PLATFORMS", {"cpu": (), "gpu": ()} | {kind: ("cpu",)})
    with jax.enable_x64(dtype == np.float64):
        arguments, plain = plain_value_and_gradients(name, dtype)
        fast = value_and_gradients(OPERATIONS[name][0], *arguments, own=True)
        relative = 1e-12 if dtype == np.float64 else 1e-5
        for one, other in zip(fast, plain, strict=True):
            assert one.dtype == other.dtype == dtype
            np.testing.assert_allclose(one, other, rtol=0, atol=relative * np.abs(other).max())


borders = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(4, 12), st.integers(4, 12)),
    channels=st.integers(1, 4),
    kernel_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    features=st.integers(3, 33),
    strides=st.tuples(st.integers(1, 3), st.sampled_from([1, 1, 1, 2])),
    padding=st.tuples(borders, borders),
    instruction_set=st.sampled_from(["avx512", "avx2"]),
)
def test_first_layers_equal_the_plain_convolution(
    size: tuple[int, int, int],
    channels: int,
    kernel_size: tuple[int, int],
    features: int,
    strides: tuple[int, int],
    padding: Any,
    instruction_set: str,
) -> None:
    """Value and gradients, whether or not the width is a multiple of the neighbours that share a kernel."""
    # Of wider paddings, which no config may have, XLA's own gradient is undefined.
    padding = [
        tuple(min(side, length - 1) for side in sides) for sides, length in zip(padding, kernel_size, strict=True)
    ]
    generator = np.random.default_rng(0)
    images = jnp.array(generator.normal(size=(*size, channels)), jnp.float32)
    kernel = jnp.array(generator.normal(size=(*kernel_size, channels, features)), jnp.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "instruction_set", lambda: instruction_set)
        fast = value_and_gradients(convolution(*strides, padding=padding), images, kernel, own=True)
    plain = value_and_gradients(
        lambda images, kernel: jax.lax.conv_general_dilated(
            images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        images,
        kernel,
        own=False,
    )
    for one, other in zip(fast, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    ("instruction_set", "channels", "features", "stride", "width"),
    [
        ("amx", 3, 32, 1, 6),
        ("avx512", 1, 16, 1, 8),
        ("avx512", 3, 48, 1, 5),
        ("avx512", 3, 16, 2, 5),
        ("avx512", 4, 16, 1, 5),
        ("avx2", 3, 32, 1, 5),
        ("unknown", 3, 16, 1, 6),
    ],
)
def test_few_features_of_a_first_layer_share_a_wider_kernel(
    instruction_set: str, channels: int, features: int, stride: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read off the program for CPUs: what is fast there (experiments/speed) depends on the instruction set."""
    monkeypatch.setattr(parallel, "instruction_set", lambda: instruction_set)
    images, kernel = jnp.zeros((1, 9, 9, channels)), jnp.zeros((5, 5, channels, features))
    conv = jax.jit(convolution(1, stride, padding=((2, 2), (2, 2))))
    for platform, expected in (("cpu", width), ("cuda", 5)):
        program = jax.export.export(conv, platforms=[platform])(images, kernel).mlir_module()
        (found,) = re.findall(r"convolution.*, tensor<5x(\d+)x\d+x\d+xf32>\)", program)
        assert int(found) == expected


def kernels_in_use(names: tuple[str, ...] | None) -> set[str]:
    """Return which operations depend on the platform when traced with these kernels (None: outside the context)."""
    x, kernel = jnp.ones((2, 9, 9, 8)), jnp.ones((3, 3, 8, 8))
    operations: dict[str, Callable[[jax.Array], jax.Array]] = {
        "conv": lambda x: convolution(1, 1, padding=((1, 1), (1, 1)))(x, kernel).sum(),
        "normalise": lambda x: layers.lrn(x, n=5, **LRN).sum(),
        "max_pool": lambda x: layers.max_pool(x, window=3, stride=2, ceil=False).sum(),
        "avg_pool": lambda x: layers.avg_pool(x, window=3, stride=2, ceil=False).sum(),
    }
    with contextlib.nullcontext() if names is None else layers.kernels(*names):
        return {name for name, run in operations.items() if "platform_index" in str(jax.make_jaxpr(jax.grad(run))(x))}


def test_kernels_switches_kernels_one_by_one_and_back() -> None:
    assert kernels_in_use(None) == set(layers.KERNELS)
    assert kernels_in_use(()) == set()
    for name in layers.KERNELS:
        assert kernels_in_use((name,)) == {name}
    assert kernels_in_use(None) == set(layers.KERNELS)


def test_unknown_kernel_raises() -> None:
    with pytest.raises(ValueError, match=r"kernels\('lrn'\): must be among \('conv', "), layers.kernels("lrn"):
        pass


def test_cpus_run_the_cpu_kernel_and_tpus_the_plain_operation() -> None:
    """Read off the program: XLA's gradient of a max pooling is a select-and-scatter."""
    x = jnp.zeros((1, 13, 13, 1))
    gradient = jax.jit(jax.grad(lambda x: layers.max_pool(x, window=3, stride=2, ceil=False).sum()))
    for platform, plain in (("cpu", False), ("tpu", True)):
        program = jax.export.export(gradient, platforms=[platform])(x).mlir_module()
        assert ("select_and_scatter" in program) == plain


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [(0, 0), (None, 0), (0, None)])
@pytest.mark.parametrize(("kind", "features"), [("cpu", 4), ("gpu", 4), ("gpu", 65)])
def test_vmapped_convolutions_are_not_grouped(
    kind: str, features: int, mapped: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs those of narrow towers are joined, which halves their number."""
    monkeypatch.setattr(layers, "_PLATFORMS", {"cpu": (), "gpu": ()} | {kind: ("cpu",)})
    generator = np.random.default_rng(0)
    shapes = ((4, 9, 9, 2), (3, 3, 2, features))
    images, kernels = (
        jnp.array(generator.normal(size=shape if axis is None else (2, *shape)), jnp.float32)
        for shape, axis in zip(shapes, mapped, strict=True)
    )
    conv = convolution(1, 1, padding=((1, 1), (1, 1)))

    @jax.jit
    def value_and_gradients(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        value, pullback = jax.vjp(conv, images, kernel)
        return value, *pullback(jnp.cos(value))

    together = jax.jit(jax.vmap(value_and_gradients, in_axes=mapped))
    program = together.lower(images, kernels).as_text()
    assert "feature_group_count = 2" not in program
    if kind == "gpu" and mapped == (0, 0):
        # Value and two gradients, and the value again, which XLA removes.
        assert program.count("stablehlo.convolution(") == (4 if features == 4 else 8)
    for tower in range(2):
        own = (a if axis is None else a[tower] for a, axis in zip((images, kernels), mapped, strict=True))
        for one, other in zip(together(images, kernels), value_and_gradients(*own), strict=True):
            np.testing.assert_allclose(one[tower], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lhs_dilation", (2, 2)),
        ("rhs_dilation", (1, 2)),
        ("feature_group_count", 2),
        ("batch_group_count", 2),
        ("precision", "highest"),
        ("preferred_element_type", jnp.float32),
        ("dimension_numbers", None),
        ("unknown", 1),
    ],
)
def test_conv_refuses_options_that_it_does_not_support(option: str, value: Any) -> None:
    images, kernel = jnp.zeros((1, 5, 5, 2)), jnp.zeros((3, 3, 2, 4))
    with pytest.raises(ValueError, match=f"{option}=.*: must be left at its default"):
        layers.conv(images, kernel, (1, 1), ((0, 0), (0, 0)), **{option: value})


@pytest.mark.slow
def test_gradients_keep_no_sums_and_no_padded_images() -> None:
    """Read off compiled gradients: of each layer of a chain, XLA keeps its convolution and its normalisation."""
    images, kernel = jnp.ones((4, 27, 27, 8)), jnp.ones((5, 5, 8, 8))
    conv = convolution(1, 1, padding=((2, 2), (2, 2)))

    def chain(images: jax.Array, kernels: list[jax.Array]) -> jax.Array:
        for kernel in kernels:
            images = layers.lrn(conv(images, kernel), n=5, **LRN)
        return images.sum()

    def kept(length: int) -> int:
        compiled = jax.jit(jax.grad(chain, 1)).lower(images, [kernel] * length).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    assert kept(8) - kept(4) < 4 * 2.2 * images.nbytes


@pytest.mark.slow
def test_infinite_cotangent_of_lrn_affects_only_its_window() -> None:
    """As in the formula: no further channel becomes infinite or NaN."""
    x = jnp.array(np.random.default_rng(0).normal(size=(3, 12)), jnp.float32)
    cotangent = jnp.ones_like(x).at[1, 5].set(jnp.inf)
    gradients = []
    for names in (layers.KERNELS, ()):
        with layers.kernels(*names):
            _, pullback = jax.vjp(lambda x: layers.lrn(x, n=5, **LRN), x)
            gradients.append(pullback(cotangent)[0])
    fast, plain = gradients
    np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-6)
    rows, channels = np.nonzero(~np.isfinite(fast))
    assert set(rows) == {1}
    assert set(channels) == {3, 4, 5, 6, 7}
    assert np.argwhere(np.isnan(fast)).tolist() == [[1, 5]]
