"""Does local response normalisation help, and does it matter whether it stands before pooling or after it?

The paper, section 3.3: it takes 1.4 points off the top-1 error and 1.2 off the top-5 error on ImageNet, and a
four-layer net on CIFAR-10 goes from 13 % to 11 %. Of its place the paper says nothing.
"""

from ml_collections import ConfigDict

from configs import base

WITHOUT = {"model": {"lrn": {"enabled": False}}}
AFTER_POOLING = {
    "model": {"layers": {name: {"then": ("activation", "max_pool", "lrn")} for name in ("conv1", "conv2")}},
}
CLAIMS = (
    base.claim("no_lrn", "eval/top1_error", "section 3.3", difference=0.014),
    base.claim("no_lrn", "eval/top5_error", "section 3.3", difference=0.012),
)


def get_config(scale: str = "embedded") -> ConfigDict:
    return base.study(scale, {"lrn": {}, "no_lrn": WITHOUT, "lrn_after_pooling": AFTER_POOLING}, CLAIMS)
