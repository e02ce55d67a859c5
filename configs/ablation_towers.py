"""Two towers that look at each other, against two that do not, one of half the kernels, and one that sees everything.

The paper, section 3.2: two towers take 1.7 points off the top-1 error and 1.2 off the top-5 error, against one column
with half as many kernels in each convolutional layer but the last, which leaves the paper's net about as many
parameters (footnote 2).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

NEVER_CROSSING = {"model": {"layers": {name: {"crosses": False} for name in ("conv3", "fc6", "fc7")}}}
UNGROUPED = {"model": {"towers": 1}}
CLAIMS = (
    base.claim("one_column", "eval/top1_error", "section 3.2", difference=0.017),
    base.claim("one_column", "eval/top5_error", "section 3.2", difference=0.012),
)


def one_column(scale: str) -> dict[str, Any]:
    """One tower with half of the kernels at a scale; the last convolutional layer and the dense ones keep theirs."""
    layers = base.get_config(scale).model.layers
    halved = {name: {"features": layers[name].features // 2} for name in ("conv1", "conv2", "conv3", "conv4")}
    return {"model": {"towers": 1, "layers": halved}}


def get_config(scale: str = "embedded") -> ConfigDict:
    arms = {
        "two_crossing": {},
        "two_never_crossing": NEVER_CROSSING,
        "one_column": one_column(scale),
        "ungrouped": UNGROUPED,
    }
    return base.study(scale, arms, CLAIMS)
