"""AlexNet as the authors' own code trained it in 2012: run 145, which the paper reports.

Source: computerhistory/AlexNet-Source-Code, layers/layers-145.cfg and layer-params-145-2010.cfg with its notes. One
detail has no counterpart here and changes no value: the last layer was on one of the two devices.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base, scales

CHANGES = {
    # Normalised before the activation: "relu" is a property of the pooling layer there.
    "model.layers.conv1.then": ("lrn", "max_pool", "activation"),
    "model.layers.conv1.decay_epochs": (23.0, 51.0, 68.0),
    "model.layers.conv1.freeze_epoch": 72.0,
    "model.layers.conv2.then": ("activation", "lrn", "spatial_lrn", "max_pool"),
    "model.layers.conv3.weight_std": 0.03,
    "model.layers.conv4.weight_std": 0.03,
    "model.layers.conv5.weight_std": 0.03,
    "model.lrn.alpha": 2e-5,  # 1e-4 divided by the window's 5 channels
    "model.pool.ceil": True,
    "data.subtract": "central_mean_image",
    "data.augment.code2012.images_per_crop": 32,
    "data.augment.code2012.shrink_noise": True,
    "data.augment.code2012.noise_until_epoch": 68.0,
    # The biases' learning rate is 0.02 in the first files and 0.002 in the last; the notes do not say since when.
    "optim.biases.learning_rate": 2.0,
    "optim.biases.weight_decay": 0.0,
    "optim.biases.decay_epochs": (23.0,),
    "train.epochs": 93.0,
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return base.get_config(scale, CHANGES, scales.PHOTOS)
