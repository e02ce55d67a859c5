"""Studies and runs as configs: loading a study, the config of one run, validation. No flags, no JAX."""

import ast
import contextlib
import difflib
import functools
import inspect
import json
import numbers
import operator
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from alexnet_jax.configs import FOLDER

SECTIONS = ("model", "data", "optim", "train", "eval")

ACTIVATIONS = ("relu", "tanh", "scaled_tanh", "gelu", "silu")
OPERATIONS = ("activation", "lrn", "spatial_lrn", "batch_norm", "max_pool", "avg_pool", "dropout")
SPATIAL = ("spatial_lrn", "max_pool", "avg_pool")  # operations on feature maps
KINDS = ("conv", "local", "dense")
WINDOW = ("kernel", "stride", "padding")  # fields that dense layers do not have
SEES = ("all", "own")
DTYPES = ("float32", "bfloat16")
DISTRIBUTIONS = ("normal", "uniform")
EXECUTORS = ("auto", "vmap", "pmap", "shard_map")
LAYOUTS = ("towers", "one_weird_trick")
OPTIMIZERS = ("paper", "sgd", "adamw")
SCHEDULES = ("step", "cosine")
MATMUL_PRECISIONS = ("default", "tensorfloat32", "float32")
SUBTRACT = ("mean_image", "central_mean_image", "mean_pixel", "mean")

_CHOICES_BY_ARM = "tuning.choices_by_arm."  # before the name of an arm

# Fields that may change when a run is resumed: they decide how it is computed and recorded, and not what it learns.
# Other executors, layouts and steps in one program round otherwise.
FREE = (
    "data.data_dir",
    "data.resident_bytes",
    "data.host_bytes",
    "data.threads",
    "data.prefetch",
    "train.executor",
    "train.layout",
    "train.steps_per_dispatch",
    "train.profile",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "eval.batch_size",
)


