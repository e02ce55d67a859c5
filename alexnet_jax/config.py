"""Configs: flags with helpful errors, the config of one run, and the check of every value."""

import difflib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from alexnet_jax import records
from alexnet_jax.model import ACTIVATIONS, DISTRIBUTIONS, DTYPES, OPERATIONS
from alexnet_jax.pixels import SUBTRACT
from alexnet_jax.towers import EXECUTORS

FLAG = config_flags.DEFINE_config_file(
    "config", help_string="A file of configs/, and after a colon its scale.", lock_config=True
)
SECTIONS = ("model", "data", "optim", "train", "eval")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flag parser, but what is wrong with a flag is said in one line."""
    try:
        for position, argument in enumerate(argv):
            if argument == "--config" or argument.startswith("--config="):
                _check_overrides((argument.partition("=")[2] or " ".join(argv[position + 1 : position + 2])), argv)
        return flags.FLAGS(argv)
    except (flags.Error, ValueError) as error:
        sys.exit(f"{Path(argv[0]).name}: {error}")


def _check_overrides(source: str, argv: list[str]) -> None:
    """Refuses flags for keys that the config does not have: ml_collections answers them with a traceback.

    Args:
      source: the value of --config: a file, and perhaps a scale after a colon.

    Raises:
      ValueError: there is no such file, scale or key.
    """
    path, *scale = source.split(":", 1)
    if not Path(path).is_file():
        raise ValueError(f"--config={source}: there is no file {path}; the studies are in configs/")
    config = runpy.run_path(path)["get_config"](*scale)
    for argument in argv:
        if argument.startswith("--config."):
            key = argument.removeprefix("--config.").split("=")[0].split("[")[0]
            if not _has(config, key):
                raise ValueError(_unknown(config, key))


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted keys and their values."""
    return records.flatten(config.to_dict())


def as_json(config: ConfigDict) -> dict[str, Any]:
    """A config as it is on disk: nested dictionaries, lists for tuples."""
    return json.loads(config.to_json())


