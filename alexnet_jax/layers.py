"""The operations of AlexNet that no library offers in the paper's form, or not fast enough on a CPU.

What is written twice has a form for CPUs, of the same value and gradient as the plain one, which GPUs and TPUs run as
XLA makes it. ``experiments/speed`` measures what each brings.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

_POSITIONS = 256  # of a map, in whole images, whose patches are multiplied at once: they have to stay in the cache


def _with_cpu_form(plain: Callable, *, value: Callable, gradient: Callable) -> Callable:
    """An operation that is ``plain``, but computed otherwise on CPUs.

    Args:
      value: what ``plain`` computes, from the same arguments.
      gradient: a tuple of the arguments' gradients, from that of the value, and the arguments.
    """

    @jax.custom_vjp
    def operation(*arguments: jax.Array) -> jax.Array:
        return lax.platform_dependent(*arguments, cpu=value, default=plain)

    def forward(*arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return operation(*arguments), arguments

    def backward(arguments: tuple[jax.Array, ...], of_value: jax.Array) -> tuple[jax.Array, ...]:
        def plain_gradient(of_value: jax.Array, *arguments: jax.Array) -> tuple[jax.Array, ...]:
            return jax.vjp(plain, *arguments)[1](of_value)

        return lax.platform_dependent(of_value, *arguments, cpu=gradient, default=plain_gradient)

    operation.defvjp(forward, backward)
    return operation


def conv(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **_: Any
) -> jax.Array:
    """A convolution as ``flax.linen.Conv`` asks for it, without dilation and groups.

    Args:
      images: (batch, height, width, channels).
      kernel: (height, width, channels, features).
      strides: of both axes, in pixels.
      padding: of both axes, zeros before and after.

    Returns:
      (batch, height, width, features).
    """

    def plain(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def images_gradient(gradient: jax.Array, images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.vjp(lambda images: plain(images, kernel), images)[1](gradient)[0]

    def kernel_gradient(gradient: jax.Array, images: jax.Array) -> jax.Array:
        return _kernel_gradient(gradient, images, strides, padding, kernel.shape).astype(kernel.dtype)

    def gradients(gradient: jax.Array, images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_images = _one_by_one(images_gradient)(gradient, images, kernel)
        return of_images, _one_by_one(kernel_gradient)(gradient, images)

    return _with_cpu_form(plain, value=_one_by_one(plain), gradient=gradients)(images, kernel)


def _one_by_one(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Under ``jax.vmap``, the function of one after the other: several convolutions would become a grouped one.

    XLA runs that slowly on CPUs.
    """
    mappable = jax.custom_batching.custom_vmap(function)

    @mappable.def_vmap
    def one_by_one(size: int, mapped: Sequence[bool], *arguments: jax.Array) -> tuple[jax.Array, bool]:
        each = [[a[i] if own else a for a, own in zip(arguments, mapped, strict=True)] for i in range(size)]
        return jnp.stack([mappable(*own) for own in each]), True

    return mappable


def _kernel_gradient(
    gradient: jax.Array,
    images: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    shape: Sequence[int],
) -> jax.Array:
    """Products of gradients and patches, summed over positions; some images at a time, so that patches stay in a cache.

    XLA's form is a convolution whose kernel is as large as the map, several times slower on CPUs.
    """
    height, width, channels, features = shape
    count, rows, columns, _ = gradient.shape
    together = max(1, _POSITIONS // (rows * columns))
    together = next(divisor for divisor in range(together, 0, -1) if count % divisor == 0)
    precise = jnp.promote_types(images.dtype, jnp.float32)
    # The pixels of a stride become channels, without which the first layer's products would be short. And the rows
    # of a block are those of the first image, the second and so on, then the next ones: slices of rows are one piece.
    down, right = strides
    tall, wide = -(-height // down), -(-width // right)
    high, broad, deep = rows + tall - 1, columns + wide - 1, down * right * channels
    ends = [
        (before, strided - before - length, 0)
        for (before, _), strided, length in zip(padding, (high * down, broad * right), images.shape[1:3], strict=True)
    ]
    blocks = [array.reshape(-1, together, *array.shape[1:]) for array in (gradient, images)]

    def add(total: jax.Array, block: list[jax.Array]) -> tuple[jax.Array, None]:
        gradient, images = block
        padded = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *ends, (0, 0, 0)])
        pixels = padded.reshape(together, high, down, broad, right, channels).transpose(1, 0, 3, 2, 4, 5)
        strided = pixels.reshape(high * together, broad, deep)
        # What a row of the kernel sees, the next row sees further down: copied once for all of them.
        seen = jnp.concatenate([strided[:, left : left + columns] for left in range(wide)], axis=-1)
        tops = [seen[top * together : (top + rows) * together] for top in range(tall)]
        patches = [each.reshape(-1, wide * deep) for each in tops]
        turned = jnp.swapaxes(gradient, 0, 1).reshape(-1, features).T
        turned = lax.optimization_barrier(turned)  # once, not in each product
        return total + jnp.stack([jnp.matmul(turned, some, preferred_element_type=precise) for some in patches]), None

    total, _ = lax.scan(add, jnp.zeros((tall, features, wide * deep), precise), blocks)
    kernel = jnp.swapaxes(total, 1, 2).reshape(tall, wide, down, right, channels, features)
    kernel = jnp.swapaxes(kernel, 1, 2).reshape(tall * down, wide * right, channels, features)
    return kernel[:height, :width]


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


