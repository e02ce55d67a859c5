"""Caffe's reference network, models/bvlc_reference_caffenet: `caffe_alexnet` with pooling before normalisation.

"An accident", say its authors (BVLC/caffe#4202). Its biases are the paper's 1.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base, scales
from alexnet_jax.configs.networks import caffe_alexnet, pool_before_lrn

CHANGES = {
    **caffe_alexnet.CHANGES,
    **pool_before_lrn.CHANGES,
    **{f"model.layers.{layer}.bias": 1.0 for layer in ("conv2", "conv4", "conv5", "fc6", "fc7")},
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return base.get_config(scale, CHANGES, scales.PHOTOS)
