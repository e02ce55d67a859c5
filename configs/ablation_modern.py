"""What do today's parts add to the network of 2012, one at a time and all together?

The paper makes no claim about them: the result is the table of differences. Each arm tunes its learning rate on a
validation set, with another seed. The values are the usual ones, not tuned:

- batch_norm: batch normalisation in the place of LRN, before the activation (Ioffe and Szegedy, 2015).
- gelu: for ReLU (Hendrycks and Gimpel, 2016).
- adamw: Adam with decoupled weight decay (Loshchilov and Hutter, 2019) of 0.05, and none for biases and normalisation,
  as for vision transformers (DeiT, 2021) and ConvNeXt (2022); cosine schedule after a linear warm-up over 5 % of the
  training, about the 5 of 90 epochs of Goyal et al. (2017).
- label_smoothing: 0.1 (Szegedy et al., 2015).

Embedded digits, 2 cores: 13 s a run, after 30 trials of that length; top-1 error 3.3 % (`paper`), 2.2 % (`all`),
n = 10. See experiments/modern.
"""

from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.configs import base

BATCH_NORM = {f"model.layers.{layer}.then": ("batch_norm", "activation", "max_pool") for layer in ("conv1", "conv2")}
GELU = {"model.activation": "gelu"}
LABEL_SMOOTHING = {"train.label_smoothing": 0.1}
TUNING = {
    "tuning.key": "optim.learning_rate",
    # One grid for all arms: AdamW's best learning rate is about a tenth of that of the paper's rule.
    "tuning.choices": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "tuning.metric": "validation/top1_error",
}


def adamw(scale: str) -> dict[str, Any]:
    """Return the changes of the optimiser at a scale."""
    return {
        "optim.name": "adamw",
        "optim.weight_decay": 0.05,
        "optim.biases.weight_decay": 0.0,
        "optim.schedule": "cosine",
        "optim.warmup_epochs": 0.05 * base.get_config(scale).train.epochs,
    }


def get_config(scale: str = "embedded") -> ConfigDict:
    arms: dict[str, Any] = {
        "paper": {},
        "batch_norm": BATCH_NORM,
        "gelu": GELU,
        "adamw": adamw(scale),
        "label_smoothing": LABEL_SMOOTHING,
        "all": BATCH_NORM | GELU | adamw(scale) | LABEL_SMOOTHING,
    }
    return base.study(scale, arms, changes=TUNING)