def from_json(values: dict[str, Any]) -> ConfigDict:
    """What ``as_json`` made of a run's config; fields that were left open stay None."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    config = ConfigDict(tuples(values))
    config.lock()
    return config


def run_config(study: ConfigDict, arm: str, seed: int, changes: dict[str, Any] | None = None) -> ConfigDict:
    """The config of one run: the study's base, what the arm changes, and ``seed``.

    Args:
      changes: what else is changed; dotted keys.

    Raises:
      ValueError: the arm, or a change, names a key that does not exist, or gives a value of another type.
    """
    config = ConfigDict({section: study[section].to_dict() for section in SECTIONS})
    config.lock()
    for key in [*flatten(study.arms[arm]), *(changes or {})]:
        if not _has(config, key):
            raise ValueError(f"arm {arm!r}: {_unknown(config, key)}")
    try:
        config.update(study.arms[arm].to_dict())
        config.update_from_flattened_dict(changes or {})
    except TypeError as error:
        raise ValueError(f"arm {arm!r}: {error}") from None
    with config.unlocked():
        config.seed = seed
    return config


def reference_run(study: ConfigDict) -> ConfigDict:
    """The config of the run of the first arm with seed 0: the net that a config file is of."""
    return run_config(study, next(iter(study.arms)), 0)


def validate(config: ConfigDict) -> None:
    """Checks every value of a run's config that can be checked without data and devices.

    Raises:
      ValueError: names the key, the value and the rule.
    """
    values = flatten(config)
    for key, rule in _rules(config):
        if not rule.obeys(values[key]):
            raise ValueError(f"{key}={values[key]!r}: must be {rule.text}")


class _Rule(NamedTuple):
    obeys: Callable[[Any], bool]
    text: str


def _at_least(least: int) -> _Rule:
    return _Rule(lambda value: value >= least, f"{least} or more")


def _one_of(*choices: str) -> _Rule:
    return _Rule(lambda value: value in choices, f"one of {', '.join(choices)}")


def _some_of(*choices: str) -> _Rule:
    return _Rule(lambda values: set(values) <= set(choices), f"a tuple of some of {', '.join(choices)}")


def _or_none(rule: _Rule) -> _Rule:
    return _Rule(lambda value: value is None or rule.obeys(value), f"None or {rule.text}")


_ASCENDING = _Rule(lambda values: list(values) == sorted(set(values)), "ascending")
_POSITIVE = _Rule(lambda value: value > 0, "more than 0")
_SHARE = _Rule(lambda value: 0 <= value < 1, "from 0 to less than 1")


def _rules(config: ConfigDict) -> Iterator[tuple[str, _Rule]]:
    """Keys and their rules, in an order in which a rule can rely on those before it."""
    model = config.model
    yield "model.towers", _at_least(1)
    yield "model.activation", _one_of(*ACTIVATIONS)
    yield "model.init", _one_of(*DISTRIBUTIONS)
    yield "model.dtype", _one_of(*DTYPES)
    yield "model.order", _some_of(*model.layers)
    yield "model.order", _Rule(lambda order: len(set(order)) == len(order) > 0, "at least one layer, and each once")
    for name in model.order:
        yield from _layer_rules(f"model.layers.{name}", model.layers[name], model.towers, name == model.order[-1])
    yield "model.lrn.n", _at_least(1)
    yield "model.lrn.k", _POSITIVE
    yield "model.lrn.alpha", _at_least(0)
    yield "model.lrn.spatial.window", _at_least(1)
    yield "model.lrn.spatial.k", _POSITIVE
    yield "model.lrn.spatial.alpha", _at_least(0)
    yield "model.pool.window", _at_least(1)
    yield "model.pool.stride", _at_least(1)
    yield "model.dropout.rate", _SHARE
    yield "data.validation_every", _at_least(2)
    yield "data.image_size", _at_least(1)
    size = config.data.image_size
    yield "data.crop", _Rule(lambda crop: 1 <= crop <= size, f"from 1 to data.image_size={size}")
    yield "data.subtract", _one_of(*SUBTRACT)
    yield "data.std", _Rule(lambda std: all(value > 0 for value in std), "more than 0, per channel")
    yield "data.augment.chunk", _at_least(1)
    yield "data.augment.colour.noise", _at_least(0)
    yield "data.augment.colour.eigenvalue_unit", _or_none(_POSITIVE)
    yield "data.threads", _at_least(1)
    yield "data.prefetch", _at_least(1)
    yield "optim.learning_rate", _POSITIVE
    yield "optim.momentum", _SHARE
    yield "optim.weight_decay", _at_least(0)
    yield "optim.cut_epochs", _ASCENDING
    yield "optim.cut_divisor", _POSITIVE
    yield "optim.stall.evaluations", _at_least(0)
    yield "optim.stall.cuts", _at_least(0)
    yield "optim.biases.rate", _at_least(0)
    yield "optim.biases.decay", _at_least(0)
    yield "optim.biases.cut_epochs", _or_none(_ASCENDING)
    yield "optim.biases.cut_divisor", _or_none(_POSITIVE)
    yield "train.executor", _one_of(*EXECUTORS)
    yield "train.batch_size", _at_least(1)
    yield "train.epochs", _POSITIVE
    yield "train.log_every", _at_least(1)
    yield "train.profile", _at_least(0)
    yield "train.checkpoint_every", _at_least(1)
    yield "train.keep_checkpoints", _at_least(1)
    yield "eval.batch_size", _at_least(1)
    yield "eval.views", _Rule(lambda views: views in (1, 10), "1 or 10")
    yield "eval.every_epochs", _POSITIVE
    yield "eval.train_images", _at_least(1)
    yield "seed", _Rule(lambda seed: 0 <= seed < 2**32, "from 0 to 2**32 - 1")


def _layer_rules(key: str, layer: ConfigDict, towers: int, last: bool) -> Iterator[tuple[str, _Rule]]:
    yield f"{key}.kind", _one_of("conv", "local", "dense")
    if last:
        yield f"{key}.features", _Rule(lambda value: value is None, "None, one for each class, in the last layer")
    else:
        rule = f"a multiple of model.towers={towers}, and only the last layer may leave it open"
        yield f"{key}.features", _Rule(lambda value: value and value > 0 and value % towers == 0, rule)
    yield f"{key}.weight_std", _at_least(0)
    yield f"{key}.bias_std", _at_least(0)
    yield f"{key}.weight_decay", _or_none(_at_least(0))
    yield f"{key}.cut_epochs", _or_none(_ASCENDING)
    yield f"{key}.then", _some_of(*OPERATIONS)
    if layer.kind != "dense":
        yield f"{key}.kernel", _at_least(1)
        yield f"{key}.stride", _at_least(1)
        yield f"{key}.padding", _Rule(lambda value: len(value) == 2 and min(value) >= 0, "pixels before and after")


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
