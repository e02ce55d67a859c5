"""Does local response normalisation reduce the error, and does it matter whether it precedes or follows pooling?

The paper, section 3.3: normalisation lowers the top-1 error by 1.4 and the top-5 error by 1.2 points on ImageNet, and
that of a four-layer network on CIFAR-10 from 13 to 11 %. It makes no claim about the order.

Embedded digits, 2 cores: 13 s a run; top-1 error 3.3 % (`lrn`), n = 10. See experiments/lrn.
"""

from ml_collections import ConfigDict

from alexnet_jax.configs import base
from alexnet_jax.configs.networks import pool_before_lrn

NO_LRN = {"model.lrn.enabled": False}
ARMS = {"lrn": {}, "no_lrn": NO_LRN, "lrn_after_pooling": pool_before_lrn.CHANGES}
CLAIMS = (
    base.claim("no_lrn", "eval/top1_error", "section 3.3", difference=0.014),
    base.claim("no_lrn", "eval/top5_error", "section 3.3", difference=0.012),
)


def get_config(scale: str = "embedded") -> ConfigDict:
    return base.study(scale, ARMS, CLAIMS)
