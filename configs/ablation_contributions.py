"""What does each contribution of the paper add? The full network, and once without each contribution.

The claims are those of the other studies, whose arms it compares with one reference. All arms have the same learning
rate unless a field is tuned (`tuning.key`).

Embedded digits, 2 cores: 13 s a run. See experiments/contributions, which is about CIFAR-10.
"""

from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.configs import (
    ablation_augmentation,
    ablation_depth,
    ablation_dropout,
    ablation_lrn,
    ablation_pooling,
    ablation_relu,
    ablation_towers,
    base,
)
from alexnet_jax.configs.networks import one_column

STUDIES = (ablation_lrn, ablation_dropout, ablation_pooling, ablation_augmentation, ablation_towers, ablation_depth)
CLAIMS = tuple(claim for study in STUDIES for claim in study.CLAIMS)


def get_config(scale: str = "embedded") -> ConfigDict:
    augmentation = ablation_augmentation.arms(scale)
    left_out = ("no_crops_nor_flips", "no_colour") if ablation_augmentation.is_photographic(scale) else ("no_crops",)
    arms: dict[str, Any] = {
        "full": {},
        "tanh": ablation_relu.TANH,
        "one_column": one_column.changes(scale),
        "two_never_crossing": ablation_towers.SEPARATE,
        "no_lrn": ablation_lrn.NO_LRN,
        "no_overlap": ablation_pooling.NO_OVERLAP,
        **{arm: augmentation[arm] for arm in left_out},
        "no_dropout": ablation_dropout.NO_DROPOUT,
        "no_conv4": ablation_depth.WITHOUT["no_conv4"],
    }
    return base.study(scale, arms, CLAIMS)
