"""Does a net of rectified linear units learn faster than one of tanh units?

The paper, section 3.1 and figure 1: on CIFAR-10, a four-layer convolutional net reaches 25 % training error six times
sooner. Each net's learning rate was chosen to make it learn as fast as it could, and nothing regularised.
"""

from ml_collections import ConfigDict

from configs import base

TANH = {"model": {"activation": "tanh"}}
CLAIMS = (base.claim("tanh", "epochs_to_25", "section 3.1, figure 1", ratio=6.0),)

UNREGULARISED = {
    "model": {"lrn": {"enabled": False}, "dropout": {"rate": 0.0}},
    "data": {"augment": {"random_crop": False, "flip": False, "colour": {"noise": 0.0}}},
    "optim": {"weight_decay": 0.0, "cut_epochs": ()},
}
FOUR_LAYERS = {"model": {"order": ("conv1", "conv2", "conv5", "fc8")}}
# By scale: the net, how often its training error is logged, and the rates to choose among.
SCALES = {
    "embedded": (FOUR_LAYERS | {"train": {"epochs": 2.0, "log_every": 20}}, (0.001, 0.003, 0.01, 0.03), 0.5),
    "cifar10": (FOUR_LAYERS | {"train": {"epochs": 12.0, "log_every": 50}}, (0.003, 0.01, 0.03), 3.0),
    "imagenette": ({}, (0.003, 0.01, 0.03), 20.0),
    "imagenet2012": ({}, (0.003, 0.01, 0.03), 10.0),
}


def get_config(scale: str = "embedded") -> ConfigDict:
    changes, rates, epochs = SCALES.get(scale, SCALES["embedded"])
    config = base.study(scale, {"relu": {}, "tanh": TANH}, CLAIMS, UNREGULARISED)
    config.update(changes)
    config.tuning.update(key="optim.learning_rate", choices=rates, epochs=epochs)
    return config
