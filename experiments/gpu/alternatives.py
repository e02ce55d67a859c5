"""Forms of the layers that the package does not use, to be measured against those it does; and PyTorch's step.

The JAX forms have the signatures of `alexnet_jax.layers`, so that a measurement can put one in the place of another.
PyTorch is imported only where it is used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import baselines
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

NHWC = ("NHWC", "HWIO", "NHWC")

# Response normalisation: three ways to sum over the channels around each one, in float32.


def window_sum(x: jax.Array, n: int) -> jax.Array:
    """Sum over n channels by `reduce_window`."""
    ones = (1,) * (x.ndim - 1)
    padding = [(0, 0)] * (x.ndim - 1) + [(n // 2, (n - 1) // 2)]
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, (*ones, n), (1,) * x.ndim, padding)


def shifted_sum(x: jax.Array, n: int) -> jax.Array:
    """Sum over n channels by adding shifted slices."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(n // 2, (n - 1) // 2)])
    channels = x.shape[-1]
    total = padded[..., :channels]
    for offset in range(1, n):
        total = total + padded[..., offset : offset + channels]
    return total


def banded_sum(x: jax.Array, n: int) -> jax.Array:
    """Sum over n channels by a product with a banded matrix of ones."""
    channels = np.arange(x.shape[-1])
    distance = channels[:, None] - channels[None, :]  # input minus output channel
    band = (distance >= -(n // 2)) & (distance <= (n - 1) // 2)
    return jnp.matmul(x, jnp.asarray(band, x.dtype))


def lrn(window: Callable[[jax.Array, int], jax.Array], *, closed: bool) -> Callable[..., jax.Array]:
    """Return a form of `layers.lrn`, whose sums are `window`.

    Args:
      closed: whether the gradient is the formula, with the sums computed again; otherwise the derivative of the value.
        The formula needs an odd n, for which the window is symmetric.
    """

    def form(x: jax.Array, *, n: int, k: float, alpha: float, beta: float) -> jax.Array:
        def value(x: jax.Array) -> jax.Array:
            return x * (k + alpha * window(x * x, n)) ** -beta

        def gradient(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
            scale = k + alpha * window(x * x, n)
            direct = cotangent * scale**-beta
            return (direct - 2 * alpha * beta * x * window(direct * x / scale, n),)

        operation = value
        if closed:
            operation = jax.custom_vjp(value)
            operation.defvjp(lambda x: (value(x), x), gradient)
        return operation(x.astype(jnp.float32)).astype(x.dtype)

    return form


LRN = {
    "reduce_window, derivative": lrn(window_sum, closed=False),
    "reduce_window, closed form": lrn(window_sum, closed=True),
    "shifted slices, derivative": lrn(shifted_sum, closed=False),
    "shifted slices, closed form": lrn(shifted_sum, closed=True),
    "banded product, closed form": lrn(banded_sum, closed=True),
}

# Convolutions of several towers or seeds, each with its own kernels.


def conv(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **_: Any
) -> jax.Array:
    """Convolve plainly: under `jax.vmap` this becomes a grouped convolution."""
    return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=NHWC)


def conv_by_patches(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **_: Any
) -> jax.Array:
    """Convolve as one product with patches, slices side by side: under `jax.vmap` a batched product."""
    height, width, channels, features = kernel.shape
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        (size - k) // s + 1 for size, k, s in zip(padded.shape[1:3], (height, width), strides, strict=True)
    )
    patches = [
        padded[:, y : y + (rows - 1) * strides[0] + 1 : strides[0], x : x + (columns - 1) * strides[1] + 1 : strides[1]]
        for y in range(height)
        for x in range(width)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(height * width * channels, features)


def conv_joined(
    images: jax.Array, kernels: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Convolve all towers, images (towers, batch, ...), as one grouped convolution with their channels side by side."""
    towers, batch, height, width, channels = images.shape
    side_by_side = jnp.moveaxis(images, 0, 3).reshape(batch, height, width, towers * channels)
    kernel = jnp.moveaxis(kernels, 0, 3).reshape(*kernels.shape[1:4], -1)
    groups: dict[str, Any] = {"dimension_numbers": NHWC, "feature_group_count": towers}
    joined = lax.conv_general_dilated(side_by_side, kernel, strides, padding, **groups)
    return jnp.moveaxis(joined.reshape(*joined.shape[:3], towers, -1), 3, 0)


# The same network and training step in PyTorch.


def pytorch_step(
    config: ConfigDict, classes: int, images: np.ndarray, labels: np.ndarray, dtype: str, mode: str
) -> Callable[[], Any]:
    """Return a function that takes one training step, with crops, flips, colour noise and the sums of the metrics.

    Args:
      images: Training images, uint8 (n, size, size, 3); they stay on the device.
      dtype: "tensorfloat32", or "bfloat16" by autocast.
      mode: "eager", "compile", or "graphs", which is compiled with CUDA graphs.
    """
    import torch
    from torch.nn import functional

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    data, batch, size, crop = config.data, config.train.batch_size, config.data.image_size, config.data.crop
    network = baselines.pytorch_network(config, classes)
    network(torch.zeros(2, 3, crop, crop))  # gives the lazy layers their sizes
    network = network.to(device=device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=device.type == "cuda"
    )
    examples, targets = torch.tensor(images, device=device), torch.tensor(labels, device=device).long()
    mean = torch.full((size, size, 3), 120.0, device=device)
    colours = torch.full((3,), 30.0, device=device), torch.eye(3, device=device)
    deviation = torch.tensor(data.std, device=device)
    places, each = torch.arange(crop, device=device), torch.arange(batch, device=device)[:, None, None]

    def views(uint8: Any) -> Any:
        rows = columns = places.expand(batch, crop)
        offset = (size - crop) // 2
        if data.augment.random_crop:
            rows = rows + torch.randint(0, size - crop + 1, (batch, 1), device=device)
            columns = columns + torch.randint(0, size - crop + 1, (batch, 1), device=device)
        else:
            rows, columns = rows + offset, columns + offset
        if data.augment.flip:
            columns = torch.where(torch.rand(batch, 1, device=device) < 0.5, columns.flip(1), columns)
        rows, columns = rows[:, :, None], columns[:, None, :]
        x = uint8[each, rows, columns].float() - mean[rows, columns]
        if noise := data.augment.colour.noise:
            x = x + ((noise * torch.randn(batch, 3, device=device) * colours[0]) @ colours[1])[:, None, None, :]
        return (x / deviation).permute(0, 3, 1, 2)  # channels last in memory

    def forward(uint8: Any, classes: Any) -> tuple[Any, Any]:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = network(views(uint8))
        logits = logits.float()
        loss = functional.cross_entropy(logits, classes)
        hits = logits.detach().topk(5).indices == classes[:, None]
        return loss, torch.stack([loss.detach() * batch, batch - hits[:, 0].sum(), batch - hits.sum()])

    if mode != "eager":
        options: dict[str, Any] = {"mode": "reduce-overhead"} if mode == "graphs" else {}
        forward = torch.compile(forward, dynamic=False, **options)
    sums, number = torch.zeros(3, device=device), 0

    def step() -> None:
        nonlocal number
        first = number * batch % (len(targets) - batch + 1)
        number += 1
        optimizer.zero_grad(set_to_none=True)
        loss, metrics = forward(examples[first : first + batch], targets[first : first + batch])
        loss.backward()
        sums.add_(metrics)
        optimizer.step()

    return step
