"""Run 150 of the authors' 2012 code: two wider towers that communicate only in the last layer.

Source: computerhistory/AlexNet-Source-Code, layers/layers-150.cfg; the rest is run 145's (`code2012`).
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base, scales
from alexnet_jax.configs.networks import code2012

CHANGES = code2012.CHANGES | {
    "model.layers.conv2.features": 320,
    "model.layers.conv3.sees": "own",
    "model.layers.fc6.features": 8192,
    "model.layers.fc6.sees": "own",
    "model.layers.fc7.sees": "own",
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return base.get_config(scale, CHANGES, scales.PHOTOS)
