"""Do random crops, mirror images and colour noise keep the net from overfitting?

The paper, section 4.1: without crops and mirror images "our network suffers from substantial overfitting"; colour noise
takes "over 1%" off the top-1 error.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

NO_CROPS = {"random_crop": False}
NO_FLIPS = {"flip": False}
NO_COLOUR = {"colour": {"noise": 0.0}}
CLAIMS = (
    base.claim("no_crops_nor_flips", "generalisation_gap", "section 4.1"),
    base.claim("no_colour", "eval/top1_error", "section 4.1", difference=0.01),
    base.claim("none", "generalisation_gap", "section 4.1"),
)


def arms(scale: str) -> dict[str, Any]:
    """What can be left out at a scale: digits are neither mirrored nor coloured."""
    coloured = base.get_config(scale).data.augment.flip
    of_photos = {
        "no_flips": NO_FLIPS,
        "no_crops_nor_flips": NO_CROPS | NO_FLIPS,
        "no_colour": NO_COLOUR,
        "none": NO_CROPS | NO_FLIPS | NO_COLOUR,
    }
    left_out = {"no_crops": NO_CROPS} | (of_photos if coloured else {})
    return {arm: {"data": {"augment": change}} for arm, change in left_out.items()}


def get_config(scale: str = "embedded") -> ConfigDict:
    studied = {"all": {}} | arms(scale)
    # Where nothing is mirrored, all of what the paper says of both is about the crops.
    claims = CLAIMS if "no_flips" in studied else (base.claim("no_crops", "generalisation_gap", "section 4.1"),)
    return base.study(scale, studied, claims)