def load_study(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Load a study from a config file.

    Args:
      spec: a file with a function `get_config`, and its scale after a colon: "configs/ablation_lrn.py:cifar10".
        A file that does not exist is looked for among the package's own configs.
      overrides: "--config.KEY=VALUE", with a Python literal for any value but a string; the last one of a key counts.

    Raises:
      ValueError: there is no such file or scale, the file has a mistake, or a key or a value's type is wrong.
    """
    path, scale = split_spec(spec)
    file = _study_file(path)
    with _file_and_line(path, file):
        get_config = runpy.run_path(str(file)).get("get_config")
    if not callable(get_config):
        raise ValueError(f"--config={path}: must define a function get_config(scale) that returns a study")
    line = getattr(getattr(get_config, "__code__", None), "co_firstlineno", 1)
    try:
        call = inspect.signature(get_config).bind(*([] if scale is None else [scale]))
    except TypeError:
        remedy = 'add ":SCALE" to' if scale is None else f'leave out ":{scale}" in'
        raise ValueError(f"{path}:{line}: get_config must take a scale, or none; {remedy} --config") from None
    with _file_and_line(path, file):
        study = get_config(*call.args)
    if not isinstance(study, ConfigDict) or not {*SECTIONS, "arms", "seeds", "claims", "tuning"} <= set(study):
        made = type(study).__name__
        raise ValueError(f"{path}:{line}: get_config must return a study, not any {made}; return base.study(...)")
    study.lock()
    for override in overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        require_key(study, key)
        apply_changes(study, {key: _field(key).parse(text if equals else "True")})
    return study


def split_spec(spec: str) -> tuple[str, str | None]:
    """Return the path and the scale of the "FILE:SCALE" of --config; the scale is None if there is none."""
    path, colon, scale = spec.rpartition(":")
    return (path, scale) if colon and not Path(spec).is_file() else (spec, None)


def _study_file(path: str) -> Path:
    """Return a study's file: of the user's, or of the package's own under the same name."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    bundled = FOLDER.joinpath(*file.parts[1:] if file.parts[:1] == ("configs",) else file.parts)
    if bundled.is_file():
        return bundled
    raise ValueError(f"--config={path}: must be a file; give one of your own, or one of configs/")


@contextlib.contextmanager
def _file_and_line(path: str, file: Path) -> Iterator[None]:
    """Run a config file, which may import its neighbours; raise ValueError with file and line for any error."""
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        yield
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        text = str(error)
        if isinstance(error, SyntaxError) and error.filename == str(file):  # or of a file that it imports
            lines, text = [error.lineno], error.msg
        where = f"{path}:{lines[-1]}" if lines else f"--config={path}"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {kind}{' '.join(text.split())}") from error
    finally:
        sys.path.pop(0)


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as dotted keys and their values."""
    flat: dict[str, Any] = {}
    for name, value in (config.to_dict() if isinstance(config, ConfigDict) else config).items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def as_json(config: ConfigDict) -> dict[str, Any]:
    """Return a config as it is on disk: nested dictionaries, lists for tuples."""
    return json.loads(config.to_json())


def from_json(values: dict[str, Any]) -> ConfigDict:
    """Return the run config that `as_json` made nested dictionaries of.

    Fields that an earlier version did not have get their defaults.

    Raises:
      ValueError: the config is of version 0.1, whose fields have other names.
      KeyError, AttributeError, TypeError: a section is missing or is not a dictionary.
    """
    from alexnet_jax.configs import base  # which imports this module

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    nested = tuples(values)
    if any("crosses" in layer for layer in nested["model"]["layers"].values()):
        raise ValueError(
            "the config is of alexnet_jax 0.1, whose fields have other names; use that version or train again"
        )
    for key, default in flatten(base.get_config()).items():
        *sections, field = key.split(".")
        if sections and sections[0] in SECTIONS and sections[:2] != ["model", "layers"]:
            inner = nested[sections[0]]
            for section in sections[1:]:
                inner = inner.setdefault(section, {})
            inner.setdefault(field, default)
    config = ConfigDict(nested)
    config.lock()
    return config


def run_config(study: ConfigDict, arm: str, seed: int, changes: Mapping[str, Any] | None = None) -> ConfigDict:
    """Return the config of one run: the study's base with the arm's changes, further changes, and a seed.

    Changes and errors are those of `apply_changes`.
    """
    config = ConfigDict({section: study[section].to_dict() for section in SECTIONS})
    config.lock()
    try:
        apply_changes(config, study.arms[arm])
        apply_changes(config, changes or {})
    except ValueError as error:
        raise ValueError(f"arm {arm!r}: {error}") from None
    with config.unlocked():
        config.seed = seed
    return config


def apply_changes(config: ConfigDict, changes: ConfigDict | Mapping[str, Any]) -> None:
    """Apply changes to a config, in place: nested, or by dotted key.

    Raises:
      ValueError: a change names a key that does not exist, or has a value of another type.
    """
    for key, value in flatten(changes).items():
        require_key(config, key)
        try:
            with config.unlocked():  # `tuning.choices_by_arm` has a field for each arm that is named
                config.update_from_flattened_dict({key: _field(key).checked(key, value)})
        except TypeError as error:  # a field that the base config does not have
            raise ValueError(f"{key}={value!r}: must have the type of the default; {error}") from None


def require_key(config: ConfigDict, key: str) -> None:
    """Raise ValueError, with the nearest keys, if a config has no field of this dotted key."""
    keys = list(flatten(config))
    if key not in keys and not (key.startswith(_CHOICES_BY_ARM) and "tuning" in config):
        nearest = " or ".join(difflib.get_close_matches(key, keys))
        remedy = f"did you mean {nearest}?" if nearest else "see configs/base.py"
        raise ValueError(f"unknown config key {key!r}; {remedy}")


def reference_run(study: ConfigDict) -> ConfigDict:
    """Return the config of a study's reference run: its first arm, seed 0."""
    return run_config(study, next(iter(study.arms)), 0)


def validate(config: ConfigDict) -> None:
    """Check every value of a run's config that needs no data or devices; raise ValueError if one breaks its rule."""
    values = flatten(config)
    for key in _required(values):
        if key not in values:
            raise ValueError(f"{key}: must be in the config; make it with base.study, base.conv and base.dense")
    for key, value in values.items():
        _field(key).checked(key, value)
    for key, rule in _rules(config):
        if not rule.holds(values[key]):
            raise ValueError(f"{key}={values[key]!r}: must be {rule.text}")


def _required(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that a run's config must have."""
    layers = {key.split(".")[2] for key in values if key.startswith("model.layers.")}
    dense = {layer for layer in layers if values.get(f"model.layers.{layer}.kind") == "dense"}
    for key in _fields():
        path = key.split(".")
        if "*" in path:
            yield from (key.replace("*", layer) for layer in layers - (dense if path[-1] in WINDOW else set()))
        elif path[0] in (*SECTIONS, "seed"):
            yield key


class _Field(NamedTuple):
    """The type of a field's values, and that of their elements if they are tuples; `object` is any type."""

    kind: type = object
    element: type = object
    optional: bool = True

    def parse(self, text: str) -> Any:
        """Return the value that the command line has as text; if it has another type, `checked` refuses it."""
        if self.kind is str:
            return text
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # not a literal: a string
            value = text
        return (value,) if self.kind is tuple and not isinstance(value, tuple | list | None) else value

    def checked(self, key: str, value: Any) -> Any:
        """Return a value as the field holds it, such as 1.0 for 1; raise ValueError if it has another type."""
        if value is None and self.optional:
            return value
        try:
            if self.kind is tuple:
                return tuple(_cast(element, self.element) for element in _cast(value, tuple))
            return _cast(value, self.kind)
        except TypeError:
            text = _TYPES[self.kind] + (f", each {_TYPES[self.element]}" if self.element is not object else "")
            none = "None or " if self.optional else ""
            raise ValueError(f"{key}={value!r}: must be {none}{text}") from None


_LARGEST = 10**15  # no field needs more, and NaN and infinity are not within
_TYPES = {
    bool: "True or False",
    int: "an integer",
    float: f"a finite number of at most {_LARGEST:.0e}",
    str: "a string",
    tuple: "a tuple",
}


def _cast(value: Any, kind: type) -> Any:
    """Return a value as one of a type; raise TypeError if it is not, as True is no integer and NaN no number."""
    accepted: Any = {int: numbers.Integral, float: numbers.Real, tuple: (tuple, list)}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind not in (bool, object)):
        raise TypeError
    if kind not in (int, float):
        return value
    if not -_LARGEST <= value <= _LARGEST:
        raise TypeError
    return kind(value)


@functools.cache
def _fields() -> dict[str, _Field]:
    """Return all fields of the base config by key, where `*` stands for the name of a layer."""
    from alexnet_jax.configs import base  # which imports this module

    config = base.get_config()
    config.seed = 0
    flat = flatten(config)
    # The elements of a tuple that is None or empty by default are those of fields of the same name.
    elements = {key.split(".")[-1]: type(value[0]) for key, value in flat.items() if isinstance(value, tuple) and value}
    fields: dict[str, _Field] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        kind = functools.reduce(operator.getitem, sections, config).get_type(name)
        general = _general(key)
        optional = value is None or (general in fields and fields[general].optional)
        fields[general] = _Field(kind, elements.get(name, object) if kind is tuple else object, optional)
    return fields


def _general(key: str) -> str:
    """Return the key of a field in `_fields`; an arm's changes have the keys of what they change."""
    if key.startswith(_CHOICES_BY_ARM):
        return "tuning.choices"
    return re.sub(r"^model\.layers\.[^.]+", "model.layers.*", re.sub(r"^arms\.[^.]+\.", "", key))


@functools.lru_cache(maxsize=1000)
def _field(key: str) -> _Field:
    """Return the field of a key; one that the base config does not have may hold anything."""
    return _fields().get(_general(key), _Field())


class _Rule(NamedTuple):
    holds: Callable[[Any], Any]
    text: str


def _at_least(least: int, most: int | None = None) -> _Rule:
    """Return the rule of a number, with an upper bound where a slip of a key would run out of time or memory."""
    text = f"{least} or more" if most is None else f"from {least} to {most}"
    return _Rule(lambda value: value >= least and (most is None or value <= most), text)


def _one_of(*choices: str) -> _Rule:
    return _Rule(lambda value: value in choices, f"one of {', '.join(choices)}")


def _some_of(*choices: str) -> _Rule:
    return _Rule(lambda values: set(values) <= set(choices), f"a tuple of some of {', '.join(choices)}")


def _or_none(rule: _Rule) -> _Rule:
    return _Rule(lambda value: value is None or rule.holds(value), f"None or {rule.text}")


_EPOCHS = _Rule(lambda value: 0 <= value <= 100_000, "from 0 to 100000")
_ASCENDING = _Rule(
    lambda values: list(values) == sorted(set(values)) and all(map(_EPOCHS.holds, values)),
    "ascending, each from 0 to 100000",
)
_POSITIVE = _Rule(lambda value: value > 0, "more than 0")
_FRACTION = _Rule(lambda value: 0 <= value < 1, "from 0 to less than 1")


def _rules(config: ConfigDict) -> Iterator[tuple[str, _Rule]]:
    """Yield keys and their rules; a rule may rely on those before it."""
    model = config.model
    yield "model.towers", _at_least(1, 1000)
    yield "model.activation", _one_of(*ACTIVATIONS)
    yield "model.init", _one_of(*DISTRIBUTIONS)
    yield "model.dtype", _one_of(*DTYPES)
    yield "model.order", _some_of(*model.layers)
    yield "model.order", _Rule(lambda order: len(set(order)) == len(order) > 0, "at least one layer, and each once")
    for name in model.order:
        yield from _layer_rules(f"model.layers.{name}", model.layers[name], model.towers, name == model.order[-1])
    kinds = [model.layers[name].kind for name in model.order]
    rule = 'convolutions, of which the first is of kind "conv", then dense layers'
    yield "model.order", _Rule(lambda order: kinds[0] == "conv" and sorted(kinds, key="dense".__eq__) == kinds, rule)
    yield "model.lrn.n", _at_least(1, 10_000)
    yield "model.lrn.k", _POSITIVE
    yield "model.lrn.alpha", _at_least(0)
    yield "model.lrn.beta", _at_least(0)
    yield "model.lrn.sees", _one_of(*SEES)
    yield "model.lrn.spatial.window", _at_least(1, 1000)
    yield "model.lrn.spatial.k", _POSITIVE
    yield "model.lrn.spatial.alpha", _at_least(0)
    yield "model.lrn.spatial.beta", _at_least(0)
    yield "model.batch_norm.momentum", _FRACTION
    yield "model.batch_norm.epsilon", _POSITIVE
    yield "model.pool.window", _at_least(1, 1000)
    yield "model.pool.stride", _at_least(1, 1000)
    yield "model.dropout.rate", _FRACTION
    yield "data.image_size", _at_least(1, 10_000)
    size = config.data.image_size
    yield "data.crop", _Rule(lambda crop: 1 <= crop <= size, f"from 1 to data.image_size={size}")
    yield "data.subtract", _one_of(*SUBTRACT)
    yield "data.std", _Rule(lambda std: all(value > 0 for value in std), "more than 0, per channel")
    yield "data.augment.colour.noise", _at_least(0)
    yield "data.augment.colour.eigenvalue_unit", _or_none(_POSITIVE)
    yield "data.augment.code2012.images_per_crop", _at_least(1, 1_000_000)
    yield "data.augment.code2012.noise_until_epoch", _or_none(_EPOCHS)
    yield "data.resident_bytes", _at_least(0)
    yield "data.host_bytes", _at_least(0)
    yield "data.threads", _at_least(1, 1000)
    yield "data.prefetch", _at_least(1, 1000)
    yield "optim.name", _one_of(*OPTIMIZERS)
    yield "optim.schedule", _one_of(*SCHEDULES)
    yield "optim.learning_rate", _POSITIVE
    yield "optim.warmup_epochs", _EPOCHS
    yield "optim.momentum", _FRACTION
    two_fractions = _Rule(lambda betas: len(betas) == 2 and all(map(_FRACTION.holds, betas)), "two, from 0 to under 1")
    yield "optim.betas", two_fractions
    yield "optim.weight_decay", _at_least(0)
    yield "optim.decay_epochs", _ASCENDING
    yield "optim.decay_factor", _POSITIVE
    yield "optim.plateau.patience", _at_least(0)
    yield "optim.plateau.max_decays", _at_least(0)
    if config.optim.plateau.patience:
        yield "data.validation_split", _Rule(bool, 'a split or "1/20": optim.plateau.patience needs a validation set')
    yield "optim.biases.learning_rate", _at_least(0)
    yield "optim.biases.weight_decay", _at_least(0)
    yield "optim.biases.decay_epochs", _or_none(_ASCENDING)
    yield "optim.biases.decay_factor", _or_none(_POSITIVE)
    yield "train.executor", _one_of(*EXECUTORS)
    yield "train.layout", _one_of(*LAYOUTS)
    yield "train.matmul_precision", _one_of(*MATMUL_PRECISIONS)
    yield "train.steps_per_dispatch", _or_none(_at_least(1, 1000))
    yield "train.batch_size", _at_least(1)
    if config.train.layout == "one_weird_trick":
        rule = f"a multiple of model.towers={model.towers} with train.layout=one_weird_trick"
        yield "train.batch_size", _Rule(lambda size: size % model.towers == 0, rule)
    yield "train.epochs", _POSITIVE
    yield "train.epochs", _EPOCHS
    yield "train.stop_at_error", _or_none(_FRACTION)
    yield "train.label_smoothing", _FRACTION
    yield "train.log_every", _at_least(1)
    yield "train.profile", _at_least(0)
    yield "train.checkpoint_every", _at_least(1)
    yield "train.keep_checkpoints", _at_least(1)
    yield "eval.batch_size", _at_least(1, 1_000_000)
    yield "eval.views", _Rule(lambda views: views in (1, 10), "1 or 10")
    yield "eval.every_epochs", _POSITIVE
    yield "eval.train_images", _at_least(1)
    yield "seed", _Rule(lambda seed: 0 <= seed < 2**32, "from 0 to 2**32 - 1")


def _layer_rules(key: str, layer: ConfigDict, towers: int, last: bool) -> Iterator[tuple[str, _Rule]]:
    """Yield the rules of one layer's fields."""
    yield f"{key}.kind", _one_of(*KINDS)
    if last:
        yield f"{key}.features", _Rule(lambda value: value is None, "None (one for each class) in the last layer")
    else:
        rule = f"a multiple of model.towers={towers}, at most 1000000; only the last layer may leave it open"
        yield f"{key}.features", _Rule(lambda value: value and 0 < value <= 10**6 and value % towers == 0, rule)
    yield f"{key}.sees", _one_of(*SEES)
    yield f"{key}.weight_std", _at_least(0)
    yield f"{key}.bias_std", _at_least(0)
    yield f"{key}.weight_decay", _or_none(_at_least(0))
    yield f"{key}.decay_epochs", _or_none(_ASCENDING)
    yield f"{key}.freeze_epoch", _or_none(_EPOCHS)
    yield f"{key}.then", _some_of(*OPERATIONS)
    yield f"{key}.then", _Rule(lambda then: list(then).count("batch_norm") <= 1, "a tuple with batch_norm at most once")
    if layer.kind == "dense":
        rule = f"a tuple without {', '.join(SPATIAL)} in a dense layer"
        yield f"{key}.then", _Rule(lambda then: not set(then) & set(SPATIAL), rule)
    else:
        kernel = layer.kernel
        yield f"{key}.kernel", _at_least(1, 1000)
        yield f"{key}.stride", _at_least(1, 1000)
        # XLA reads memory that was never written in the gradient of wider paddings on CPUs (jax 0.10.2).
        rule = f"pixels before and after, fewer than kernel={kernel}"
        yield f"{key}.padding", _Rule(lambda value: len(value) == 2 and 0 <= min(value) <= max(value) < kernel, rule)
