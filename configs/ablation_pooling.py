"""Does overlapping pooling reduce the error?

The paper, section 3.4: windows of 3 with a stride of 2 lower the top-1 error by 0.4 and the top-5 error by 0.3 points,
compared with windows of 2 with the same stride, whose feature maps have the same size.

Embedded digits, 2 cores: 13 s a run; top-1 error 3.3 % (`overlap`), n = 10. See experiments/pooling.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base

NO_OVERLAP = {"model.pool.window": 2}
ARMS = {"overlap": {}, "no_overlap": NO_OVERLAP}
CLAIMS = (
    base.claim("no_overlap", "eval/top1_error", "section 3.4", difference=0.004),
    base.claim("no_overlap", "eval/top5_error", "section 3.4", difference=0.003),
)


def get_config(scale: str = "embedded") -> ConfigDict:
    return base.study(scale, ARMS, CLAIMS)
