"""Caffe's AlexNet, models/bvlc_alexnet: the network of most published weights.

Its grouped convolutions are our two towers, but its normalisation ignores the groups: the window reaches two channels
into the other tower. Caffe divides alpha by the window's 5 channels.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base, scales

CHANGES = {
    "model.layers.conv1.padding": (0, 0),
    **{f"model.layers.{layer}.bias": 0.1 for layer in ("conv2", "conv4", "conv5", "fc6", "fc7")},
    "model.layers.fc6.weight_std": 0.005,
    "model.layers.fc7.weight_std": 0.005,
    "model.lrn.k": 1.0,
    "model.lrn.alpha": 2e-5,
    "model.lrn.sees": "all",
    "model.pool.ceil": True,
    "model.dropout.inverted": True,
    "data.crop": 227,
    # It was trained with a mean image; whoever uses its weights subtracts the mean pixel of that image.
    "data.subtract": "mean",
    "data.mean": (122.7, 116.7, 104.0),
    "data.augment.colour.noise": 0.0,
    "optim.biases.learning_rate": 2.0,
    "optim.biases.weight_decay": 0.0,
    "optim.decay_epochs": (20.0, 40.0, 60.0, 80.0),  # every 100,000 steps
    "train.batch_size": 256,  # 450,000 steps: 90 epochs
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return base.get_config(scale, CHANGES, scales.PHOTOS)
