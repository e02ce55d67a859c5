"""The two-tower net as many introductions describe it: pooling first, then local response normalisation."""

from ml_collections import ConfigDict

from configs import base


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    config = base.get_config(scale)
    for name in ("conv1", "conv2"):
        config.model.layers[name].then = ("activation", "max_pool", "lrn")
    return config
