"""AlexNet, written once: what one tower computes under the named axis `"tower"`.

An executor (`parallel.py`) maps this function over the towers. They communicate only where a layer sees all of them:
there the channels of all towers are gathered. The layers are data (`configs/base.py`): a new AlexNet is a config.
"""

import functools
import itertools
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import lax
from ml_collections import ConfigDict, FrozenConfigDict

from alexnet_jax import layers
from alexnet_jax.parallel import DATA, TOWER, global_positions, per_example

SHARED_PARAMETERS = "shared_parameters"  # name of the scope in which data parallel layers gather their parameters

# Samplers of initial values, with mean 0 and standard deviation 1.
_SAMPLERS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda generator, shape: generator.standard_normal(shape, np.float32),
    "uniform": lambda generator, shape: 3**0.5 * (2 * generator.random(shape, np.float32) - 1),
}


class AlexNet(nn.Module):
    """One tower of AlexNet (paper, section 3.5 and figure 2), or some of its layers: those from `start` to `stop`."""

    config: ConfigDict  # the `model` section
    classes: int  # the features of the layer whose `features` is None
    tower_axis: str = TOWER
    data_axes: tuple[str, ...] = (DATA,)  # over which the batch is sharded
    start: int = 0  # index of the first layer
    stop: int | None = None  # index of the layer to stop before; None: after the logits

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Compute logits (batch, classes), on every tower, from images (batch, height, width, channels).

        With `stop`, compute this tower's features instead. With `start`, take the features before it, of all towers and
        of this device's part of the images (towers, images, ..., channels), instead of images.

        Needs the tower axis; in training also the data axes, and an rng named "dropout", which should differ between
        towers. Raises ValueError if a kernel or a pooling window does not fit.
        """
        x, order, then = images, self.config.order, {name: self.config.layers[name].then for name in self.config.order}
        if train and self.config.dropout.rate:
            for _ in range(sum(list(then[name]).count("dropout") for name in order[: self.start])):
                self.make_rng("dropout")  # Flax counts the calls: a layer's mask depends on the dropout before it
        for name in order[self.start : self.stop]:
            x = self._weights(name, self._input(name, x))
            for operation in then[name]:
                x = self._operation(name, operation, x, train)
        return x if self.stop is not None else self._gather("logits", x.astype(jnp.float32))[:, : self.classes]

    def _input(self, name: str, x: jax.Array) -> jax.Array:
        """Return what the named layer sees: the features of all towers or of its own."""
        sees_all = self.config.layers[name].sees == "all"
        if self.start == 0 or name != self.config.order[self.start]:
            return self._gather(name, x) if sees_all else x
        if sees_all:
            return layers.join_towers(lax.all_gather(x, self.tower_axis, axis=1, tiled=True))
        return lax.all_to_all(x, self.tower_axis, split_axis=0, concat_axis=1, tiled=True)[0]

    def _gather(self, name: str, x: jax.Array) -> jax.Array:
        """Concatenate the channels (last axis) of all towers, for the named layer."""
        self.sow("intermediates", f"{name}_sent", x)
        return layers.join_towers(lax.all_gather(x, self.tower_axis))  # tiled=True would transpose x before and after

    def _weights(self, name: str, x: jax.Array) -> jax.Array:
        """Apply the convolution or dense layer: this tower's part of its features."""
        layer = self.config.layers[name]
        features = self.classes if layer.features is None else layer.features
        features = -(-features // lax.axis_size(self.tower_axis))  # rounded up: the logits are cut to the classes
        zeros = nn.initializers.zeros  # `init` samples the values
        # The dtype is that of the computation; parameters are float32.
        options: dict[str, Any] = {"name": name, "dtype": self.config.dtype, "kernel_init": zeros, "bias_init": zeros}
        if layer.kind == "dense":
            dense = nn.Dense(features, **options)
            return dense(x.reshape(x.shape[0], -1))
        size, (before, after) = x.shape[1], layer.padding
        if size + before + after < layer.kernel:
            raise ValueError(
                f"model.layers.{name}.kernel={layer.kernel}: must fit its feature map of {size}x{size}, padded by "
                f"{before}+{after}; use larger images (data.crop), smaller strides or fewer poolings"
            )
        kinds: dict[str, Any] = {"conv": partial(nn.Conv, conv_general_dilated=layers.conv), "local": nn.ConvLocal}
        kernel, padding = (layer.kernel, layer.kernel), ((before, after), (before, after))
        conv = kinds[layer.kind](features, kernel, strides=layer.stride, padding=padding, **options)
        return conv(x)

    def _operation(self, name: str, operation: str, x: jax.Array, train: bool) -> jax.Array:
        """Apply one of the operations that follow the named layer's weights."""
        config = self.config
        match operation:
            case "activation":
                return getattr(layers if config.activation == "scaled_tanh" else nn, config.activation)(x)
            case "lrn" | "spatial_lrn" if not config.lrn.enabled:
                return x
            case "lrn":
                return self._lrn(name, x)
            case "spatial_lrn":
                return layers.spatial_lrn(x, **config.lrn.spatial)
            case "batch_norm":
                options: dict[str, Any] = dict(config.batch_norm, name=f"{name}_batch_norm", dtype=config.dtype)
                options["axis_name"] = self.data_axes if train else None
                return nn.BatchNorm(use_running_average=not train, **options)(x)
            case "max_pool" | "avg_pool":
                return getattr(layers, operation)(x, **config.pool)
            case "dropout":
                return self._dropout(x, train)
        raise ValueError(f"model.layers.{name}.then={operation}: must be one of config.OPERATIONS")

    def _dropout(self, x: jax.Array, train: bool) -> jax.Array:
        """Drop outputs in training, and scale them by the kept fraction in testing (paper, section 4.2).

        Inverted dropout scales by its reciprocal in training instead.
        """
        kept, inverted = 1 - self.config.dropout.rate, self.config.dropout.inverted
        if kept == 1:
            return x
        if not train:
            return x if inverted else kept * x
        key, positions = self.make_rng("dropout"), global_positions(len(x), self.data_axes)
        mask = per_example(lambda key: jax.random.bernoulli(key, kept, x.shape[1:]), key, positions)
        return jnp.where(mask, x / kept if inverted else x, 0)

    def _lrn(self, name: str, x: jax.Array) -> jax.Array:
        """Normalise over neighbouring channels: of this tower, or, with `lrn.sees="all"`, across its borders."""
        lrn = self.config.lrn
        normalise = partial(layers.lrn, n=lrn.n, k=lrn.k, alpha=lrn.alpha, beta=lrn.beta)
        if lrn.sees == "own":
            return normalise(x)
        axis, channels, before, after = self.tower_axis, x.shape[-1], lrn.n // 2, (lrn.n - 1) // 2
        if before > channels:
            raise ValueError(
                f"model.lrn.n={lrn.n}: must be at most {2 * channels + 1} with model.lrn.sees=all, as {name} has "
                f"{channels} features in each tower, which sees no further than its neighbours"
            )
        towers, tower = lax.axis_size(axis), lax.axis_index(axis)
        last, first = x[..., channels - before :], x[..., :after]
        self.sow("intermediates", f"{name}_lrn_sent", last)
        to_right, to_left = ([(i, (i + step) % towers) for i in range(towers)] for step in (1, -1))
        # The towers form a ring: beyond the first and the last one are zeros.
        left = lax.ppermute(last, axis, to_right) * (tower > 0)
        right = lax.ppermute(first, axis, to_left) * (tower < towers - 1)
        return normalise(jnp.concatenate([left, x, right], axis=-1))[..., before : before + channels]


def forward(
    network: AlexNet, layout: str, variables: Any, images: jax.Array, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """Compute the logits of a shard's images, on each tower's device, in a layout of `config.LAYOUTS`.

    Layouts are equal in value. In "towers" each device computes its tower's part of every layer, as the paper did. In
    "one_weird_trick" (Krizhevsky, 2014, arXiv:1404.5997) the layers before the first dense one are data parallel: each
    device gathers their parameters and computes all towers of its part of the images. It then sends these features to
    the others, and the dense layers are model parallel, as in "towers". Backwards, the gather of the parameters becomes
    the sum of their gradients over the devices. With one tower, or without such layers, the layouts are the same.

    Args:
      network: the network of one tower.
      variables: of this device's tower, without a tower axis.
      images: (batch, height, width, channels), equal on all towers.
      dropout_key: of all towers, in training; None in evaluation.

    Returns:
      Logits (batch, classes), and this tower's updated batch statistics, {} without any or in evaluation.

    Raises:
      ValueError: in training, "one_weird_trick" cannot divide the images equally.
    """
    towers, tower = lax.axis_size(TOWER), lax.axis_index(TOWER)

    def apply(network: AlexNet, variables: Any, x: jax.Array, tower: jax.Array) -> Any:
        if dropout_key is None:
            return network.apply(variables, x, train=False), {}
        rngs = {"dropout": jax.random.fold_in(dropout_key, tower)}
        x, updated = network.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])
        return x, updated.get("batch_stats", {})

    config = network.config
    shared = list(itertools.takewhile(lambda name: config.layers[name].kind != "dense", config.order))
    if layout == "towers" or towers == 1 or not shared:
        return apply(network, variables, images, tower)

    count, remainder = -(-len(images) // towers), len(images) % towers
    if remainder and dropout_key is not None:
        raise ValueError(
            f"train.layout={layout}: must have a multiple of model.towers={towers} images in each shard, not "
            f"{len(images)}; change train.batch_size"
        )
    padded = jnp.pad(images, [(0, count * towers - len(images)), *[(0, 0)] * (images.ndim - 1)])
    part = lax.dynamic_slice_in_dim(padded, tower * count, count)
    modules = {module for name in shared for module in (name, f"{name}_batch_norm")}
    tower_variables = {kind: {name: of[name] for name in of if name in modules} for kind, of in variables.items()}
    with jax.named_scope(SHARED_PARAMETERS):
        gathered = lax.all_gather(tower_variables, TOWER)
    local = network.clone(tower_axis="local_tower", data_axes=(DATA, TOWER), stop=len(shared))
    of_towers = jax.vmap(partial(apply, local), in_axes=(0, None, 0), axis_name=local.tower_axis)
    features, updated = of_towers(gathered, part, jnp.arange(towers))
    logits, batch_stats = apply(network.clone(start=len(shared)), variables, features, tower)
    return logits[: len(images)], batch_stats | jax.tree.map(lambda leaf: leaf[tower], updated)


def shapes(config: ConfigDict, classes: int, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the variables as `jax.ShapeDtypeStruct`, each with a leading axis of `config.towers`.

    They are `{"params": ...}`, and `"batch_stats"` if a layer has batch normalisation.

    Args:
      config: the `model` section.
      image_shape: (height, width, channels) of the network's input, that is after cropping.

    Raises:
      ValueError: a kernel or a pooling window does not fit its feature map.
    """
    return _shapes(FrozenConfigDict(config), classes, image_shape)


@functools.lru_cache(maxsize=64)  # a study asks for those of each arm many times
def _shapes(config: FrozenConfigDict, classes: int, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    return jax.eval_shape(_flax_init(config, classes, image_shape), jax.ShapeDtypeStruct((), jnp.uint32))


def init(config: ConfigDict, classes: int, image_shape: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """Return initial variables, NumPy arrays, each with a leading axis of `config.towers` (paper, section 5).

    Kernels and biases of layers depend on the seed, the tower, the layer's name and the shape only: networks that
    share a layer start from the same weights there, on any device, without compiling anything. All other variables
    have their module's own initial values. Arguments and errors are those of `shapes`.
    """
    variables = traverse_util.flatten_dict(shapes(config, classes, image_shape))
    for name in config.order:
        paths = [("params", name, part) for part in ("kernel", "bias")]
        kernel, bias = (variables[path].shape[1:] for path in paths)
        towers = [_sample(config, name, (seed, tower), kernel, bias) for tower in range(config.towers)]
        for path, values in zip(paths, zip(*towers, strict=True), strict=True):
            variables[path] = np.stack(values)
    if missing := {path for path, value in variables.items() if not isinstance(value, np.ndarray)}:

        @jax.jit
        def init_missing(seed: jax.Array) -> dict[tuple[str, ...], jax.Array]:
            values = traverse_util.flatten_dict(_flax_init(config, classes, image_shape)(seed))
            return {path: values[path] for path in missing}

        variables |= jax.device_get(init_missing(np.uint32(seed)))
    return traverse_util.unflatten_dict(variables)


def count_parameters(params: dict[str, Any]) -> int:
    """Return the number of parameters of all towers together."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _flax_init(config: ConfigDict, classes: int, image_shape: tuple[int, int, int]) -> Callable[[jax.Array], Any]:
    """Return a function from a seed to the variables of all towers, with the values of their modules' initialisers."""
    model = AlexNet(config, classes)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def init_towers(seed: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(seed), config.towers)
        return jax.vmap(lambda key: model.lazy_init(key, images, train=False), axis_name=TOWER)(keys)

    return init_towers


def _sample(
    config: ConfigDict, name: str, seed: tuple[int, int], kernel: tuple[int, ...], bias: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a layer's initial kernel and bias in one tower, from (seed, tower) and their shapes."""
    layer, sampler = config.layers[name], _SAMPLERS[config.init]
    generator = np.random.default_rng((*seed, zlib.crc32(name.encode())))
    weights = layer.weight_std * sampler(generator, kernel)
    biases = layer.bias + layer.bias_std * sampler(generator, bias)
    return weights.astype(np.float32), biases.astype(np.float32)
