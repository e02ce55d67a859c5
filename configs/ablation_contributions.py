"""The whole list in one table: the net as it is, and once without each of the paper's contributions.

What the paper says of each is in the study that is about it; here every arm has the net's own learning rate.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import (
    ablation_augmentation,
    ablation_depth,
    ablation_dropout,
    ablation_lrn,
    ablation_pooling,
    ablation_relu,
    ablation_towers,
    base,
)

STUDIES = (ablation_lrn, ablation_dropout, ablation_pooling, ablation_augmentation, ablation_towers, ablation_depth)


def get_config(scale: str = "embedded") -> ConfigDict:
    augmentation = ablation_augmentation.arms(scale)
    arms: dict[str, Any] = {
        "full": {},
        "tanh": ablation_relu.TANH,
        "one_column": ablation_towers.one_column(scale),
        "two_never_crossing": ablation_towers.NEVER_CROSSING,
        "no_lrn": ablation_lrn.WITHOUT,
        "no_overlap": ablation_pooling.WITHOUT_OVERLAP,
        **{arm: augmentation[arm] for arm in ("no_crops", "no_flips", "no_colour") if arm in augmentation},
        "no_dropout": ablation_dropout.WITHOUT,
        "no_conv4": ablation_depth.WITHOUT["conv4"],
    }
    return base.study(scale, arms, tuple(claim for study in STUDIES for claim in study.CLAIMS))
