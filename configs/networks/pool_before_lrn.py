"""The two-tower network as many introductions describe it: pooling first, then local response normalisation."""

from ml_collections import ConfigDict

from alexnet_jax.configs import base

CHANGES = {f"model.layers.{layer}.then": ("activation", "max_pool", "lrn") for layer in ("conv1", "conv2")}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return base.get_config(scale, CHANGES)
