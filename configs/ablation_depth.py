"""Does every layer count?

The paper, section 7: "removing any of the middle layers results in a loss of about 2% for the top-1 performance". A
convolutional layer goes with its activation and its normalisation; its pooling stays, and so does the place where the
towers meet.
"""

from ml_collections import ConfigDict

from configs import base

ORDER = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
# What the layers around it take over.
TAKEN_OVER = {
    "conv2": {"conv1": {"then": ("activation", "lrn", "max_pool", "max_pool")}},
    "conv3": {"conv4": {"crosses": True}},
    "conv4": {},
    "conv5": {"conv4": {"then": ("activation", "max_pool")}},
    "fc7": {},
}
WITHOUT = {
    layer: {"model": {"order": tuple(name for name in ORDER if name != layer), "layers": taken}}
    for layer, taken in TAKEN_OVER.items()
}
CLAIMS = tuple(base.claim(f"no_{layer}", "eval/top1_error", "section 7", difference=0.02) for layer in WITHOUT)


def get_config(scale: str = "embedded") -> ConfigDict:
    return base.study(
        scale, {"eight_layers": {}} | {f"no_{layer}": change for layer, change in WITHOUT.items()}, CLAIMS
    )
