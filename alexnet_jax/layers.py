"""The operations of AlexNet that no library offers in the paper's form."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import lax


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
    squares = lax.reduce_window(x * x, 0.0, lax.add, window, (1,) * x.ndim, padding)
    return x * (k + alpha * squares) ** -beta


def max_pool(x: jax.Array, *, window: int, stride: int, ceil: bool) -> jax.Array:
    """Max pooling (paper, section 3.4); it overlaps where the stride is less than the window.

    Args:
      x: activations (batch, height, width, channels).
      ceil: whether a last window may hang over the right and bottom edge, as in cuda-convnet and Caffe.

    Raises:
      ValueError: the window is larger than the map.
    """
    return _pool(nn.max_pool, x, window, stride, ceil)


def avg_pool(x: jax.Array, *, window: int, stride: int, ceil: bool) -> jax.Array:
    """Average pooling of cuda-convnet's CIFAR-10 nets: over the pixels of the window that are on the map.

    Arguments and errors are those of ``max_pool``.
    """
    return _pool(functools.partial(nn.avg_pool, count_include_pad=False), x, window, stride, ceil)


def _pool(pool: Callable[..., Any], x: jax.Array, window: int, stride: int, ceil: bool) -> jax.Array:
    height, width = x.shape[1:3]
    if window > min(height, width):
        raise ValueError(
            f"a pooling window of {window}x{window} does not fit a map of {height}x{width}: "
            "use larger images (data.crop), smaller strides or fewer poolings"
        )
    padding = [(0, (window - side) % stride if ceil else 0) for side in (height, width)]
    return pool(x, (window, window), (stride, stride), padding)
