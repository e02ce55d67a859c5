"""The paper's update rule and its schedule, as optax transformations."""

import optax
from ml_collections import ConfigDict


def schedule(config: ConfigDict, steps_per_epoch: float) -> optax.Schedule:
    """Learning rate by step: divided by ``config.cut_divisor`` at each of ``config.cut_epochs`` (paper, section 5)."""
    cuts = {round(epoch * steps_per_epoch): 1 / config.cut_divisor for epoch in config.cut_epochs}
    return optax.piecewise_constant_schedule(config.learning_rate, cuts)


def sgd(config: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """``v <- momentum * v - decay * rate * w - rate * g;  w <- w + v`` (paper, section 5).

    The rate is inside the velocity, so after a cut the old velocity fades over some steps; ``optax.sgd`` and
    PyTorch scale the whole velocity by the current rate instead.
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(decay=config.momentum),
    )
