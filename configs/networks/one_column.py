"""The paper's network for one GPU: half the kernels of each convolution but the last (section 3.2, footnote 2).

The last convolution and the dense layers are as large as those of both towers together.
"""

from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.configs import base


def changes(scale: str) -> dict[str, Any]:
    """Return what makes the base config at a scale one column; dotted keys."""
    layers = base.get_config(scale).model.layers
    half = {f"model.layers.{name}.features": layers[name].features // 2 for name in base.LAYERS[:4]}
    return {"model.towers": 1} | half


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return base.get_config(scale, changes(scale))
