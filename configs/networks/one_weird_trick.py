"""One tower of 64-192-384-256-256 features: "One weird trick for parallelizing convolutional neural networks" (2014).

As cuda-convnet2 has it, layers/layers-imagenet-1gpu.cfg; the paper's own fourth layer has 384 features.
"""

from ml_collections import ConfigDict

from configs import base, scales

EPOCHS = 90.0
DIFFERENCE = {
    "model": {
        "towers": 1,
        "layers": {
            "conv1": {"features": 64, "then": ("lrn", "max_pool", "activation")},
            "conv2": {"features": 192},
            "conv3": {"features": 384, "weight_std": 0.03},
            "conv4": {"features": 256, "weight_std": 0.03},
            "conv5": {"features": 256, "weight_std": 0.03},
            "fc8": {"bias": -7.0},
        },
        "lrn": {"alpha": 2e-5},
        "pool": {"ceil": True},
    },
    "data": {"subtract": "central_mean_image", "augment": {"colour": {"shrink": True}}},
    # Four steps down to a 250th; the biases' two steps to a tenth.
    "optim": {
        "cut_epochs": (EPOCHS / 4, EPOCHS / 2, EPOCHS * 3 / 4),
        "cut_divisor": 250 ** (1 / 3),
        "biases": {"rate": 2.0, "decay": 0.0, "cut_epochs": (EPOCHS / 2,), "cut_divisor": 10.0},
    },
    "train": {"epochs": EPOCHS},
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    config = base.get_config(scale, scales.PHOTOS)
    config.update(DIFFERENCE)
    return config
