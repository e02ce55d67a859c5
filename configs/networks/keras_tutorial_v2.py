"""`keras_tutorial_v1` with dense layers of 1024 and 128 neurons."""

from ml_collections import ConfigDict

from alexnet_jax.configs.networks import keras_tutorial_v1


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return keras_tutorial_v1.get_config(scale, fc6=1024, fc7=128)
