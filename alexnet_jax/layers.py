# Arrays of `_kernel_gradient` have their axes in their names.
# ruff: noqa: N806
"""Convolution, response normalisation and pooling, with kernels of our own for some platforms.

A kernel computes the same value and gradient as the plain operation, which all other platforms run.
`experiments/speed` measures each of them on CPUs, `experiments/gpu` on GPUs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from alexnet_jax import parallel

KERNELS = ("conv", "normalise", "max_pool", "avg_pool")

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
_CONV_OPTIONS = {
    "lhs_dilation": (None, (1, 1)),
    "rhs_dilation": (None, (1, 1)),
    "dimension_numbers": (_NHWC,),
    "feature_group_count": (1,),
    "batch_group_count": (1,),
    "precision": (None,),
    "preferred_element_type": (None,),
}
_BLOCK = 256  # output positions, in whole images, whose patches stay in the cache together
_NARROW = 128  # features of all towers, up to which GPUs convolve them as one

_PLATFORMS = {"cpu": ("cpu",), "gpu": ("cuda", "rocm")}

_enabled: tuple[str, ...] = KERNELS


@contextlib.contextmanager
def kernels(*names: str) -> Iterator[None]:
    """Use only the named kernels of our own, among `KERNELS`, in functions that are traced within the context.

    A function that was traced before keeps the kernels of then.
    """
    global _enabled
    if unknown := set(names) - set(KERNELS):
        raise ValueError(f"kernels({', '.join(map(repr, sorted(unknown)))}): must be among {KERNELS}")
    previous, _enabled = _enabled, names
    try:
        yield
    finally:
        _enabled = previous


def _with_kernels(
    name: str, plain: Callable, *, values: Mapping[str, Callable], gradients: Mapping[str, Callable]
) -> Callable:
    """Return `plain` with kernels for CPUs ("cpu") or GPUs ("gpu"), or alone where they are switched off.

    A value kernel computes the same as `plain`; a gradient kernel a tuple of cotangents, from the cotangent and the
    arguments.
    """
    if name not in _enabled:
        return plain

    def plain_gradient(cotangent: jax.Array, *arguments: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(plain, *arguments)[1](cotangent)

    @jax.custom_vjp
    def operation(*arguments: jax.Array) -> jax.Array:
        return lax.platform_dependent(*arguments, **_by_platform(values), default=plain)

    def backward(arguments: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        return lax.platform_dependent(cotangent, *arguments, **_by_platform(gradients), default=plain_gradient)

    operation.defvjp(lambda *arguments: (operation(*arguments), arguments), backward)
    return operation


def _by_platform(kernels: Mapping[str, Callable]) -> dict[str, Callable]:
    """Return kernels by JAX's names of the platforms."""
    return {platform: kernel for kind, kernel in kernels.items() for platform in _PLATFORMS[kind]}


