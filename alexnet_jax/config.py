"""Configs: flags with helpful errors, the config of one run, and the check of every value."""

import difflib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from alexnet_jax.model import ACTIVATIONS, OPERATIONS
from alexnet_jax.towers import EXECUTORS

SECTIONS = ("model", "data", "optim", "train", "eval")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flag parser, with a word of help for a key that the config does not have."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError):  # what ml_collections raises for an unknown key
        flags.FLAGS([argument for argument in argv if not argument.startswith("--config.")])
        config = flags.FLAGS.config
        for argument in argv:
            key = argument.removeprefix("--config.").split("=")[0].split("[")[0]
            if argument.startswith("--config.") and not _has(config, key):
                sys.exit(f"FATAL Flags parsing error: {_unknown(config, key)}")
        raise


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, ConfigDict) else {key: value}
    return flat


def run_config(study: ConfigDict, arm: str, seed: int) -> ConfigDict:
    """The config of one run: the study's base, what the arm changes, and ``seed``.

    Raises:
      ValueError: the arm names a key that does not exist, or gives a value of another type.
    """
    config = ConfigDict({section: study[section].to_dict() for section in SECTIONS})
    config.lock()
    for key in flatten(study.arms[arm]):
        if not _has(config, key):
            raise ValueError(f"arm {arm!r}: {_unknown(config, key)}")
    try:
        config.update(study.arms[arm].to_dict())
    except TypeError as error:
        raise ValueError(f"arm {arm!r}: {error}") from None
    with config.unlocked():
        config.seed = seed
    return config


def validate(config: ConfigDict) -> None:
    """Checks every value of a run's config that can be checked without data and devices.

    Raises:
      ValueError: names the key, the value and the rule.
    """
    for key, (obeys, rule) in _rules(config):
        value = flatten(config)[key]
        if not obeys(value):
            raise ValueError(f"config.{key}={value!r}: must be {rule}")


Rule = tuple[Callable[[Any], bool], str]


def _at_least(least: float) -> Rule:
    return lambda value: value >= least, f"{least} or more"


def _one_of(*choices: str) -> Rule:
    return lambda value: value in choices, f"one of {', '.join(choices)}"


_POSITIVE: Rule = (lambda value: value > 0, "more than 0")
_SHARE: Rule = (lambda value: 0 <= value < 1, "from 0 to less than 1")


def _rules(config: ConfigDict) -> Iterator[tuple[str, Rule]]:
    model, names = config.model, list(config.model.layers)
    yield "model.towers", _at_least(1)
    yield "model.activation", _one_of(*ACTIVATIONS)
    yield (
        "model.order",
        (lambda order: order and set(order) <= set(names) and len(set(order)) == len(order), f"some of {names}, once"),
    )
    for name in model.order:
        layer, towers = model.layers[name], model.towers
        yield f"model.layers.{name}.kind", _one_of("conv", "dense")
        yield f"model.layers.{name}.weight_std", _at_least(0)
        yield (
            f"model.layers.{name}.then",
            (lambda then: set(then) <= set(OPERATIONS), f"some of {', '.join(OPERATIONS)}, in order"),
        )
        if name == model.order[-1]:
            rule: Rule = (lambda features: features is None, "None, one for each class, as this is the last layer")
        else:
            rule = (
                lambda features, towers=towers: features is not None and features > 0 and features % towers == 0,
                f"more than 0 and divisible by the {towers} towers",
            )
        yield f"model.layers.{name}.features", rule
        if layer.kind == "conv":
            yield f"model.layers.{name}.kernel", _at_least(1)
            yield f"model.layers.{name}.stride", _at_least(1)
            yield (
                f"model.layers.{name}.padding",
                (lambda padding: len(padding) == 2 and min(padding) >= 0, "two numbers of pixels, before and after"),
            )
    yield "model.lrn.n", _at_least(1)
    yield "model.lrn.k", _POSITIVE
    yield "model.lrn.alpha", _at_least(0)
    yield "model.pool.window", _at_least(1)
    yield "model.pool.stride", _at_least(1)
    yield "model.dropout.rate", _SHARE
    size = config.data.image_size
    yield "data.image_size", _at_least(1)
    yield "data.crop", (lambda crop: 1 <= crop <= size, f"from 1 to data.image_size={size}")
    yield "data.std", _POSITIVE
    yield "data.threads", _at_least(1)
    yield "data.prefetch", _at_least(1)
    yield "optim.learning_rate", _POSITIVE
    yield "optim.momentum", _SHARE
    yield "optim.weight_decay", _at_least(0)
    yield "optim.cut_epochs", (lambda epochs: list(epochs) == sorted(epochs), "ascending")
    yield "optim.cut_divisor", _POSITIVE
    yield "train.executor", _one_of(*EXECUTORS)
    for key in ("train.batch_size", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints"):
        yield key, _at_least(1)
    yield "train.epochs", _POSITIVE
    yield "eval.batch_size", _at_least(1)
    yield "eval.every_epochs", _POSITIVE
    yield "seed", _at_least(0)


def _has(config: ConfigDict, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(config, ConfigDict) or name not in config:
            return False
        config = config[name]
    return True


def _unknown(config: ConfigDict, key: str) -> str:
    """Says that a key does not exist, and which ones are nearest to it."""
    keys = list(flatten(config))
    nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0) + difflib.get_close_matches(key, keys)[1:]
    return f"unknown config key {key!r}; did you mean {' or '.join(nearest)}?"
