"""One tower of half the width as a Keras tutorial has it: no normalisation, dropout before the dense layers.

Initial values are Keras's: Glorot's uniform, and biases 0. Keras scales up in training what dropout leaves. The
tutorial's softmax is in the loss here; its training recipe, which it does not give, is the paper's.
"""

from ml_collections import ConfigDict

from configs import base, scales


def glorot_std(fan_in: int, fan_out: int) -> float:
    """Standard deviation of Glorot and Bengio's initial weights (2010)."""
    return (2 / (fan_in + fan_out)) ** 0.5


def get_config(scale: str = "imagenet2012", fc6: int = 2048, fc7: int = 2048, classes: int = 1000) -> ConfigDict:
    config = base.get_config(scale, scales.PHOTOS)
    layers = config.model.layers
    channels = 3
    for name, features in (("conv1", 48), ("conv2", 128), ("conv3", 192), ("conv4", 192), ("conv5", 128)):
        area = layers[name].kernel ** 2
        layers[name].update(features=features, weight_std=glorot_std(area * channels, area * features), bias=0.0)
        channels = features
    inputs = 6 * 6 * channels
    for name, features in (("fc6", fc6), ("fc7", fc7)):
        layers[name].update(features=features, weight_std=glorot_std(inputs, features), bias=0.0)
        inputs = features
    layers.fc8.weight_std = glorot_std(inputs, classes)

    layers.conv1.padding = (1, 2)
    for name in ("conv1", "conv2"):
        layers[name].then = ("activation", "max_pool")
    layers.conv5.then = ("activation", "max_pool", "dropout")
    layers.fc7.then = ("activation",)
    config.update({"model": {"towers": 1, "init": "uniform", "dropout": {"rate": 0.2, "inverted": True}}})
    return config
