"""Does dropout reduce overfitting, and how much does it slow down training?

The paper, section 4.2: "Without dropout, our network exhibits substantial overfitting", and dropout "roughly doubles
the number of iterations required to converge".

Embedded digits, 2 cores: 13 s a run; top-1 error 3.3 % (`dropout`), n = 10. See experiments/dropout.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base

NO_DROPOUT = {"model.dropout.rate": 0.0}
ARMS = {"dropout": {}, "no_dropout": NO_DROPOUT}
CLAIMS = (
    base.claim("no_dropout", "generalisation_gap", "section 4.2"),
    base.claim("no_dropout", "epochs_to_25", "section 4.2", ratio=0.5),
)


def get_config(scale: str = "embedded") -> ConfigDict:
    return base.study(scale, ARMS, CLAIMS)
