"""cuda-convnet's first CIFAR-10 network, layers-80sec.cfg: 26 % error. The other CIFAR-10 networks are changes to it.

Raw pixels minus their mean; one tower; pooling windows that exceed the edge. No augmentation.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base

CHANGES = {
    "model.towers": 1,
    "model.pool.ceil": True,
    "data.subtract": "central_mean_image",
    "data.crop": 32,
    "data.std": (1.0,),
    "data.augment.random_crop": False,
    "data.augment.flip": False,
    "data.augment.colour.noise": 0.0,
    "optim.learning_rate": 0.001,
    "optim.weight_decay": 0.004,
    "optim.decay_epochs": (8.0,),
    "optim.biases.learning_rate": 2.0,
    "optim.biases.weight_decay": 0.0,
    "train.batch_size": 128,
    "train.epochs": 10.0,
}


def get_config(scale: str = "cifar10") -> ConfigDict:
    config = base.get_config(scale, CHANGES, ["cifar10"])
    layers = {
        # The source pools first; for an activation that never falls the order does not matter.
        "conv1": base.conv(32, 5, padding=(2, 2), weight_std=0.0001, then=("max_pool", "activation")),
        "conv2": base.conv(32, 5, padding=(2, 2), then=("activation", "avg_pool")),
        "conv3": base.conv(64, 5, padding=(2, 2), then=("activation", "avg_pool")),
        "fc64": base.dense(64, weight_std=0.1, then=("activation",)),
        "fc10": base.dense(None, weight_std=0.1, then=()),
    }
    for name in ("fc64", "fc10"):
        layers[name].weight_decay = 0.03
    config.model.layers = ConfigDict(layers)
    config.model.order = tuple(layers)
    return config
