"""AlexNet, written once: what one tower computes under the named axis ``"tower"``.

The towers are one function mapped over that axis, by whichever executor (``towers.py``), and see each other
only where a layer crosses: there the channels of all towers are gathered. The layers, in order, are data
(``configs/base.py``): a new AlexNet is a config, not a class.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict

from alexnet_jax import layers
from alexnet_jax.towers import TOWER, drawn, row_numbers

DTYPES = ("float32", "bfloat16")
ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh}
OPERATIONS = ("activation", "lrn", "spatial_lrn", "max_pool", "avg_pool", "dropout")
# What initial values are drawn from; both have mean 0 and standard deviation 1.
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda generator, shape: generator.standard_normal(shape, np.float32),
    "uniform": lambda generator, shape: 3**0.5 * (2 * generator.random(shape, np.float32) - 1),
}


class AlexNet(nn.Module):
    """One tower of AlexNet (paper, section 3.5 and figure 2).

    Attributes:
      config: the ``model`` section of a config.
      classes: number of classes, the features of the layer that names none of its own.
    """

    config: ConfigDict
    classes: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Images (batch, height, width, channels), the same on every tower, to logits (batch, classes), the same too.

        Needs the axis ``"tower"``; in training also ``"data"``, over which batches are divided, and an rng named
        "dropout", which should differ between towers.

        Raises:
          ValueError: a kernel or a pooling window does not fit the map it meets.
        """
        x = images
        for name in self.config.order:
            layer = self.config.layers[name]
            if layer.crosses:
                x = self._gather(name, x)
            x = self._weights(name, x)
            for operation in layer.then:
                x = self._operation(name, operation, x, train)
        return self._gather("logits", x.astype(jnp.float32))[:, : self.classes]

    def _gather(self, name: str, x: jax.Array) -> jax.Array:
        """The channels (last axis) of all towers, side by side, on every tower: what the named layer sees."""
        self.sow("intermediates", f"{name}_exchanged", x)
        gathered = jnp.moveaxis(lax.all_gather(x, TOWER), 0, -2)  # tiled=True would turn the maps over, on both sides
        return gathered.reshape(*x.shape[:-1], -1)

    def _weights(self, name: str, x: jax.Array) -> jax.Array:
        """The convolution or dense layer itself: this tower's share of its features."""
        layer = self.config.layers[name]
        features = self.classes if layer.features is None else layer.features
        share = -(-features // lax.axis_size(TOWER))  # rounded up: the head is padded, and cut after the gather
        how: dict[str, Any] = {
            "dtype": self.config.dtype,  # computed in; parameters are float32
            "kernel_init": nn.initializers.zeros,  # `init` fills them
            "bias_init": nn.initializers.zeros,
        }
        if layer.kind == "dense":
            dense = nn.Dense(share, name=name, **how)
            return dense(x.reshape(x.shape[0], -1))
        size, (before, after) = x.shape[1], layer.padding
        if size + before + after < layer.kernel:
            raise ValueError(
                f"{name}: a kernel of {layer.kernel}x{layer.kernel} does not fit a map of {size}x{size} padded by "
                f"{before}+{after}: use larger images (data.crop), smaller strides or fewer poolings"
            )
        kinds: dict[str, Any] = {"conv": partial(nn.Conv, conv_general_dilated=layers.conv), "local": nn.ConvLocal}
        conv = kinds[layer.kind](
            share,
            (layer.kernel, layer.kernel),
            strides=layer.stride,
            padding=((before, after), (before, after)),
            name=name,
            **how,
        )
        return conv(x)

    def _operation(self, name: str, operation: str, x: jax.Array, train: bool) -> jax.Array:
        """One of the operations that follow a layer's weights; an operation that is switched off is the identity."""
        config = self.config
        match operation:
            case "activation":
                return ACTIVATIONS[config.activation](x)
            case "lrn" if config.lrn.enabled:
                return self._lrn(name, x)
            case "spatial_lrn" if config.lrn.enabled:
                spatial = config.lrn.spatial
                return layers.spatial_lrn(x, window=spatial.window, k=spatial.k, alpha=spatial.alpha, beta=spatial.beta)
            case "lrn" | "spatial_lrn":
                return x
            case "max_pool" | "avg_pool":
                pool = {"max_pool": layers.max_pool, "avg_pool": layers.avg_pool}[operation]
                return pool(x, window=config.pool.window, stride=config.pool.stride, ceil=config.pool.ceil)
            case "dropout":
                return self._dropout(x, train)
            case _:
                raise ValueError(f"no such operation: {operation!r}")

    def _dropout(self, x: jax.Array, train: bool) -> jax.Array:
        """The paper's form (section 4.2): masked in training, times the kept share in testing; or else inverted."""
        kept, inverted = 1 - self.config.dropout.rate, self.config.dropout.inverted
        if kept == 1:
            return x
        if not train:
            return x if inverted else kept * x
        mask = drawn(
            lambda key: jax.random.bernoulli(key, kept, x.shape[1:]), self.make_rng("dropout"), row_numbers(len(x))
        )
        return jnp.where(mask, x / kept if inverted else x, 0)

    def _lrn(self, name: str, x: jax.Array) -> jax.Array:
        """Normalised over neighbouring channels: this tower's, or, where it crosses, also those beyond its border."""
        lrn = self.config.lrn
        normalise = partial(layers.lrn, n=lrn.n, k=lrn.k, alpha=lrn.alpha, beta=lrn.beta)
        if not lrn.crosses:
            return normalise(x)
        towers, channels, before, after = lax.axis_size(TOWER), x.shape[-1], lrn.n // 2, (lrn.n - 1) // 2
        last, first = x[..., channels - before :], x[..., :after]
        self.sow("intermediates", f"{name}_lrn_exchanged", last)
        right, left = ([(i, (i + step) % towers) for i in range(towers)] for step in (1, -1))
        # The outermost towers have nothing beyond them: what comes round the ring counts as zeros there.
        before_it = lax.ppermute(last, TOWER, right) * (lax.axis_index(TOWER) > 0)
        after_it = lax.ppermute(first, TOWER, left) * (lax.axis_index(TOWER) < towers - 1)
        return normalise(jnp.concatenate([before_it, x, after_it], axis=-1))[..., before : before + channels]


def shapes(config: ConfigDict, classes: int, image_shape: tuple[int, int, int]) -> dict:
    """Parameters as ``jax.ShapeDtypeStruct``, each with a leading axis of ``config.towers``.

    Args:
      image_shape: (height, width, channels) of what the net sees, that is after cropping.

    Raises:
      ValueError: a kernel or a pooling window does not fit the map it meets.
    """
    model = AlexNet(config, classes)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def of_tower(_: jax.Array) -> dict:
        return model.lazy_init(jax.random.key(0), images, train=False)["params"]

    return jax.eval_shape(jax.vmap(of_tower, axis_name=TOWER), jnp.arange(config.towers))


def init(config: ConfigDict, classes: int, image_shape: tuple[int, int, int], seed: int) -> dict:
    """Initial parameters, NumPy arrays, each with a leading axis of ``config.towers`` (paper, section 5).

    A parameter's values depend on the seed, its tower, its layer's name and its shape only: nets that share a
    layer start from the same weights there, on any device. Nothing has to be compiled for it.

    Arguments and errors are those of ``shapes``.
    """
    draw = DISTRIBUTIONS[config.init]

    def layer_of_tower(name: str, layer: ConfigDict, tower: int, shape: dict) -> dict[str, np.ndarray]:
        generator = np.random.default_rng((seed, tower, zlib.crc32(name.encode())))
        kernel = layer.weight_std * draw(generator, shape["kernel"].shape[1:])
        bias = layer.bias + layer.bias_std * draw(generator, shape["bias"].shape[1:])
        return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}

    params = {}
    for name, shape in shapes(config, classes, image_shape).items():
        towers = [layer_of_tower(name, config.layers[name], tower, shape) for tower in range(config.towers)]
        params[name] = jax.tree.map(lambda *each: np.stack(each), *towers)
    return params


def count_parameters(params: dict) -> int:
    """Number of parameters of all towers together."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
