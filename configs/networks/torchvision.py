"""torchvision's `alexnet`: the features of `one_weird_trick`, no normalisation, dropout before the dense layers.

Initial weights and biases are PyTorch's: uniform in +-1/sqrt(fan-in). Learning rate and weight decay are those of its
reference script; the script's crops vary in size and shape, ours are the paper's.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base, scales
from alexnet_jax.configs.networks import one_weird_trick

FAN_IN = {
    "conv1": 11 * 11 * 3,
    "conv2": 5 * 5 * 64,
    "conv3": 3 * 3 * 192,
    "conv4": 3 * 3 * 384,
    "conv5": 3 * 3 * 256,
    "fc6": 6 * 6 * 256,
    "fc7": 4096,
    "fc8": 4096,
}
CHANGES = {
    "model.towers": 1,
    "model.init": "uniform",
    **{f"model.layers.{layer}.features": features for layer, features in one_weird_trick.FEATURES.items()},
    **{f"model.layers.{layer}.weight_std": (3 * fan_in) ** -0.5 for layer, fan_in in FAN_IN.items()},
    **{f"model.layers.{layer}.bias_std": (3 * fan_in) ** -0.5 for layer, fan_in in FAN_IN.items()},
    **{f"model.layers.{layer}.bias": 0.0 for layer in FAN_IN},
    "model.layers.conv1.padding": (2, 2),
    "model.layers.conv1.then": ("activation", "max_pool"),
    "model.layers.conv2.then": ("activation", "max_pool"),
    "model.layers.conv5.then": ("activation", "max_pool", "dropout"),
    "model.layers.fc7.then": ("activation",),
    "model.dropout.inverted": True,
    "data.subtract": "mean",
    "data.mean": (123.675, 116.28, 103.53),
    "data.std": (58.395, 57.12, 57.375),
    "data.augment.colour.noise": 0.0,
    "optim.weight_decay": 1e-4,
    "optim.decay_epochs": (30.0, 60.0),
    "train.batch_size": 32,
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return base.get_config(scale, CHANGES, scales.PHOTOS)
