"""AlexNet, written once: what one tower computes under the named axis ``"tower"``.

The towers are one function mapped over that axis, by whichever executor (``towers.py``), and see each other
only where a layer crosses: there the channels of all towers are gathered. The layers, in order, are data
(``configs/base.py``): a new AlexNet is a config, not a class.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict

from alexnet_jax import layers
from alexnet_jax.towers import AXIS

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh}
OPERATIONS = ("activation", "lrn", "max_pool", "dropout")


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

        Needs the axis ``"tower"``; in training also an rng named "dropout", which should differ between towers.

        Raises:
          ValueError: a kernel or a pooling window does not fit the map it meets.
        """
        x = images
        for name in self.config.order:
            layer = self.config.layers[name]
            if layer.crosses:
                x = _gather(x)
            x = self._weights(name, x)
            for operation in layer.then:
                x = self._operation(operation, x, train)
        return _gather(x)[:, : self.classes]

    def _weights(self, name: str, x: jax.Array) -> jax.Array:
        """The convolution or dense layer itself: this tower's share of its features."""
        layer = self.config.layers[name]
        features = self.classes if layer.features is None else layer.features
        share = -(-features // lax.axis_size(AXIS))  # rounded up: the head is padded, and cut after the gather
        kernel_init = nn.initializers.normal(layer.weight_std)
        bias_init = nn.initializers.constant(layer.bias)
        if layer.kind == "dense":
            dense = nn.Dense(share, kernel_init=kernel_init, bias_init=bias_init, name=name)
            return dense(x.reshape(x.shape[0], -1))
        size, (before, after) = x.shape[1], layer.padding
        if size + before + after < layer.kernel:
            raise ValueError(
                f"{name}: a kernel of {layer.kernel}x{layer.kernel} does not fit a map of {size}x{size} padded by "
                f"{before}+{after}: use larger images (data.crop), smaller strides or fewer poolings"
            )
        conv = nn.Conv(
            share,
            (layer.kernel, layer.kernel),
            strides=layer.stride,
            padding=((before, after), (before, after)),
            kernel_init=kernel_init,
            bias_init=bias_init,
            name=name,
        )
        return conv(x)

    def _operation(self, operation: str, x: jax.Array, train: bool) -> jax.Array:
        """One of the operations that may follow the weights; an operation that is switched off is the identity."""
        config = self.config
        match operation:
            case "activation":
                return ACTIVATIONS[config.activation](x)
            case "lrn":
                lrn = config.lrn
                return layers.lrn(x, n=lrn.n, k=lrn.k, alpha=lrn.alpha, beta=lrn.beta) if lrn.enabled else x
            case "max_pool":
                return layers.max_pool(x, window=config.pool.window, stride=config.pool.stride)
            case "dropout":
                # The paper's form (section 4.2): masked in training, times the kept share in testing.
                rate = config.dropout.rate
                return (1 - rate) * nn.Dropout(rate, deterministic=not train)(x)
            case _:
                raise ValueError(f"no such operation: {operation!r}")


def _gather(x: jax.Array) -> jax.Array:
    """The channels (last axis) of all towers, side by side, on every tower."""
    return lax.all_gather(x, AXIS, axis=x.ndim - 1, tiled=True)


def init(config: ConfigDict, classes: int, image_shape: tuple[int, int, int], key: jax.Array) -> dict:
    """Initial parameters, each with a leading axis of ``config.towers``.

    A parameter's values depend on the key, its tower, its layer's name and its shape only: nets that share a
    layer start from the same weights there.

    Args:
      image_shape: (height, width, channels) of what the net sees, that is after cropping.
    """
    model = AlexNet(config, classes)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def init_tower(tower: jax.Array) -> dict:
        return model.lazy_init(jax.random.fold_in(key, tower), images, train=False)["params"]

    return jax.vmap(init_tower, axis_name=AXIS)(jnp.arange(config.towers))


def count_parameters(params: dict) -> int:
    """Number of parameters of all towers together."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
