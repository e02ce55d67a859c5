"""cuda-convnet's first CIFAR-10 net, layers-80sec.cfg: 26 % error. The others are differences to it.

Raw pixels minus their mean; one tower; pooling whose last window hangs over the edge. No augmentation.
"""

from ml_collections import ConfigDict

from configs import base
from configs.base import conv, dense

AVERAGE = ("activation", "avg_pool")


def get_config(scale: str = "cifar10") -> ConfigDict:
    config = base.get_config(scale, ["cifar10"])
    layers = {
        # The maximum is taken first there; for an activation that never falls that is the same.
        "conv1": conv(32, 5, padding=(2, 2), weight_std=0.0001, then=("max_pool", "activation")),
        "conv2": conv(32, 5, padding=(2, 2), then=AVERAGE),
        "conv3": conv(64, 5, padding=(2, 2), then=AVERAGE),
        "fc64": dense(64, weight_std=0.1, then=("activation",)),
        "fc10": dense(None, weight_std=0.1, then=()),
    }
    for name in ("fc64", "fc10"):
        layers[name].weight_decay = 0.03
    config.model.layers = ConfigDict(layers)
    config.update(
        {
            "model": {"order": tuple(layers), "towers": 1, "pool": {"ceil": True}},
            "data": {
                "subtract": "central_mean_image",
                "crop": 32,
                "std": (1.0,),
                "augment": {"random_crop": False, "flip": False, "colour": {"noise": 0.0}},
            },
            "optim": {
                "learning_rate": 0.001,
                "weight_decay": 0.004,
                "cut_epochs": (8.0,),
                "biases": {"rate": 2.0, "decay": 0.0},
            },
            "train": {"batch_size": 128, "epochs": 10.0},
        }
    )
    return config