def conv(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **options: Any
) -> jax.Array:
    """Convolve images (batch, height, width, channels), as the `conv_general_dilated` of `flax.linen.Conv`.

    Args:
      kernel: (height, width, channels, features).
      strides, padding: for both axes, in pixels; zeros before and after.
      options: other arguments of `lax.conv_general_dilated`, at their defaults (the layout: NHWC, HWIO).

    Raises:
      ValueError: an option has another value: dilation, groups, precision and result type are not supported.
    """
    for name, option in options.items():
        if option not in _CONV_OPTIONS.get(name, ()):
            raise ValueError(f"{name}={option}: must be left at its default; or use lax.conv_general_dilated")

    def plain(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=_NHWC)

    def value(images: jax.Array, kernel: jax.Array) -> jax.Array:
        _, _, channels, features = kernel.shape
        # Products with fewer features take several times as long as with these, on x86 CPUs (experiments/speed).
        fast_features = 64 if parallel.instruction_set() in ("avx512", "amx") else 32
        count = fast_features // features if channels <= 3 and strides[1] == 1 else 1
        return _wide_conv(images, kernel, count, strides, padding) if count > 1 else plain(images, kernel)

    def images_gradient(cotangent: jax.Array, images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.vjp(lambda images: plain(images, kernel), images)[1](cotangent)[0]

    def kernel_gradient(cotangent: jax.Array, images: jax.Array) -> jax.Array:
        return _kernel_gradient(cotangent, images, strides, padding, kernel.shape).astype(kernel.dtype)

    def gradient(cotangent: jax.Array, images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        for_images = unrolled_vmap(images_gradient)(cotangent, images, kernel)
        return for_images, unrolled_vmap(kernel_gradient)(cotangent, images)

    gpu_value, gpu_gradient = _conv_of_towers(plain)
    values = {"cpu": unrolled_vmap(value), "gpu": gpu_value}
    gradients = {"cpu": gradient, "gpu": gpu_gradient}
    return _with_kernels("conv", plain, values=values, gradients=gradients)(images, kernel)


def unrolled_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that `jax.vmap` calls once for each element, and stacks the results, which are a pytree.

    A vmapped convolution would become a grouped one, which XLA runs slowly.
    """
    mappable = jax.custom_batching.custom_vmap(function)

    @mappable.def_vmap
    def unrolled(size: int, batched: Sequence[bool], *arguments: jax.Array) -> tuple[Any, Any]:
        elements = [
            [argument[i] if is_batched else argument for argument, is_batched in zip(arguments, batched, strict=True)]
            for i in range(size)
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(mappable(*element) for element in elements))
        return stacked, jax.tree.map(lambda _: True, stacked)

    return mappable


def join_towers(x: jax.Array) -> jax.Array:
    """Concatenate the channels of all towers: (towers, ..., channels) to (..., towers * channels)."""
    return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)


def _conv_of_towers(plain: Callable[[jax.Array, jax.Array], jax.Array]) -> tuple[Callable[..., Any], ...]:
    """Return a convolution and its gradient, for GPUs, of which `jax.vmap` makes one convolution of narrow towers.

    The towers' features are side by side, and so are the channels of images that differ between towers: the kernel is
    zero from one tower's channels to another's features. That takes a GPU less time than a convolution for each tower,
    or a grouped one (experiments/gpu). Wide towers, for which that was not measured, are convolved one by one.
    """
    value = unrolled_vmap(plain)
    gradient = unrolled_vmap(lambda cotangent, images, kernel: jax.vjp(plain, images, kernel)[1](cotangent))

    def join(images: jax.Array, kernels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Join images (batch, ...) or (towers, batch, ...) and kernels (towers, ...)."""
        if images.ndim < kernels.ndim:
            return images, join_towers(kernels)
        towers, features = len(kernels), kernels.shape[-1]
        borders = [(i * features, (towers - 1 - i) * features) for i in range(towers)]
        rows = [jnp.pad(kernels[i], [(0, 0)] * (kernels.ndim - 2) + [border]) for i, border in enumerate(borders)]
        return join_towers(images), jnp.concatenate(rows, axis=-2)

    def joined(images: jax.Array, kernels: jax.Array) -> jax.Array:
        values = value(*join(images, kernels))
        return jnp.moveaxis(values.reshape(*values.shape[:-1], len(kernels), -1), -2, 0)

    def joined_gradient(cotangents: jax.Array, images: jax.Array, kernels: jax.Array) -> tuple[jax.Array, ...]:
        arguments, split = jax.vjp(join, images, kernels)
        of_images, of_kernels = split(gradient(join_towers(cotangents), *arguments))
        if images.ndim < kernels.ndim:  # that is the sum over the towers
            of_images = jax.vmap(gradient, (0, None, 0))(cotangents, images, kernels)[0]
        return of_images, of_kernels

    return _towers_vmap(value, joined), _towers_vmap(gradient, joined_gradient)


def _towers_vmap(function: Callable[..., Any], joined: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of images and kernel for which `jax.vmap` calls `joined` if the towers are narrow."""
    mappable = jax.custom_batching.custom_vmap(function)

    @mappable.def_vmap
    def of_towers(size: int, batched: Sequence[bool], *arguments: jax.Array) -> tuple[Any, Any]:
        if batched[-1] and size * arguments[-1].shape[-1] <= _NARROW:
            results = joined(*arguments)
        else:
            axes = [0 if is_batched else None for is_batched in batched]
            results = jax.vmap(function, axes)(*arguments)
        return results, jax.tree.map(lambda _: True, results)

    return mappable


def _wide_conv(
    images: jax.Array, kernel: jax.Array, count: int, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Return a convolution of horizontal stride 1, computed for `count` neighbours at a time.

    They are features of one kernel over the pixels of all of them, in which each has zeros at the others' pixels.
    """
    height, width, channels, features = kernel.shape
    (before, after), shift = padding[1], count - 1
    positions = before + images.shape[2] + after - width + 1
    shifted = [jnp.pad(kernel, ((0, 0), (i, shift - i), (0, 0), (0, 0))) for i in range(count)]
    wide = jnp.stack(shifted, axis=3).reshape(height, width + shift, channels, count * features)
    borders = (padding[0], (before, after + -positions % count))
    values = lax.conv_general_dilated(images, wide, (strides[0], count), borders, dimension_numbers=_NHWC)
    return values.reshape(*values.shape[:2], count * values.shape[2], features)[:, :, :positions]


def _kernel_gradient(
    gradient: jax.Array,
    images: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    kernel_shape: Sequence[int],
) -> jax.Array:
    """Return a convolution's kernel gradient, at least in float32: products of gradient and patches, summed.

    Works on blocks of images whose patches stay in the cache. XLA's own form is a convolution with a kernel as large as
    the feature map, several times slower on CPUs.

    Letters for axes: B images of a block; Y, X output height and width; P = Y * B * X positions; F features;
    D channels of a cell, which is the `strides` pixels of one step (space to depth, or short products in the
    first layer); K, L height and width of the kernel in cells; H = Y + K - 1 and W = X + L - 1 those of an image.
    """
    kernel_height, kernel_width, channels, F = kernel_shape
    stride_y, stride_x = strides
    count, Y, X, _ = gradient.shape
    B = max(1, _BLOCK // (Y * X))
    B = next(divisor for divisor in range(B, 0, -1) if count % divisor == 0)
    K, L = -(-kernel_height // stride_y), -(-kernel_width // stride_x)
    H, W, D = Y + K - 1, X + L - 1, stride_y * stride_x * channels
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    product = functools.partial(jnp.matmul, preferred_element_type=dtype)
    patches_are_narrow = L * D < F  # the narrower factor is transposed
    borders = [
        (before, size - before - image_size, 0)
        for (before, _), size, image_size in zip(padding, (H * stride_y, W * stride_x), images.shape[1:3], strict=True)
    ]
    blocks = [array.reshape(-1, B, *array.shape[1:]) for array in (gradient, images)]

    def add_block(total: jax.Array, block: list[jax.Array]) -> tuple[jax.Array, None]:
        gradient_BxYxXxF, images = block
        padded = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *borders, (0, 0, 0)])
        cells = padded.reshape(B, H, stride_y, W, stride_x, channels).transpose(1, 0, 3, 2, 4, 5)
        # The first rows of all images, then their second rows, and so on: a slice of rows is contiguous.
        cells_HBxWxD = cells.reshape(H * B, W, D)
        # All rows of the kernel share the horizontal part of their patches: it is copied once.
        strips_HBxXxLD = jnp.concatenate([cells_HBxWxD[:, x : x + X] for x in range(L)], axis=-1)
        patches_PxLD = [strips_HBxXxLD[y * B : (y + Y) * B].reshape(-1, L * D) for y in range(K)]
        gradient_PxF = jnp.swapaxes(gradient_BxYxXxF, 0, 1).reshape(-1, F)
        if patches_are_narrow:
            products = [product(patches.T, gradient_PxF) for patches in patches_PxLD]
        else:
            gradient_FxP = lax.optimization_barrier(gradient_PxF.T)  # transposed once, not in each product
            products = [product(gradient_FxP, patches) for patches in patches_PxLD]
        return total + jnp.stack(products), None

    total, _ = lax.scan(add_block, jnp.zeros((K, *sorted((F, L * D))), dtype), blocks)
    total_KxLDxF = total if patches_are_narrow else jnp.swapaxes(total, 1, 2)
    kernel = total_KxLDxF.reshape(K, L, stride_y, stride_x, channels, F)
    kernel = jnp.swapaxes(kernel, 1, 2).reshape(K * stride_y, L * stride_x, channels, F)
    return kernel[:kernel_height, :kernel_width]


def scaled_tanh(x: jax.Array) -> jax.Array:
    """Return 1.7159 tanh(2x / 3), which maps 1 to 1 and -1 to -1 (LeCun et al., Efficient BackProp, 1998)."""
    return 1.7159 * jnp.tanh(2 / 3 * x)


def lrn(x: jax.Array, *, n: int, k: float, alpha: float, beta: float) -> jax.Array:
    """Normalise local responses over neighbouring channels (paper, section 3.3).

    `b_i = a_i / (k + alpha * sum_j a_j ** 2) ** beta`, where j runs over the n channels centred on i, as far as they
    exist. `alpha` multiplies the plain sum, as in the paper: Caffe, PyTorch and the 2012 code divide it by n first.
    """
    return _normalise(x, (1,) * (x.ndim - 1) + (n,), k, alpha, beta)


def spatial_lrn(x: jax.Array, *, window: int, k: float, alpha: float, beta: float) -> jax.Array:
    """Normalise local responses over neighbouring pixels of a feature map, the 2012 code's second normalisation.

    `b = a / (k + alpha * sum a ** 2) ** beta`, summed over the window centred on the pixel, as far as it is inside
    the feature map (`type=rnorm` of cuda-convnet, which divides its `scale` by the window's area first).
    """
    return _normalise(x, (1, window, window, 1), k, alpha, beta)


def _normalise(x: jax.Array, window: tuple[int, ...], k: float, alpha: float, beta: float) -> jax.Array:
    """Divide by `(k + alpha * sum of squares) ** beta`, over a centred window with a width for each axis."""
    padding = [(width // 2, (width - 1) // 2) for width in window]
    mirrored = [(after, before) for before, after in padding]

    def window_sum(x: jax.Array, padding: list[tuple[int, int]]) -> jax.Array:
        return lax.reduce_window(x, 0.0, lax.add, window, (1,) * x.ndim, padding)

    def scale(x: jax.Array) -> jax.Array:
        return k + alpha * window_sum(x * x, padding)

    def plain(x: jax.Array) -> jax.Array:
        return x * scale(x) ** -beta

    def divide(x: jax.Array, scale: jax.Array) -> jax.Array:
        # On CPUs twice as fast as a power. The division comes last: XLA would recompute a final product for the
        # gradient of the pooling, and keep its factors in memory instead.
        return x * jnp.exp((1 - beta) * jnp.log(scale)) / scale

    def value(x: jax.Array) -> jax.Array:
        return divide(x, scale(x))

    def gradient(cotangent: jax.Array, x: jax.Array) -> tuple[jax.Array]:
        # Shorter than the derivative of the plain form, which has another division and power. The sums are recomputed,
        # because they are as large as x. Here x depends on the cotangent, without changing: otherwise XLA would find
        # them equal to those of the forward pass, and keep these (up to jax 0.10 also with an optimization_barrier).
        x = jnp.where(jnp.isnan(cotangent), cotangent, x)
        scales = scale(x)
        direct = divide(cotangent, scales)
        neighbours = window_sum(direct * x / scales, mirrored)
        return (direct - 2 * alpha * beta * x * neighbours,)

    precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    operation = _with_kernels("normalise", plain, values={"cpu": value}, gradients={"cpu": gradient})
    return operation(precise).astype(x.dtype)


def max_pool(x: jax.Array, *, window: int, stride: int, ceil: bool) -> jax.Array:
    """Return the maximum of each window (paper, section 3.4); windows overlap if the stride is less than their width.

    Args:
      x: activations (batch, height, width, channels); a smaller feature map than the window raises ValueError.
      ceil: whether a last window may extend over the right and bottom edge, as in cuda-convnet and Caffe.
    """
    padding = _pool_padding(x, window, stride, ceil)

    def plain(x: jax.Array) -> jax.Array:
        return nn.max_pool(x, (window, window), (stride, stride), padding)

    def maximum(x: jax.Array, axis: int) -> jax.Array:
        return functools.reduce(jnp.maximum, _window_slices(x, axis, window, stride))

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)

    def value(x: jax.Array) -> jax.Array:
        return maximum(maximum(pad(x), 2), 1)

    def axis_gradient(cotangent: jax.Array, x: jax.Array, axis: int) -> jax.Array:
        """Return the gradient of `maximum`, which goes to the first of equal values, as in XLA."""
        largest = maximum(x, axis)
        assigned, gradients = jnp.zeros(largest.shape, bool), []
        for values in _window_slices(x, axis, window, stride):
            is_first = (values == largest) & ~assigned
            assigned |= is_first
            gradients.append(jnp.where(is_first, cotangent, 0))
        return _interleave(gradients, axis, stride, x.shape[axis])

    def gradient(cotangent: jax.Array, x: jax.Array) -> tuple[jax.Array]:
        # XLA's own gradient is a select-and-scatter: it searches each window for its maximum once more, and on GPUs
        # is not deterministic.
        padded = pad(x)
        padded_gradient = axis_gradient(axis_gradient(cotangent, maximum(padded, 2), 1), padded, 2)
        return (padded_gradient[:, : x.shape[1], : x.shape[2]],)

    gradients = {"cpu": gradient, "gpu": gradient}
    return _with_kernels("max_pool", plain, values={"cpu": value}, gradients=gradients)(x)


def avg_pool(x: jax.Array, *, window: int, stride: int, ceil: bool) -> jax.Array:
    """Return the mean of each window, over the pixels inside the feature map (cuda-convnet's CIFAR-10 networks).

    Arguments and errors are those of `max_pool`.
    """
    padding = _pool_padding(x, window, stride, ceil)

    def plain(x: jax.Array) -> jax.Array:
        return nn.avg_pool(x, (window, window), (stride, stride), padding, count_include_pad=False)

    def gradient(cotangent: jax.Array, x: jax.Array) -> tuple[jax.Array]:
        # XLA's own gradient inserts zeros between the values, and sums windows of that.
        for axis, (_, after) in zip((1, 2), padding, strict=True):
            length, count = x.shape[axis], cotangent.shape[axis]
            pixels = np.minimum(window, length - stride * np.arange(count))
            portion = cotangent / jnp.expand_dims(jnp.array(pixels, x.dtype), range(1, x.ndim - axis))
            padded = _interleave([portion] * window, axis, stride, length + after)
            cotangent = lax.slice_in_dim(padded, 0, length, 1, axis)
        return (cotangent,)

    return _with_kernels("avg_pool", plain, values={}, gradients={"cpu": gradient})(x)


def _window_slices(x: jax.Array, axis: int, window: int, stride: int) -> list[jax.Array]:
    """Return the first values of all windows along an axis, then the second values, and so on."""
    last = x.shape[axis] - window
    return [lax.slice_in_dim(x, offset, offset + last + 1, stride, axis) for offset in range(window)]


def _interleave(slices: list[jax.Array], axis: int, stride: int, length: int) -> jax.Array:
    """Sum slices of windows at their positions along an axis of `length`: the transpose of `_window_slices`."""
    # Positions that are a multiple of the stride apart come from the same slices.
    count, windows = -(-length // stride), slices[0].shape[axis]
    phases = []
    for phase in range(stride):
        shifted = []
        for offset in range(phase, len(slices), stride):
            before = offset // stride
            borders = [(0, 0)] * slices[0].ndim
            borders[axis] = (before, count - before - windows)
            shifted.append(jnp.pad(slices[offset], borders))
        phases.append(sum(shifted, start=jnp.zeros((), slices[0].dtype)))
    interleaved = jnp.stack(jnp.broadcast_arrays(*phases), axis + 1)
    return lax.slice_in_dim(lax.collapse(interleaved, axis, axis + 2), 0, length, 1, axis)


def _pool_padding(x: jax.Array, window: int, stride: int, ceil: bool) -> list[tuple[int, int]]:
    """Return the padding before and after the height and the width that pooling needs."""
    height, width = x.shape[1:3]
    if window > min(height, width):
        raise ValueError(
            f"model.pool.window={window}: must fit its feature map of {height}x{width}; use larger images (data.crop), "
            "smaller strides or fewer poolings"
        )
    # With strides larger than the window, the last one would lie outside: it is left out, as in Caffe.
    rest = [(window - size) % stride if ceil else 0 for size in (height, width)]
    return [(0, after if after < window else 0) for after in rest]
