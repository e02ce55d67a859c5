"""The operations of AlexNet that no library offers in the paper's form, or not fast enough on a CPU.

Where there is a form for CPUs, it has the value and the gradient of the plain one, which GPUs and TPUs run as XLA makes
it; ``experiments/speed`` measures what each brings.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

_POSITIONS = 256  # of a map whose patches are multiplied at once, so that they stay in a core's cache


def conv(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **_: Any
) -> jax.Array:
    """A convolution as ``flax.linen.Conv`` asks for it, without dilation and groups.

    Args:
      images: (batch, height, width, channels).
      kernel: (height, width, channels, features).
      strides: in pixels, of both axes.
      padding: zeros before and after, of both axes.

    Returns:
      (batch, height, width, features).
    """
    shape = (tuple(strides), tuple(padding))
    return lax.platform_dependent(
        images, kernel, cpu=functools.partial(_cpu_conv, *shape), default=functools.partial(_plain_conv, *shape)
    )


def _plain_conv(strides: Any, padding: Any, images: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cpu_conv(strides: Any, padding: Any, images: jax.Array, kernel: jax.Array) -> jax.Array:
    return _one_by_one(functools.partial(_plain_conv, strides, padding))(images, kernel)


def _forward(strides: Any, padding: Any, images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    images = lax.optimization_barrier(images)  # kept for the gradient, not computed again from what is before it
    return _cpu_conv(strides, padding, images, kernel), (images, kernel)


def _backward(strides: Any, padding: Any, seen: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    plain = functools.partial(_plain_conv, strides, padding)

    def of_images(images: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.vjp(lambda images: plain(images, kernel), images)[1](gradient)[0]

    def of_kernel(images: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        return _kernel_gradient(strides, padding, images, gradient, kernel.shape).astype(kernel.dtype)

    images, kernel = seen
    return _one_by_one(of_images)(images, kernel, gradient), _one_by_one(of_kernel)(images, kernel, gradient)


_cpu_conv.defvjp(_forward, _backward)


def _kernel_gradient(
    strides: Any, padding: Any, images: jax.Array, gradient: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Sum over positions of output gradient times patch. XLA's, a convolution with a kernel as large as the map, takes four times as long."""
    height, width, channels, features = shape
    count, rows, columns, _ = gradient.shape
    together = max(1, _POSITIONS // (rows * columns))
    together = next(divisor for divisor in range(together, 0, -1) if count % divisor == 0)
    precise = jnp.promote_types(images.dtype, jnp.float32)

    def add(total: jax.Array, some: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        padded = jnp.pad(some[0], ((0, 0), *padding, (0, 0)))
        bottom, right = strides[0] * (rows - 1) + 1, strides[1] * (columns - 1) + 1
        patches = jnp.concatenate(
            [
                padded[:, top : top + bottom : strides[0], left : left + right : strides[1]]
                for top in range(height)
                for left in range(width)
            ],
            axis=-1,
        )
        product = jnp.matmul(
            some[1].reshape(-1, features).T,
            patches.reshape(-1, height * width * channels),
            preferred_element_type=precise,
        )
        return total + product, None

    parts = (array.reshape(-1, together, *array.shape[1:]) for array in (images, gradient))
    total, _ = lax.scan(add, jnp.zeros((features, height * width * channels), precise), tuple(parts))
    return total.T.reshape(shape)


def _one_by_one(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same, but a ``jax.vmap`` of it computes one after the other: of a convolution it would make a grouped one, which XLA runs slowly on a CPU."""
    mappable = jax.custom_batching.custom_vmap(function)

    @mappable.def_vmap
    def unrolled(size: int, mapped: Sequence[bool], *arguments: jax.Array) -> tuple[jax.Array, bool]:
        results = [
            mappable(*(a[i] if own else a for a, own in zip(arguments, mapped, strict=True))) for i in range(size)
        ]
        return jnp.stack(results), True

    return mappable


def lrn(x: jax.Array, *, n: int, k: float, alpha: float, beta: float) -> jax.Array:
    """Local response normalisation over neighbouring channels (paper, section 3.3).

    ``b_i = a_i / (k + alpha * sum_j a_j ** 2) ** beta``, where j runs over the n channels
    centred on i, as far as they exist. ``alpha`` multiplies the plain sum, as in the paper's
    text: Caffe, PyTorch and the 2012 code divide it by n first.

    Args:
      x: activations (..., channels) of one tower; its neighbour's channels do not count.
      n: width of the window, in channels.
    """
    return _normalise(x, (1,) * (x.ndim - 1) + (n,), k, alpha, beta)


def spatial_lrn(x: jax.Array, *, window: int, k: float, alpha: float, beta: float) -> jax.Array:
    """Response normalisation over the neighbouring pixels of the same map: the 2012 code's second normalisation.

    ``b = a / (k + alpha * sum a ** 2) ** beta``, summed over the window centred on the pixel, as far as it is on
    the map (``type=rnorm`` of cuda-convnet, which divides its ``scale`` by the window's area first).

    Args:
      x: activations (batch, height, width, channels).
      window: height and width, in pixels.
    """
    return _normalise(x, (1, window, window, 1), k, alpha, beta)


def _normalise(x: jax.Array, window: tuple[int, ...], *constants: float) -> jax.Array:
    """Divided by a power of the squares in a window, a width for each axis, that is centred on each value."""
    return lax.platform_dependent(
        x,
        cpu=functools.partial(_cpu_normalise, window, constants),
        default=functools.partial(_plain_normalise, window, constants),
    )


def _plain_normalise(window: tuple[int, ...], constants: tuple[float, ...], x: jax.Array) -> jax.Array:
    k, alpha, beta = constants
    return x * (k + alpha * _window_sum(x * x, window)) ** -beta


def _window_sum(x: jax.Array, window: tuple[int, ...], mirrored: bool = False) -> jax.Array:
    """Over the values that have this one in their window, if it is mirrored."""
    padding = [(width // 2, (width - 1) // 2)[:: -1 if mirrored else 1] for width in window]
    return lax.reduce_window(x, 0.0, lax.add, window, (1,) * x.ndim, padding)


# The gradient is shorter than what differentiating the plain form gives, and exp and log are faster than a power.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cpu_normalise(window: tuple[int, ...], constants: tuple[float, ...], x: jax.Array) -> jax.Array:
    return _normalise_forward(window, constants, x)[0]


def _normalise_forward(window: tuple[int, ...], constants: tuple[float, ...], x: jax.Array) -> tuple[jax.Array, Any]:
    k, alpha, beta = constants
    scale = k + alpha * _window_sum(x * x, window)
    return x * jnp.exp(-beta * jnp.log(scale)), (x, scale)


def _normalise_backward(
    window: tuple[int, ...], constants: tuple[float, ...], seen: Any, gradient: jax.Array
) -> tuple[jax.Array]:
    (x, scale), (_, alpha, beta) = seen, constants
    own = gradient * jnp.exp(-beta * jnp.log(scale))
    return (own - 2 * alpha * beta * x * _window_sum(own * x / scale, window, mirrored=True),)


_cpu_normalise.defvjp(_normalise_forward, _normalise_backward)


def max_pool(x: jax.Array, *, window: int, stride: int, ceil: bool) -> jax.Array:
    """Max pooling (paper, section 3.4); it overlaps where the stride is less than the window.

    Args:
      x: activations (batch, height, width, channels).
      ceil: whether a last window may hang over the right and bottom edge, as in cuda-convnet and Caffe.

    Raises:
      ValueError: the window is larger than the map.
    """
    padding = _hanging(x, window, stride, ceil)

    def plain(x: jax.Array) -> jax.Array:
        return nn.max_pool(x, (window, window), (stride, stride), padding)

    def cpu(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
        return _maximum(1, window, stride, _maximum(2, window, stride, padded))

    return lax.platform_dependent(x, cpu=cpu, default=plain)


# XLA finds the maxima again, window by window, to know where gradients go: many times slower on a CPU.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _maximum(axis: int, window: int, stride: int, x: jax.Array) -> jax.Array:
    """Of windows along one axis."""
    return functools.reduce(jnp.maximum, _places(axis, window, stride, x))


def _places(axis: int, window: int, stride: int, x: jax.Array) -> list[jax.Array]:
    """The first values of all windows, the second ones, and so on."""
    reach = x.shape[axis] - window
    return [lax.slice_in_dim(x, place, place + reach + 1, stride, axis) for place in range(window)]


def _maximum_forward(axis: int, window: int, stride: int, x: jax.Array) -> tuple[jax.Array, Any]:
    maxima = _maximum(axis, window, stride, x)
    return maxima, (x, maxima)


def _maximum_backward(axis: int, window: int, stride: int, seen: Any, gradient: jax.Array) -> tuple[jax.Array]:
    x, maxima = seen
    total, taken = jnp.zeros_like(x), jnp.zeros(maxima.shape, bool)
    for place, values in enumerate(_places(axis, window, stride, x)):
        first = (values == maxima) & ~taken  # of equal maxima, the first has the gradient, as in XLA
        taken |= first
        borders = [(0, 0, 0)] * x.ndim
        span = stride * (maxima.shape[axis] - 1) + 1
        borders[axis] = (place, x.shape[axis] - place - span, stride - 1)
        total += lax.pad(jnp.where(first, gradient, 0), jnp.zeros((), x.dtype), borders)
    return (total,)


_maximum.defvjp(_maximum_forward, _maximum_backward)


def avg_pool(x: jax.Array, *, window: int, stride: int, ceil: bool) -> jax.Array:
    """Average pooling of cuda-convnet's CIFAR-10 nets: over the pixels of the window that are on the map.

    Arguments and errors are those of ``max_pool``.
    """
    padding = _hanging(x, window, stride, ceil)
    return nn.avg_pool(x, (window, window), (stride, stride), padding, count_include_pad=False)


def _hanging(x: jax.Array, window: int, stride: int, ceil: bool) -> list[tuple[int, int]]:
    """By how much windows hang over the edges of maps (batch, height, width, channels)."""
    height, width = x.shape[1:3]
    if window > min(height, width):
        raise ValueError(
            f"a pooling window of {window}x{window} does not fit a map of {height}x{width}: "
            "use larger images (data.crop), smaller strides or fewer poolings"
        )
    return [(0, (window - side) % stride if ceil else 0) for side in (height, width)]
