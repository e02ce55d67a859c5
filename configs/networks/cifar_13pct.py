"""cuda-convnet's layers-conv-local-13pct.cfg: 13 % error, with two layers whose weights are not shared.

Random crops of 24 pixels, and flips; the learning rate decays twice in the last 20 of some 520 epochs.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base
from alexnet_jax.configs.networks import cifar_80sec

CHANGES = {
    "data.crop": 24,
    "data.augment.random_crop": True,
    "data.augment.flip": True,
    "optim.decay_epochs": (500.0, 510.0),
    "train.epochs": 520.0,
    "eval.views": 10,
}


def get_config(scale: str = "cifar10") -> ConfigDict:
    config = cifar_80sec.get_config(scale)
    layers = {
        "conv1": base.conv(64, 5, padding=(2, 2), weight_std=0.0001, then=("activation", "max_pool")),
        "conv2": base.conv(64, 5, padding=(2, 2), then=("activation", "max_pool")),
        "local3": base.conv(32, 3, padding=(1, 1), weight_std=0.04),
        "local4": base.conv(32, 3, padding=(1, 1), weight_std=0.04),
        "fc10": base.dense(None, then=()),
    }
    for name in ("conv1", "conv2"):
        layers[name].weight_decay = 0.0
    for name in ("local3", "local4"):
        layers[name].kind = "local"
    config.model.layers = ConfigDict(layers)
    config.model.order = tuple(layers)
    config.update_from_flattened_dict(CHANGES)
    return config
