"""Run 150 of the authors' 2012 code: two towers that meet in the last layer only, and are wider for it.

From computerhistory/AlexNet-Source-Code, layers/layers-150.cfg; the rest is run 145's (`code2012`).
"""

from ml_collections import ConfigDict

from configs.nets import code2012

LAYERS = {
    "conv2": {"features": 320},
    "conv3": {"crosses": False},
    "fc6": {"features": 8192, "crosses": False},
    "fc7": {"crosses": False},
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    config = code2012.get_config(scale)
    config.model.layers.update(LAYERS)
    return config
