"""Do the paper's initial weights train, and does it matter that many reimplementations divide the pixels by 58?

The paper's text starts all weights from a standard deviation of 0.01 (section 5); the authors' code has 0.03 in conv3
to conv5. Both are for pixels of 0 to 255. There is no claim: the result is the curves, and how many seeds leave the
error of chance.
"""

from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.configs import base, scales

CODE2012: dict[str, Any] = {f"model.layers.{layer}.weight_std": 0.03 for layer in ("conv3", "conv4", "conv5")}
SCALED = {"data.std": (58.0,)}  # about the standard deviation of ImageNet's pixels
ARMS = {"text": {}, "code2012": CODE2012, "text_scaled": SCALED, "code2012_scaled": CODE2012 | SCALED}


def get_config(scale: str = "imagenette") -> ConfigDict:
    return base.compare(base.get_config(scale, among=scales.PHOTOS), ARMS, seeds=range(5))
