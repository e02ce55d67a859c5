"""An AlexNet on one device in the Keras API, written from the paper: grouped convolutions, LRN within the groups."""

import os

os.environ["KERAS_BACKEND"] = "jax"

from typing import Any

import jax
import keras
import numpy as np
from keras import layers, ops
from ml_collections import ConfigDict

GROUPS = 2


class GroupedLRN(layers.Layer):
    """Local response normalisation of section 3.3, over the channels of each group."""

    def __init__(self, n: int, k: float, alpha: float, beta: float) -> None:
        super().__init__()
        self.n, self.k, self.alpha, self.beta = n, k, alpha, beta

    def call(self, x: Any) -> Any:
        shape = ops.shape(x)
        grouped = ops.reshape(x, (*shape[:-1], GROUPS, shape[-1] // GROUPS))
        padded = ops.pad(ops.square(grouped), [(0, 0)] * 4 + [(self.n // 2, (self.n - 1) // 2)])
        squares = sum(padded[..., i : i + grouped.shape[-1]] for i in range(self.n))
        return ops.reshape(grouped / (self.k + self.alpha * squares) ** self.beta, shape)


def build(config: ConfigDict, image_shape: tuple[int, int, int], classes: int) -> keras.Model:
    """Return the network of section 3.5 with the widths, kernels and constants of a config, without dropout."""
    model = config.model
    lrn = (model.lrn.n, model.lrn.k, model.lrn.alpha, model.lrn.beta)

    def conv(x: Any, name: str, groups: int) -> Any:
        layer = model.layers[name]
        x = layers.ZeroPadding2D((layer.padding, layer.padding))(x)
        return layers.Conv2D(
            layer.features, layer.kernel, strides=layer.stride, groups=groups, activation="relu", name=name
        )(x)

    def pool(x: Any) -> Any:
        return layers.MaxPool2D(model.pool.window, model.pool.stride)(x)

    image = keras.Input(image_shape)
    x = pool(GroupedLRN(*lrn)(conv(image, "conv1", groups=1)))
    x = pool(GroupedLRN(*lrn)(conv(x, "conv2", groups=GROUPS)))
    x = conv(x, "conv3", groups=1)
    x = conv(x, "conv4", groups=GROUPS)
    x = pool(conv(x, "conv5", groups=GROUPS))
    x = layers.Flatten()(x)
    x = layers.Dense(model.layers.fc6.features, activation="relu", name="fc6")(x)
    x = layers.Dense(model.layers.fc7.features, activation="relu", name="fc7")(x)
    return keras.Model(image, layers.Dense(classes, name="fc8")(x))


def build_tutorial(fc6: int, fc7: int) -> keras.Model:
    """Return the network of the Keras tutorial, with the given dense layers."""
    image = keras.Input((224, 224, 3))
    x = layers.ZeroPadding2D(((1, 2), (1, 2)))(image)
    x = layers.Conv2D(48, 11, strides=4, activation="relu", name="conv1")(x)
    x = layers.MaxPool2D(3, 2)(x)
    x = layers.Conv2D(128, 5, padding="same", activation="relu", name="conv2")(x)
    x = layers.MaxPool2D(3, 2)(x)
    x = layers.Conv2D(192, 3, padding="same", activation="relu", name="conv3")(x)
    x = layers.Conv2D(192, 3, padding="same", activation="relu", name="conv4")(x)
    x = layers.Conv2D(128, 3, padding="same", activation="relu", name="conv5")(x)
    x = layers.Flatten()(layers.MaxPool2D(3, 2)(x))
    x = layers.Dense(fc6, activation="relu", name="fc6")(layers.Dropout(0.2)(x))
    x = layers.Dense(fc7, activation="relu", name="fc7")(layers.Dropout(0.2)(x))
    return keras.Model(image, layers.Dense(1000, name="fc8")(x))


def untower(array: Any) -> np.ndarray:
    """Return a parameter with a leading tower axis in the grouped layout: the towers' features side by side."""
    return np.concatenate(list(np.asarray(array)), axis=-1)


def set_weights(net: keras.Model, params: dict[str, Any]) -> None:
    """Copy parameters with a leading tower axis."""
    for name, parameters in params.items():
        net.get_layer(name).set_weights([untower(parameters["kernel"]), untower(parameters["bias"])])


def logits_loss_and_gradients(
    net: keras.Model, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, float, dict[str, list[np.ndarray]]]:
    """Return logits, the mean cross-entropy and its gradients: {layer: [kernel, bias]}."""

    def loss(variables: list[Any]) -> tuple[Any, Any]:
        logits, _ = net.stateless_call(variables, [state.value for state in net.non_trainable_variables], images)
        return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True).mean(), logits

    variables = [variable.value for variable in net.trainable_variables]
    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    by_layer: dict[str, list[np.ndarray]] = {}
    for variable, gradient in zip(net.trainable_variables, gradients, strict=True):
        by_layer.setdefault(variable.path.split("/")[0], []).append(np.asarray(gradient))
    return logits, float(value), by_layer
