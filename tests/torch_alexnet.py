"""Every AlexNet of configs/nets/ on one device in PyTorch: grouped convolutions, maps with channels first."""

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict


def _lrn(x: torch.Tensor, config: ConfigDict, towers: int) -> torch.Tensor:
    """PyTorch divides alpha by n; over the channels of each group, or of all."""
    n = config.lrn.n
    groups = [x] if config.lrn.crosses else x.chunk(towers, dim=1)
    normalised = [F.local_response_norm(g, n, n * config.lrn.alpha, config.lrn.beta, config.lrn.k) for g in groups]
    return torch.cat(normalised, dim=1)


def _spatial_lrn(x: torch.Tensor, config: ConfigDict) -> torch.Tensor:
    window = config.window
    squares = F.avg_pool2d(x**2, window, stride=1, padding=window // 2) * window**2
    return x / (config.k + config.alpha * squares) ** config.beta


def _local(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor, layer: ConfigDict) -> torch.Tensor:
    """A convolution with weights of its own at each position: (height, width, in x kernel x kernel, out)."""
    patches = F.unfold(x, layer.kernel, padding=layer.padding[0], stride=layer.stride)
    height, width, inputs, _ = kernel.shape
    patches = patches.reshape(len(x), inputs, height, width)
    return torch.einsum("bihw,hwio->bohw", patches, kernel) + bias.permute(2, 0, 1)


def forward(config: ConfigDict, params: dict, images: torch.Tensor) -> torch.Tensor:
    """Grouped parameters and images (batch, height, width, channels) to logits."""
    towers, pool = config.towers, config.pool
    x = images.permute(0, 3, 1, 2)
    for number, name in enumerate(config.order):
        layer, kernel, bias = config.layers[name], params[name]["kernel"], params[name]["bias"]
        groups = 1 if number == 0 or layer.crosses else towers
        if layer.kind == "conv":
            before, after = layer.padding
            x = F.pad(x, (before, after, before, after))
            x = F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride=layer.stride, groups=groups)
        elif layer.kind == "local":
            x = _local(x, kernel, bias, layer)
        else:
            # Flattened with channels last, and each group's channels for themselves.
            parts = [part.movedim(1, -1).flatten(1) for part in x.chunk(groups, dim=1)]
            kernels = kernel.chunk(groups, dim=1)
            x = torch.cat([part @ weights for part, weights in zip(parts, kernels, strict=True)], dim=1) + bias
        for operation in layer.then:
            match operation:
                case "activation":
                    x = {"relu": torch.relu, "tanh": torch.tanh}[config.activation](x)
                case "lrn":
                    x = _lrn(x, config, towers)
                case "spatial_lrn":
                    x = _spatial_lrn(x, config.lrn.spatial)
                case "max_pool":
                    x = F.max_pool2d(x, pool.window, pool.stride, ceil_mode=pool.ceil)
                case "avg_pool":
                    x = F.avg_pool2d(x, pool.window, pool.stride, ceil_mode=pool.ceil, count_include_pad=False)
                case "dropout":
                    assert config.dropout.rate == 0
    return x


def tensors(params: dict) -> dict:
    return {
        name: {kind: torch.tensor(np.asarray(array), requires_grad=True) for kind, array in kinds.items()}
        for name, kinds in params.items()
    }
