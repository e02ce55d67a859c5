"""AlexNet as in the paper's text, which is the base config itself. Where the text is silent, the 2012 code decides."""

from ml_collections import ConfigDict

from alexnet_jax.configs import base


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return base.get_config(scale)
