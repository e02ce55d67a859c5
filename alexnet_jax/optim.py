"""The paper's update rule and its schedules.

Rates and decay are those of one parameter: of a layer, and there of its weights (``kernel``) or its biases.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

KERNEL, BIAS = "kernel", "bias"


def reached(epoch: float, step: jax.typing.ArrayLike, steps_per_epoch: float) -> jax.Array:
    """Whether a step, counted from 0, is the first of an epoch or a later one."""
    return jnp.asarray(step) >= round(epoch * steps_per_epoch)


def learning_rate(
    config: ConfigDict, step: jax.typing.ArrayLike, steps_per_epoch: float, stalls: jax.typing.ArrayLike = 0
) -> jax.Array:
    """The rate at a step, counted from 0, of a parameter that nothing special is said of.

    Args:
      config: the ``optim`` section: ``learning_rate`` is divided by ``cut_divisor`` at each of ``cut_epochs``.
      stalls: how often the error has stalled (``Stall.cuts``): it is divided by ``cut_divisor`` that often, too.
    """
    cuts = _cuts(config.cut_epochs, config.cut_divisor, step, steps_per_epoch)
    return _stalled(config, stalls) * cuts


def learning_rates(
    config: ConfigDict,
    layers: ConfigDict,
    step: jax.typing.ArrayLike,
    steps_per_epoch: float,
    stalls: jax.typing.ArrayLike = 0,
) -> dict[str, dict[str, jax.Array]]:
    """The rate of every parameter at a step, counted from 0: by layer, then ``"kernel"`` and ``"bias"``.

    Args:
      config: the ``optim`` section.
      layers: ``model.layers``, which may cut earlier or later than the others, and freeze.
      stalls: as for ``learning_rate``; it divides all rates.
    """

    def cuts(epochs: tuple[float, ...], divisor: float) -> jax.Array:
        return _cuts(epochs, divisor, step, steps_per_epoch)

    biases = config.biases
    base = _stalled(config, stalls)
    bias_cuts = cuts(_own(biases.cut_epochs, config.cut_epochs), _own(biases.cut_divisor, config.cut_divisor))
    rates = {}
    for name, layer in layers.items():
        learns = 1.0 if layer.freeze_epoch is None else ~reached(layer.freeze_epoch, step, steps_per_epoch)
        kernel_cuts = cuts(_own(layer.cut_epochs, config.cut_epochs), config.cut_divisor)
        rates[name] = {KERNEL: base * kernel_cuts * learns, BIAS: base * biases.rate * bias_cuts * learns}
    return rates


def weight_decays(config: ConfigDict, layers: ConfigDict) -> dict[str, dict[str, float]]:
    """The decay of every parameter; arguments and keys as for ``learning_rates``."""
    decays = {name: _own(layer.weight_decay, config.weight_decay) for name, layer in layers.items()}
    return {name: {KERNEL: decay, BIAS: decay * config.biases.decay} for name, decay in decays.items()}


def sgd(config: ConfigDict, layers: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """``v <- momentum * v - decay * rate * w - rate * g;  w <- w + v`` (paper, section 5).

    The rate is inside the velocity, so after a cut the old velocity fades over some steps; ``optax.sgd`` and
    PyTorch scale the whole velocity by the current rate instead. A frozen layer's velocity fades, too. ``update``
    takes the ``rates`` of that step (``learning_rates``).
    """
    all_decays = weight_decays(config, layers)
    velocity = optax.trace(decay=config.momentum)

    def update(gradients: Any, state: optax.OptState, params: Any, *, rates: Any) -> tuple[Any, optax.OptState]:
        def force(gradient: jax.Array, param: jax.Array, rate: jax.Array, decay: float) -> jax.Array:
            return -rate * (gradient + decay * param)

        rates, decays = ({name: tree[name] for name in params} for tree in (rates, all_decays))
        return velocity.update(jax.tree.map(force, gradients, params, rates, decays), state, params)

    return optax.GradientTransformationExtraArgs(velocity.init, update)


@dataclasses.dataclass(frozen=True)
class Stall:
    """When to cut the rates because the held-out error does not fall any more (paper, section 5).

    Attributes:
      best: the lowest error so far; None before the first evaluation.
      evaluations: how many there have been since.
      cuts: how often the rates were cut.
    """

    best: float | None = None
    evaluations: int = 0
    cuts: int = 0

    def after(self, error: float, config: ConfigDict) -> Self:
        """The state after one more evaluation.

        Args:
          config: ``optim.stall``: cuts after so many evaluations without a lower error, and no more than so often.
        """
        if self.best is None or error < self.best:
            return dataclasses.replace(self, best=error, evaluations=0)
        if 0 < config.evaluations <= self.evaluations + 1 and self.cuts < config.cuts:
            return dataclasses.replace(self, evaluations=0, cuts=self.cuts + 1)
        return dataclasses.replace(self, evaluations=self.evaluations + 1)


def _stalled(config: ConfigDict, stalls: jax.typing.ArrayLike) -> jax.Array:
    return config.learning_rate * jnp.float32(config.cut_divisor) ** -jnp.asarray(stalls)


def _cuts(epochs: tuple[float, ...], divisor: float, step: jax.typing.ArrayLike, steps_per_epoch: float) -> jax.Array:
    """What a rate is multiplied by after the cuts up to this step."""
    count = sum((reached(epoch, step, steps_per_epoch).astype(jnp.int32) for epoch in epochs), start=jnp.int32(0))
    return jnp.float32(divisor) ** -count


def _own(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
