"""One tower of half the width, from a Keras tutorial: no normalisation, dropout before the dense layers.

Initial values are Keras's: Glorot's uniform weights, biases of 0. The tutorial's softmax is part of the loss here. It
gives no training recipe; this one is the paper's.
"""

from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.configs import base, scales

FEATURES = {"conv1": 48, "conv2": 128, "conv3": 192, "conv4": 192, "conv5": 128}


def get_config(scale: str = "imagenet2012", fc6: int = 2048, fc7: int = 2048, classes: int = 1000) -> ConfigDict:
    """Return the network with `fc6` and `fc7` neurons; initial weights of the last layer depend on `classes`."""
    changes: dict[str, Any] = {
        "model.towers": 1,
        "model.init": "uniform",
        "model.layers.conv1.padding": (1, 2),
        "model.layers.conv1.then": ("activation", "max_pool"),
        "model.layers.conv2.then": ("activation", "max_pool"),
        "model.layers.conv5.then": ("activation", "max_pool", "dropout"),
        "model.layers.fc7.then": ("activation",),
        "model.dropout.rate": 0.2,
        "model.dropout.inverted": True,
    }
    kernels = base.get_config(scale, among=scales.PHOTOS).model.layers
    inputs = 3
    for layer, features in FEATURES.items():
        area = kernels[layer].kernel ** 2
        changes[f"model.layers.{layer}.features"] = features
        changes[f"model.layers.{layer}.weight_std"] = glorot_std(area * inputs, area * features)
        inputs = features
    inputs *= 6 * 6
    for layer, neurons in (("fc6", fc6), ("fc7", fc7)):
        changes[f"model.layers.{layer}.features"] = neurons
        changes[f"model.layers.{layer}.weight_std"] = glorot_std(inputs, neurons)
        inputs = neurons
    changes["model.layers.fc8.weight_std"] = glorot_std(inputs, classes)
    changes |= {f"model.layers.{layer}.bias": 0.0 for layer in base.LAYERS}
    return base.get_config(scale, changes, scales.PHOTOS)


def glorot_std(fan_in: int, fan_out: int) -> float:
    """Return the standard deviation of Glorot and Bengio's initial weights (2010)."""
    return (2 / (fan_in + fan_out)) ** 0.5
