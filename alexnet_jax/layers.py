"""The operations of AlexNet that no library offers in the paper's form."""

import jax
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
    window = (1,) * (x.ndim - 1) + (n,)
    padding = ((0, 0),) * (x.ndim - 1) + ((n // 2, (n - 1) // 2),)
    squares = lax.reduce_window(x * x, 0.0, lax.add, window, (1,) * x.ndim, padding)
    return x * (k + alpha * squares) ** -beta


def max_pool(x: jax.Array, *, window: int, stride: int) -> jax.Array:
    """Max pooling (paper, section 3.4); it overlaps where the stride is less than the window.

    Args:
      x: activations (batch, height, width, channels).

    Raises:
      ValueError: the window is larger than the map.
    """
    height, width = x.shape[1:3]
    if window > min(height, width):
        raise ValueError(
            f"a pooling window of {window}x{window} does not fit a map of {height}x{width}: "
            "use larger images (data.crop), smaller strides or fewer poolings"
        )
    return lax.reduce_window(x, -jax.numpy.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID")
