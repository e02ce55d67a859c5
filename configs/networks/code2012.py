"""AlexNet as the authors' own code of 2012 trained it: run 145, which the paper reports.

From computerhistory/AlexNet-Source-Code, layers/layers-145.cfg and layer-params-145-2010.cfg with its notes. One
thing of it has no counterpart here, and changes no value: the last layer was on one of the two devices.
"""

from ml_collections import ConfigDict

from configs import base, scales

DIFFERENCE = {
    "model": {
        "layers": {
            # Normalised before the activation: "relu" is a property of the pooling layer there.
            "conv1": {
                "then": ("lrn", "max_pool", "activation"),
                "cut_epochs": (23.0, 51.0, 68.0),
                "freeze_epoch": 72.0,
            },
            "conv2": {"then": ("activation", "lrn", "spatial_lrn", "max_pool")},
            "conv3": {"weight_std": 0.03},
            "conv4": {"weight_std": 0.03},
            "conv5": {"weight_std": 0.03},
        },
        "lrn": {"alpha": 2e-5},  # 1e-4 over the 5 channels of the window
        "pool": {"ceil": True},
    },
    "data": {
        "subtract": "central_mean_image",
        "augment": {
            "chunk": 32,
            "colour": {"shrink": True, "until_epoch": 68.0},
        },
    },
    # The biases' rate is 0.02 in the files of the start and 0.002 in the last one; the notes do not say since when.
    "optim": {"biases": {"rate": 2.0, "decay": 0.0, "cut_epochs": (23.0,)}},
    "train": {"epochs": 93.0},
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    config = base.get_config(scale, scales.PHOTOS)
    config.update(DIFFERENCE)
    return config
