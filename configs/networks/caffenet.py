"""Caffe's reference net, models/bvlc_reference_caffenet: its AlexNet, but pooling comes before normalisation.

"An accident", say its authors (BVLC/caffe#4202). Its biases are the paper's 1.
"""

from ml_collections import ConfigDict

from configs.nets import caffe_alexnet


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    config = caffe_alexnet.get_config(scale)
    layers = config.model.layers
    for name in ("conv1", "conv2"):
        layers[name].then = ("activation", "max_pool", "lrn")
    for name in ("conv2", "conv4", "conv5", "fc6", "fc7"):
        layers[name].bias = 1.0
    return config
