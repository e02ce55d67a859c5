"""One tower of 64-192-384-256-256 features: "One weird trick for parallelizing convolutional neural networks" (2014).

Source: cuda-convnet2, layers/layers-imagenet-1gpu.cfg. The fourth layer has 384 features in that paper's own text.

That paper's two devices, data parallel up to fc6 and model parallel from there: train.layout=one_weird_trick with
model.towers=2, model.lrn.sees=all and model.layers.conv{2,3,4,5}.sees=all. The network has the same connections then.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base, scales

EPOCHS = 90.0
FEATURES = {"conv1": 64, "conv2": 192, "conv3": 384, "conv4": 256, "conv5": 256}
CHANGES = {
    "model.towers": 1,
    **{f"model.layers.{layer}.features": features for layer, features in FEATURES.items()},
    "model.layers.conv1.then": ("lrn", "max_pool", "activation"),
    "model.layers.conv3.weight_std": 0.03,
    "model.layers.conv4.weight_std": 0.03,
    "model.layers.conv5.weight_std": 0.03,
    "model.layers.fc8.bias": -7.0,
    "model.lrn.alpha": 2e-5,
    "model.pool.ceil": True,
    "data.subtract": "central_mean_image",
    "data.augment.code2012.shrink_noise": True,
    # Four learning rates, the last 1/250 of the first; two for the biases, the second 1/10 of the first.
    "optim.decay_epochs": (EPOCHS / 4, EPOCHS / 2, EPOCHS * 3 / 4),
    "optim.decay_factor": 250 ** (-1 / 3),
    "optim.biases.learning_rate": 2.0,
    "optim.biases.weight_decay": 0.0,
    "optim.biases.decay_epochs": (EPOCHS / 2,),
    "optim.biases.decay_factor": 0.1,
    "train.epochs": EPOCHS,
}


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return base.get_config(scale, CHANGES, scales.PHOTOS)
