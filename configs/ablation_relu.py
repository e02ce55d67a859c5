"""Does a network of rectified linear units learn faster than one of tanh units?

The paper, section 3.1 and figure 1: on CIFAR-10, a four-layer convolutional network reaches a training error of 25 %
six times faster. There is no regularisation, and the learning rates are "chosen independently to make training as fast
as possible": each arm tunes its own by the epochs to 25 % that are then compared, with other seeds.

Embedded digits, 2 cores: 5 to 8 s a run, after 36 trials of half that; top-1 error 4.0 % (`relu`), n = 10. See
experiments/relu.
"""

from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.configs import base

TANH = {"model.activation": "tanh"}
ARMS = {"relu": {}, "tanh": TANH}
CLAIMS = (base.claim("tanh", "epochs_to_25", "section 3.1, figure 1", ratio=6.0),)

UNREGULARISED = {
    "model.lrn.enabled": False,
    "model.dropout.rate": 0.0,
    "data.augment.random_crop": False,
    "data.augment.flip": False,
    "data.augment.colour.noise": 0.0,
    "optim.weight_decay": 0.0,
    "optim.decay_epochs": (),
}
TUNING = {
    "tuning.key": "optim.learning_rate",
    "tuning.metric": "epochs_to_25",
    "tuning.choices": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),  # wide enough for an optimum inside the grid
    "tuning.seeds": (1000, 1001, 1002),
}
# The training error is a mean over log_every batches: few make it noisy, many make epochs to 25 % coarse.
FOUR_LAYERS = {"model.order": ("conv1", "conv2", "conv5", "fc8")}
AT_SCALE: dict[str, dict[str, Any]] = {
    "embedded": FOUR_LAYERS | {"train.epochs": 2.0, "train.log_every": 20, "tuning.epochs": 1.0},
    "cifar10": FOUR_LAYERS | {"train.epochs": 12.0, "train.log_every": 50},
    "imagenette": {"tuning.epochs": 20.0, "tuning.seeds": (1000,)},
    "imagenet2012": {"tuning.epochs": 10.0, "tuning.seeds": (1000,)},
}


def get_config(scale: str = "embedded") -> ConfigDict:
    return base.study(scale, ARMS, CLAIMS, UNREGULARISED | TUNING | AT_SCALE.get(scale, {}))
