"""The paper's update rule and others as optax chains, learning rate schedules, and decay on plateau."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from ml_collections import ConfigDict

KERNEL, BIAS = "kernel", "bias"


class _Rule(NamedTuple):
    """Hyperparameters of the update of one parameter."""

    multiplier: float  # of `optim.learning_rate`
    weight_decay: float
    decay_epochs: tuple[float, ...]  # when the learning rate is multiplied by the decay factor
    decay_factor: float
    freeze_epoch: float | None = None  # from when on the learning rate is 0; None: never


def make_optimizer(
    config: ConfigDict, layers: ConfigDict, steps_per_epoch: float, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of `optim.name`.

    "paper" is `v <- momentum * v - lr * (g + decay * w);  w <- w + v` (paper, section 5): the learning rate is inside
    the velocity, so after a decay step the old velocity fades over some steps, as does that of a frozen layer. "sgd"
    and "adamw" multiply the whole update by the current learning rate, as PyTorch does.

    Its `update(gradients, state, params, peak=peak_learning_rate(config))` counts its steps. Its state is a pytree of
    arrays.

    Args:
      config: the `optim` section, of which `learning_rate` is not used: runs that differ in it share a program.
      layers: `model.layers`; a layer may have its own weight decay, decay epochs and freeze epoch. What is not the
        kernel of a layer follows `optim.biases`.
      steps_per_epoch: need not be an integer.
      steps: of the whole run, at which the cosine schedule is 0.
    """
    labels = {_rule(config): KERNEL}
    other = labels.setdefault(_bias_rule(config), BIAS)
    label_of: dict[tuple[str, str], str] = {}
    for name, layer in layers.items():
        for part, rule in ((KERNEL, _rule(config, layer)), (BIAS, _bias_rule(config, layer))):
            label_of[name, part] = labels.setdefault(rule, f"{name}_{part}")
    chains = {label: _chain(config, rule, steps_per_epoch, steps) for rule, label in labels.items()}
    if len(chains) == 1:
        return chains[other]

    def label_parameters(params: Any) -> Any:
        def label(path: tuple[Any, ...], _: Any) -> str:
            layer, part = path[0].key, path[-1].key
            return label_of.get((layer, part if part == KERNEL else BIAS), other)

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition(chains, label_parameters)


def learning_rate(
    config: ConfigDict, steps_per_epoch: float, steps: int, step: ArrayLike, plateau_decays: int = 0
) -> jax.Array:
    """Return the base learning rate at a step, counted from 0; other arguments are those of `make_optimizer`."""
    schedule = _schedule(config, _rule(config), steps_per_epoch, steps)
    return schedule(jnp.asarray(step), peak_learning_rate(config, plateau_decays))


def peak_learning_rate(config: ConfigDict, plateau_decays: int = 0) -> np.float32:
    """Return the base learning rate without its schedule, after so many decays on plateau."""
    with np.errstate(over="ignore"):  # training then diverges, and says so
        return np.float32(config.learning_rate * np.float64(config.decay_factor) ** plateau_decays)


@dataclasses.dataclass(frozen=True)
class Plateau:
    """When to decay the learning rate because the validation error has stopped falling (paper, section 5)."""

    best: float | None = None  # the lowest error so far; None before the first evaluation
    evaluations: int = 0  # since the lowest error or the last decay
    decays: int = 0  # of the learning rate so far

    def after(self, error: float, config: ConfigDict) -> Self:
        """Return the state after one more validation error.

        As `optim.plateau` says, decay after `patience` evaluations (0: never) without a lower error, at most
        `max_decays` times.
        """
        if self.best is None or error < self.best:
            return dataclasses.replace(self, best=error, evaluations=0)
        if 0 < config.patience <= self.evaluations + 1 and self.decays < config.max_decays:
            return dataclasses.replace(self, evaluations=0, decays=self.decays + 1)
        return dataclasses.replace(self, evaluations=self.evaluations + 1)


def _rule(config: ConfigDict, layer: ConfigDict | None = None) -> _Rule:
    """Return the rule of a layer's kernel, or without a layer the base rule."""
    if layer is None:
        return _Rule(1.0, config.weight_decay, tuple(config.decay_epochs), config.decay_factor)
    weight_decay, decay_epochs = (
        config[field] if layer[field] is None else layer[field] for field in ("weight_decay", "decay_epochs")
    )
    return _Rule(1.0, weight_decay, tuple(decay_epochs), config.decay_factor, layer.freeze_epoch)


def _bias_rule(config: ConfigDict, layer: ConfigDict | None = None) -> _Rule:
    """Return the rule of a layer's biases, or without a layer that of parameters outside the layers."""
    rule, biases = _rule(config, layer), config.biases
    return rule._replace(
        multiplier=biases.learning_rate,
        weight_decay=rule.weight_decay * biases.weight_decay,
        decay_epochs=tuple(config.decay_epochs if biases.decay_epochs is None else biases.decay_epochs),
        decay_factor=config.decay_factor if biases.decay_factor is None else biases.decay_factor,
    )


def _chain(
    config: ConfigDict, rule: _Rule, steps_per_epoch: float, steps: int
) -> optax.GradientTransformationExtraArgs:
    weight_decay = optax.add_decayed_weights(rule.weight_decay)
    momentum = optax.trace(config.momentum)
    scale = _scale_by_learning_rate(_schedule(config, rule, steps_per_epoch, steps))
    match config.name:
        case "paper":
            return optax.chain(weight_decay, scale, momentum)
        case "sgd":
            return optax.chain(weight_decay, momentum, scale)
        case "adamw":
            return optax.chain(optax.scale_by_adam(*config.betas), weight_decay, scale)
    raise ValueError(f"optim.name={config.name}: must be one of config.OPTIMIZERS")


def _scale_by_learning_rate(schedule: Callable[..., jax.Array]) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by the negative learning rate, as optax's, but of a peak that may change."""

    def init(_: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: optax.ScaleByScheduleState, _: Any = None, *, peak: ArrayLike
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        rate = schedule(state.count, peak)
        return jax.tree.map(lambda leaf: -rate * leaf, updates), optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _schedule(config: ConfigDict, rule: _Rule, steps_per_epoch: float, steps: int) -> Callable[..., jax.Array]:
    """Return the learning rate as a function of the step, counted from 0, and the peak of the base learning rate."""

    def first_step(epoch: float) -> int:
        return min(round(epoch * steps_per_epoch), 2**31 - 1)  # steps are counted in int32

    warmup = first_step(config.warmup_epochs)
    if config.schedule == "cosine":
        cosine = optax.cosine_decay_schedule(1.0, max(1, steps - warmup))
        factors = [lambda step: cosine(jnp.maximum(0, step - warmup))]
    else:
        at = [first_step(epoch) for epoch in rule.decay_epochs]  # two decays may be at the same step
        factors = [optax.piecewise_constant_schedule(1.0, {step: rule.decay_factor ** at.count(step) for step in at})]
    if warmup:
        factors.append(optax.linear_schedule(0.0, 1.0, warmup))
    if rule.freeze_epoch is not None:
        factors.append(optax.piecewise_constant_schedule(1.0, {first_step(rule.freeze_epoch): 0.0}))
    return lambda step, peak: math.prod((factor(step) for factor in factors), start=peak * rule.multiplier)
