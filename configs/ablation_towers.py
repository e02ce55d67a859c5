"""Are two communicating towers better than two separate ones, one of half the kernels, and one of all connections?

The paper, section 3.2: two towers lower the top-1 error by 1.7 and the top-5 error by 1.2 points, compared with one
column that has half the kernels in each convolutional layer but the last, and so about as many parameters (footnote 2).

Embedded digits, 2 cores: 13 s a run; top-1 error 3.3 % (`two_crossing`), n = 10. See experiments/towers.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base
from alexnet_jax.configs.networks import one_column

SEPARATE = {f"model.layers.{layer}.sees": "own" for layer in ("conv3", "fc6", "fc7")}
CLAIMS = (
    base.claim("one_column", "eval/top1_error", "section 3.2", difference=0.017),
    base.claim("one_column", "eval/top5_error", "section 3.2", difference=0.012),
)


def get_config(scale: str = "embedded") -> ConfigDict:
    arms = {
        "two_crossing": {},
        "two_never_crossing": SEPARATE,
        "one_column": one_column.changes(scale),
        "ungrouped": {"model.towers": 1},
    }
    return base.study(scale, arms, CLAIMS)
