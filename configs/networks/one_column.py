"""The paper's net of one GPU (section 3.2, footnote 2): half the kernels, but the last convolution and the dense
layers as large as those of both towers."""

from ml_collections import ConfigDict

from configs import base


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    config = base.get_config(scale)
    config.model.towers = 1
    for name in ("conv1", "conv2", "conv3", "conv4"):
        config.model.layers[name].features //= 2
    return config
