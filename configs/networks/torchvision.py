"""torchvision's `alexnet`: the features of `one_weird_trick`, without normalisation, dropout before the dense layers.

Initial values are PyTorch's: uniform in +-1/sqrt(fan-in), weights and biases. Rates and decay are those of its
reference script; the script's crops are of random size and shape, ours of the paper's.
"""

from ml_collections import ConfigDict

from configs import base, scales

FEATURES = {"conv1": 64, "conv2": 192, "conv3": 384, "conv4": 256, "conv5": 256}
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
DIFFERENCE = {
    "model": {
        "towers": 1,
        "init": "uniform",
        "layers": {
            "conv1": {"padding": (2, 2), "then": ("activation", "max_pool")},
            "conv2": {"then": ("activation", "max_pool")},
            "conv5": {"then": ("activation", "max_pool", "dropout")},
            "fc7": {"then": ("activation",)},
        },
        "dropout": {"inverted": True},
    },
    "data": {
        "subtract": "mean",
        "mean": (123.675, 116.28, 103.53),
        "std": (58.395, 57.12, 57.375),
        "augment": {"colour": {"noise": 0.0}},
    },
    "optim": {"weight_decay": 1e-4, "cut_epochs": (30.0, 60.0)},
    "train": {"batch_size": 32},
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    config = base.get_config(scale, scales.PHOTOS)
    config.update(DIFFERENCE)
    for name, fan_in in FAN_IN.items():
        deviation = (3 * fan_in) ** -0.5
        config.model.layers[name].update(weight_std=deviation, bias=0.0, bias_std=deviation)
    for name, features in FEATURES.items():
        config.model.layers[name].features = features
    return config
