"""cuda-convnet's layers-conv-local-13pct.cfg: 13 % error, with two layers whose weights are not shared.

Random crops of 24 pixels, and flips; the rate is cut twice in the last 20 of some 520 epochs.
"""

from ml_collections import ConfigDict

from configs.base import conv, dense
from configs.nets import cifar_80sec


def get_config(scale: str = "cifar10") -> ConfigDict:
    config = cifar_80sec.get_config(scale)
    pooled = ("activation", "max_pool")
    layers = {
        "conv1": conv(64, 5, padding=(2, 2), weight_std=0.0001, then=pooled),
        "conv2": conv(64, 5, padding=(2, 2), then=pooled),
        "local3": conv(32, 3, padding=(1, 1), weight_std=0.04),
        "local4": conv(32, 3, padding=(1, 1), weight_std=0.04),
        "fc10": dense(None, then=()),
    }
    for name in ("conv1", "conv2"):
        layers[name].weight_decay = 0.0
    for name in ("local3", "local4"):
        layers[name].kind = "local"
    config.model.layers = ConfigDict(layers)
    config.update(
        {
            "model": {"order": tuple(layers)},
            "data": {"crop": 24, "augment": {"random_crop": True, "flip": True}},
            "optim": {"cut_epochs": (500.0, 510.0)},
            "train": {"epochs": 520.0},
            "eval": {"views": 10},
        }
    )
    return config
