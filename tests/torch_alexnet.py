"""Every AlexNet of configs/networks/ on one device in PyTorch: grouped convolutions, channels first."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict

Tensors = dict[str, dict[str, torch.Tensor]]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def forward(
    config: ConfigDict, params: Tensors, images: torch.Tensor, batch_stats: Tensors | None = None, train: bool = False
) -> torch.Tensor:
    """Compute logits.

    Args:
      config: the `model` section of a config, without dropout.
      params: grouped parameters: those of all towers side by side, in our layout.
      images: (batch, height, width, channels).
      batch_stats: "mean" and "var" of the layers with batch normalisation.
      train: normalise by the batch instead.
    """
    x = images.permute(0, 3, 1, 2)
    for number, name in enumerate(config.order):
        layer, kernel, bias = config.layers[name], params[name]["kernel"], params[name]["bias"]
        groups = 1 if number == 0 or layer.sees == "all" else config.towers
        if layer.kind == "conv":
            before, after = layer.padding
            x = F.pad(x, (before, after, before, after))
            x = F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride=layer.stride, groups=groups)
        elif layer.kind == "local":
            x = _local(x, kernel, bias, layer)
        else:
            # Flattened with channels last, each group's channels separately.
            inputs = [part.movedim(1, -1).flatten(1) for part in x.chunk(groups, dim=1)]
            kernels = kernel.chunk(groups, dim=1)
            x = torch.cat([part @ weights for part, weights in zip(inputs, kernels, strict=True)], dim=1) + bias
        for operation in layer.then:
            if operation == "batch_norm":
                assert batch_stats is not None
                norm = f"{name}_batch_norm"
                x = _batch_norm(x, config, params[norm], batch_stats[norm], train)
            else:
                x = _operation(x, operation, config)
    return x


def _operation(x: torch.Tensor, operation: str, config: ConfigDict) -> torch.Tensor:
    pool = config.pool
    match operation:
        case "activation":
            return ACTIVATIONS[config.activation](x)
        case "lrn":
            return _lrn(x, config)
        case "spatial_lrn":
            return _spatial_lrn(x, config.lrn.spatial)
        case "max_pool":
            return F.max_pool2d(x, pool.window, pool.stride, ceil_mode=pool.ceil)
        case "avg_pool":
            return F.avg_pool2d(x, pool.window, pool.stride, ceil_mode=pool.ceil, count_include_pad=False)
        case "dropout":
            assert config.dropout.rate == 0
            return x
    raise AssertionError(operation)


def _lrn(x: torch.Tensor, config: ConfigDict) -> torch.Tensor:
    """Normalise over the channels of each group, or of all. PyTorch divides alpha by n."""
    lrn = config.lrn
    groups = [x] if lrn.sees == "all" else x.chunk(config.towers, dim=1)
    normalised = [F.local_response_norm(group, lrn.n, lrn.n * lrn.alpha, lrn.beta, lrn.k) for group in groups]
    return torch.cat(normalised, dim=1)


def _spatial_lrn(x: torch.Tensor, config: ConfigDict) -> torch.Tensor:
    window = config.window
    squares = F.avg_pool2d(x**2, window, stride=1, padding=window // 2) * window**2
    return x / (config.k + config.alpha * squares) ** config.beta


def _batch_norm(
    x: torch.Tensor, config: ConfigDict, params: dict[str, torch.Tensor], stats: dict[str, torch.Tensor], train: bool
) -> torch.Tensor:
    mean, var = (stats[name].detach().clone() for name in ("mean", "var"))  # PyTorch updates them in place
    return F.batch_norm(x, mean, var, params["scale"], params["bias"], train, eps=config.batch_norm.epsilon)


def _local(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor, layer: ConfigDict) -> torch.Tensor:
    """Apply a convolution with other weights at each position; kernel (height, width, in x kernel x kernel, out)."""
    patches = F.unfold(x, layer.kernel, padding=layer.padding[0], stride=layer.stride)
    height, width, inputs, _ = kernel.shape
    patches = patches.reshape(len(x), inputs, height, width)
    return torch.einsum("bihw,hwio->bohw", patches, kernel) + bias.permute(2, 0, 1)


def tensors(params: dict[str, dict[str, Any]], dtype: torch.dtype = torch.float32) -> Tensors:
    """Return parameters as tensors with gradients."""
    return {
        name: {part: torch.tensor(np.asarray(array), dtype=dtype, requires_grad=True) for part, array in parts.items()}
        for name, parts in params.items()
    }
