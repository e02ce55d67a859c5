"""What does each part of the paper's network add on photographs?

The reference is the network of the paper's own runs, `code2012`, because its initial weights train (see
`initialisation`). All arms have the same learning rate. The claims are those of the studies of single contributions.
"""

from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.configs import (
    ablation_augmentation,
    ablation_dropout,
    ablation_lrn,
    ablation_pooling,
    ablation_towers,
    base,
    scales,
)
from alexnet_jax.configs.networks import code2012, no_crossing, one_column

STUDIES = (ablation_towers, ablation_lrn, ablation_pooling, ablation_augmentation, ablation_dropout)
CLAIMS = tuple(claim for study in STUDIES for claim in study.CLAIMS)
# Feature maps of 31, 15 and 7 pixels have the same size after pooling with windows of 3 and of 2.
CHANGES = code2012.CHANGES | {"data.image_size": 146, "data.crop": 128, "model.pool.ceil": False}


def get_config(scale: str = "imagenette") -> ConfigDict:
    config = base.get_config(scale, CHANGES, scales.PHOTOS)
    augmentation = ablation_augmentation.arms(scale)
    arms: dict[str, Any] = {
        "code2012": {},
        "one_column": one_column.changes(scale),
        "never_crossing": {key: value for key, value in no_crossing.CHANGES.items() if key not in code2012.CHANGES},
        "no_lrn": ablation_lrn.NO_LRN,
        "no_overlap": ablation_pooling.NO_OVERLAP,
        **{arm: augmentation[arm] for arm in ("no_crops_nor_flips", "no_colour", "none")},
        "no_dropout": ablation_dropout.NO_DROPOUT,
    }
    return base.compare(config, arms, CLAIMS, seeds=range(5))