def _normalise(x: jax.Array, window: tuple[int, ...], k: float, alpha: float, beta: float) -> jax.Array:
    """Divided by a power of the squares in a window, a width for each axis, that is centred on each value."""
    padding = [(width // 2, (width - 1) // 2) for width in window]

    def scale(x: jax.Array) -> jax.Array:
        return k + alpha * lax.reduce_window(x * x, 0.0, lax.add, window, (1,) * x.ndim, padding)

    def plain(x: jax.Array) -> jax.Array:
        return x * scale(x) ** -beta

    def divided(x: jax.Array, scale: jax.Array) -> jax.Array:
        # On CPUs twice as fast as a power. The division comes last: what ends in a product XLA would compute once more
        # for the pooling's gradient, and keep what it is made of instead.
        return x * jnp.exp((1 - beta) * jnp.log(scale)) / scale

    def value(x: jax.Array) -> jax.Array:
        return divided(x, scale(x))

    def gradient(of_value: jax.Array, x: jax.Array) -> tuple[jax.Array]:
        # Shorter than what JAX makes of the plain form, which divides, and takes a power, once more.
        # The sums again, as they are as large as x. Without a zero that waits for the gradient, XLA would find that it
        # had them before, and keep them.
        x = x + 0 * of_value
        scales = scale(x)
        own = divided(of_value, scales)
        mirrored = [(after, before) for before, after in padding]
        others = lax.reduce_window(own * x / scales, 0.0, lax.add, window, (1,) * x.ndim, mirrored)
        return (own - 2 * alpha * beta * x * others,)

    precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return _with_cpu_form(plain, value=value, gradient=gradient)(precise).astype(x.dtype)


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

    def maxima(x: jax.Array, axis: int) -> jax.Array:
        return functools.reduce(jnp.maximum, _places(x, axis, window, stride))

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)

    def value(x: jax.Array) -> jax.Array:
        return maxima(maxima(padded(x), 2), 1)

    def along(gradient: jax.Array, x: jax.Array, axis: int) -> jax.Array:
        """The gradient of maxima along an axis: of equal ones, the first has it, as in XLA."""
        largest = maxima(x, axis)
        taken, own = jnp.zeros(largest.shape, bool), []
        for values in _places(x, axis, window, stride):
            first = (values == largest) & ~taken
            taken |= first
            own.append(jnp.where(first, gradient, 0))
        return _woven(own, axis, stride, x.shape[axis])

    def gradient(of_value: jax.Array, x: jax.Array) -> tuple[jax.Array]:
        # XLA looks for the maxima again, window by window, to know where the gradient goes.
        whole = padded(x)
        found = along(along(of_value, maxima(whole, 2), 1), whole, 2)
        return (found[:, : x.shape[1], : x.shape[2]],)

    return _with_cpu_form(plain, value=value, gradient=gradient)(x)


def avg_pool(x: jax.Array, *, window: int, stride: int, ceil: bool) -> jax.Array:
    """Average pooling of cuda-convnet's CIFAR-10 nets: over the pixels of the window that are on the map.

    Arguments and errors are those of ``max_pool``.
    """
    padding = _hanging(x, window, stride, ceil)

    def plain(x: jax.Array) -> jax.Array:
        return nn.avg_pool(x, (window, window), (stride, stride), padding, count_include_pad=False)

    def gradient(of_value: jax.Array, x: jax.Array) -> tuple[jax.Array]:
        # XLA spreads the gradient with zeros between its values, and adds up windows of that.
        for axis, (_, hanging) in zip((1, 2), padding, strict=True):
            length, count = x.shape[axis], of_value.shape[axis]
            pixels = np.minimum(window, length - stride * np.arange(count))
            share = of_value / jnp.expand_dims(jnp.array(pixels, x.dtype), range(1, x.ndim - axis))
            woven = _woven([share] * window, axis, stride, length + hanging)
            of_value = lax.slice_in_dim(woven, 0, length, 1, axis)
        return (of_value,)

    return _with_cpu_form(plain, value=plain, gradient=gradient)(x)


def _places(x: jax.Array, axis: int, window: int, stride: int) -> list[jax.Array]:
    """The first values of all windows along an axis, the second ones, and so on."""
    reach = x.shape[axis] - window
    return [lax.slice_in_dim(x, place, place + reach + 1, stride, axis) for place in range(window)]


def _woven(places: list[jax.Array], axis: int, stride: int, length: int) -> jax.Array:
    """What the places of all windows have, added up where it came from: the transpose of ``_places``."""
    # Every stride-th position is of the same places of its windows.
    count, windows = -(-length // stride), places[0].shape[axis]
    phases = []
    for phase in range(stride):
        shifted = []
        for place in range(phase, len(places), stride):
            before = place // stride
            borders = [(0, 0)] * places[0].ndim
            borders[axis] = (before, count - before - windows)
            shifted.append(jnp.pad(places[place], borders))
        phases.append(sum(shifted, start=jnp.zeros((), places[0].dtype)))
    woven = jnp.stack(jnp.broadcast_arrays(*phases), axis + 1)
    return lax.slice_in_dim(lax.collapse(woven, axis, axis + 2), 0, length, 1, axis)


def _hanging(x: jax.Array, window: int, stride: int, ceil: bool) -> list[tuple[int, int]]:
    """By how much windows hang over the edges of maps (batch, height, width, channels)."""
    height, width = x.shape[1:3]
    if window > min(height, width):
        raise ValueError(
            f"a pooling window of {window}x{window} does not fit a map of {height}x{width}: "
            "use larger images (data.crop), smaller strides or fewer poolings"
        )
    return [(0, (window - side) % stride if ceil else 0) for side in (height, width)]
