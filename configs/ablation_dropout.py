"""Does dropout keep the net from overfitting, and what does it cost?

The paper, section 4.2: "without dropout, our network exhibits substantial overfitting", and dropout "roughly doubles
the number of iterations required to converge".
"""

from ml_collections import ConfigDict

from configs import base

WITHOUT = {"model": {"dropout": {"rate": 0.0}}}
CLAIMS = (
    base.claim("no_dropout", "generalisation_gap", "section 4.2"),
    base.claim("no_dropout", "epochs_to_25", "section 4.2", ratio=0.5),
)


def get_config(scale: str = "embedded") -> ConfigDict:
    return base.study(scale, {"dropout": {}, "no_dropout": WITHOUT}, CLAIMS)
