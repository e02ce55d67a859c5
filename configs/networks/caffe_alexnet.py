"""Caffe's AlexNet, models/bvlc_alexnet: the net of most weights that are passed around.

Its grouped convolutions are our two towers, but its normalisation does not know of groups: two channels beyond the
border count, and come from the other tower. Caffe's alpha is divided by the window's 5 channels.
"""

from ml_collections import ConfigDict

from configs import base, scales

DIFFERENCE = {
    "model": {
        "layers": {
            "conv1": {"padding": (0, 0)},
            "conv2": {"bias": 0.1},
            "conv4": {"bias": 0.1},
            "conv5": {"bias": 0.1},
            "fc6": {"bias": 0.1, "weight_std": 0.005},
            "fc7": {"bias": 0.1, "weight_std": 0.005},
        },
        "lrn": {"k": 1.0, "alpha": 2e-5, "crosses": True},
        "pool": {"ceil": True},
        "dropout": {"inverted": True},
    },
    # Its training subtracts a mean image, whoever uses its weights that image's mean pixel.
    "data": {
        "crop": 227,
        "subtract": "mean",
        "mean": (122.7, 116.7, 104.0),
        "augment": {"colour": {"noise": 0.0}},
    },
    "optim": {"biases": {"rate": 2.0, "decay": 0.0}, "cut_epochs": (20.0, 40.0, 60.0, 80.0)},  # every 100,000 steps
    "train": {"batch_size": 256},  # 450,000 steps, 90 epochs
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    config = base.get_config(scale, scales.PHOTOS)
    config.update(DIFFERENCE)
    return config
