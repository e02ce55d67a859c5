"""Figure 1 of the paper: how much faster is a network of ReLUs, and does that depend on its initial weights?

The four-layer network of cuda-convnet without normalisation, on raw pixels minus the mean image; nothing is
regularised (section 3.1). Each arm tunes its own learning rate by the metric that is compared: epochs until a pass over
all training images has an error of 25 %. A run ends there.

After the colon stand the initial weights. "code2012": the standard deviations of cuda-convnet's layers-19pct.cfg.
"fan_in": sqrt(2 / fan-in) before ReLUs (He et al., 2015), and sqrt(1 / fan-in) before tanh and in the last layer (LeCun
et al., 1998, who use the scaled tanh); in the first layer divided by the standard deviation of the pixels, because
these rules are for inputs of variance 1.
"""

from math import sqrt

from ml_collections import ConfigDict

from alexnet_jax.config import apply_changes
from alexnet_jax.configs import base
from alexnet_jax.configs.networks import cifar_19pct

PIXEL_STD = 63.0  # grey levels, of CIFAR-10
FAN_IN = {"conv1": 5 * 5 * 3, "conv2": 5 * 5 * 32, "conv3": 5 * 5 * 32, "fc10": 4 * 4 * 64}

ACTIVATIONS = ("relu", "tanh", "scaled_tanh")
METRIC = "train_eval_epochs_to_25"
CLAIMS = (base.claim("tanh", METRIC, "section 3.1, figure 1", ratio=6.0),)  # the form of tanh is our own question

CHANGES = {
    "data.name": "cifar10_jpeg",
    "model.layers.fc10.weight_decay": 0.0,
    "optim.weight_decay": 0.0,
    "optim.decay_epochs": (),
    "train.epochs": 60.0,
    "train.stop_at_error": 0.25,
    "eval.train_images": 1_000_000,  # all
    "tuning.key": "optim.learning_rate",
    "tuning.metric": METRIC,
    "tuning.choices": (0.0003, 0.001, 0.003, 0.01, 0.03),
    # Tanh learns fastest at higher learning rates than ReLU.
    "tuning.choices_by_arm": dict.fromkeys(("tanh", "scaled_tanh"), (0.003, 0.01, 0.03, 0.1, 0.3)),
}


def weight_stds(activation: str) -> dict[str, float]:
    """Return the standard deviations of the initial weights by fan-in, as changes to a config."""
    gains = dict.fromkeys(FAN_IN, 2.0 if activation == "relu" else 1.0) | {"fc10": 1.0}
    input_std = dict.fromkeys(FAN_IN, 1.0) | {"conv1": PIXEL_STD}
    return {
        f"model.layers.{layer}.weight_std": sqrt(gains[layer] / FAN_IN[layer]) / input_std[layer] for layer in FAN_IN
    }


def get_config(initial_weights: str = "code2012") -> ConfigDict:
    if initial_weights not in ("code2012", "fan_in"):
        raise ValueError(f"scale={initial_weights}: must be code2012 or fan_in; it stands after the colon of --config")
    fan_in = initial_weights == "fan_in"
    arms = {name: {"model.activation": name} | (weight_stds(name) if fan_in else {}) for name in ACTIVATIONS}
    config = cifar_19pct.get_config()
    apply_changes(config, CHANGES)
    return base.compare(config, arms, CLAIMS)
