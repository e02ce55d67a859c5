"""cuda-convnet's layers-19pct.cfg: 19 % error. Like `cifar_80sec`, with one dense layer less."""

from ml_collections import ConfigDict

from alexnet_jax.configs.networks import cifar_80sec


def get_config(scale: str = "cifar10") -> ConfigDict:
    config = cifar_80sec.get_config(scale)
    config.model.order = ("conv1", "conv2", "conv3", "fc10")
    del config.model.layers["fc64"]
    config.model.layers.fc10.update(weight_std=0.01, weight_decay=3.0)
    config.optim.decay_epochs = (120.0, 130.0)
    config.train.epochs = 140.0
    return config
