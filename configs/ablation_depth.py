"""Is every layer needed?

The paper, section 7: "removing any of the middle layers results in a loss of about 2% for the top-1 performance". A
convolutional layer is removed with its activation and normalisation; its pooling stays, and so does the point where
the towers communicate.

Embedded digits, 2 cores: 13 s a run; top-1 error 3.3 % (`eight_layers`), n = 10. See experiments/depth.
"""

from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.configs import base

# The changes to the layers around a removed layer.
NEIGHBOURS: dict[str, dict[str, Any]] = {
    "conv2": {"model.layers.conv1.then": ("activation", "lrn", "max_pool", "max_pool")},
    "conv3": {"model.layers.conv4.sees": "all"},
    "conv4": {},
    "conv5": {"model.layers.conv4.then": ("activation", "max_pool")},
    "fc7": {},
}
WITHOUT = {
    f"no_{removed}": {"model.order": tuple(layer for layer in base.LAYERS if layer != removed)} | changes
    for removed, changes in NEIGHBOURS.items()
}
CLAIMS = tuple(base.claim(arm, "eval/top1_error", "section 7", difference=0.02) for arm in WITHOUT)


def get_config(scale: str = "embedded") -> ConfigDict:
    return base.study(scale, {"eight_layers": {}} | WITHOUT, CLAIMS)
