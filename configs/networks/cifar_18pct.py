"""cuda-convnet's layers-18pct.cfg: 18 % error. Like `cifar_19pct`, with normalisation over neighbouring pixels."""

from ml_collections import ConfigDict

from alexnet_jax.configs.networks import cifar_19pct


def get_config(scale: str = "cifar10") -> ConfigDict:
    config = cifar_19pct.get_config(scale)
    layers = config.model.layers
    layers.conv1.then = ("max_pool", "activation", "spatial_lrn")
    layers.conv2.then = ("activation", "avg_pool", "spatial_lrn")
    layers.fc10.weight_decay = 1.0
    config.model.lrn.spatial.update(window=3, k=1.0, alpha=5e-5 / 9, beta=0.75)
    return config
