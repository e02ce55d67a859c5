"""One contestant of measure.py, in a process of its own: contestants.py KIND WHAT NET BATCH STEPS

Says "ready" when it has compiled; then, for each line it is given, does STEPS steps and says how many seconds they
took; at the end of the lines, what memory it had at most, in bytes.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["KERAS_BACKEND"] = "jax"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import towers
from alexnet_jax.config import reference_run

NETS = {
    "paper": "configs.nets.paper",
    "seed_v1": "configs.nets.seed_v1",
    "cifar": "configs.nets.cifar_80sec",
    "small": "configs.base:cifar10",
    "embedded": "configs.base:embedded",
}


def config_of(net: str, batch: int) -> ConfigDict:
    """The config of a net's run; after a "*", by how much its layers are wider."""
    net, _, width = net.partition("*")
    module, _, scale = NETS[net].partition(":")
    config = reference_run(import_module(module).get_config(*([scale] if scale else [])))
    config.train.batch_size = batch
    for layer in config.model.layers.values():
        if width and layer.features:
            layer.features = round(float(width) * layer.features)
    return config


def classes_of(net: str) -> int:
    """How many classes the images of a net have."""
    return 10 if net in ("cifar", "small", "embedded") else 1000


def images_and_labels(config: ConfigDict, net: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise: uint8 (batch, side, side, 3), and classes."""
    generator = np.random.default_rng(0)
    batch = config.train.batch_size
    images = generator.integers(0, 256, (batch, side, side, 3)).astype(np.uint8)
    return images, generator.integers(0, classes_of(net), batch).astype(np.int32)


def no_data(config: ConfigDict, net: str) -> tuple[Any, Any]:
    """What a step has to know of a data set and its pixels, for images that it is given."""
    from alexnet_jax.data import DataSet
    from alexnet_jax.pixels import Pixels

    mean = np.full((config.data.image_size, config.data.image_size, 3), 120, np.float32)
    pixels = Pixels(mean, np.full(3, 30, np.float32), np.eye(3, dtype=np.float32))
    return DataSet([None] * 10_000, None, [], range(classes_of(net)), 3), pixels


def leave_out(form: str) -> None:
    """Has an operation run on CPUs as XLA makes it: "conv", "normalise", "max_pool", "avg_pool", or all: "plain"."""
    from alexnet_jax import layers

    fast = layers._with_cpu_form

    def with_cpu_form(plain: Callable, **forms: Callable) -> Callable:
        return plain if form == "plain" or form in plain.__qualname__ else fast(plain, **forms)

    layers._with_cpu_form = with_cpu_form


def ours(net: str, what: str, batch: int, kind: str) -> Callable[[], Any]:
    """A step, or an evaluation, of this repository; crops, flips and colours included.

    ``kind`` names the executor, and after a dash what is left out: "grouped" lets XLA make grouped convolutions of
    mapped ones, "concurrent" lets it run several operations of a device at a time where it would not, "in_turn" the
    other way round, the others are those of ``leave_out``.
    """
    towers.ensure_host_devices(2)
    import jax

    from alexnet_jax import evaluate, layers, train

    executor_name, _, without = kind.removeprefix("ours-").partition("-")
    if without == "grouped":
        layers._one_by_one = lambda function: function
    elif without in ("concurrent", "in_turn"):
        options = {"shard_map": towers._CPU_COMPILER_OPTIONS["pmap"]}
        towers._CPU_COMPILER_OPTIONS = options if without == "in_turn" else {}
    elif without:
        leave_out(without)
    config = config_of(net, batch)
    config.eval.views = 10 if what == "ten_views" else 1
    dataset, pixels = no_data(config, net)
    executor = towers.Executor(executor_name, config.model.towers)
    images, labels = images_and_labels(config, net, config.data.image_size)
    state = executor.place(train.init_state(config, dataset))
    if what != "train":
        predict = evaluate.predictor(config, dataset.classes, pixels, executor)
        return lambda: jax.block_until_ready(predict(state.params, images))
    step = train.train_step(config, dataset, pixels, executor)
    number = 0

    def one() -> None:
        nonlocal state, number
        number += 1
        batch = {"image": images, "label": labels}
        state = jax.block_until_ready(step(state, batch, np.uint32(0), np.int32(number), np.int32(0)))

    return one


def pytorch(net: str, what: str, batch: int, kind: str) -> Callable[[], Any]:
    """The same net in PyTorch, on ready float images: "contiguous", "channels_last" or "compile"."""
    import torch
    from torch import nn

    config = config_of(net, batch)
    side = config.data.crop
    parts: list[nn.Module] = []
    channels, dropout, pool, lrn = 3, config.model.dropout.rate, config.model.pool, config.model.lrn
    for number, name in enumerate(config.model.order):
        layer = config.model.layers[name]
        features = layer.features or classes_of(net)
        if layer.kind == "dense":
            flat = any(isinstance(part, nn.Linear) for part in parts)
            parts += [] if flat else [nn.Flatten()]
            parts.append(nn.LazyLinear(features))
        else:
            groups = 1 if number == 0 or layer.crosses else config.model.towers
            before, after = layer.padding
            if before != after:
                parts.append(nn.ZeroPad2d((before, after, before, after)))
            padding = before if before == after else 0
            parts.append(nn.Conv2d(channels, features, layer.kernel, layer.stride, padding, groups=groups))
        channels = features
        for operation in layer.then:
            parts.append(
                {
                    "activation": nn.ReLU,
                    "lrn": partial(nn.LocalResponseNorm, lrn.n, lrn.n * lrn.alpha, lrn.beta, lrn.k),
                    "max_pool": partial(nn.MaxPool2d, pool.window, pool.stride, ceil_mode=pool.ceil),
                    "avg_pool": partial(
                        nn.AvgPool2d, pool.window, pool.stride, ceil_mode=pool.ceil, count_include_pad=False
                    ),
                    "dropout": partial(nn.Dropout, dropout),
                }[operation]()
            )
    model: Any = nn.Sequential(*parts)
    images, labels = images_and_labels(config, net, side)
    x = torch.tensor(images).permute(0, 3, 1, 2).float().contiguous() / 128 - 1
    y = torch.tensor(labels).long()
    model(x[:1])
    if kind != "pytorch-contiguous":
        model, x = (thing.to(memory_format=torch.channels_last) for thing in (model, x))
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    forward = torch.compile(model) if kind == "pytorch-compile" else model

    def train() -> None:
        optimiser.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(forward(x), y).backward()
        optimiser.step()

    def evaluate() -> None:
        model.eval()
        with torch.inference_mode():
            for _ in range(10 if what == "ten_views" else 1):
                forward(x).softmax(1)

    return train if what == "train" else evaluate


def plain_flax(net: str, what: str, batch: int, kind: str) -> Callable[[], Any]:
    """The paper's net as a Flax tutorial would have it, on one device and ready float images."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn
    from jax import lax

    def lrn(x: jax.Array) -> jax.Array:
        squares = lax.reduce_window(x * x, 0.0, lax.add, (1, 1, 1, 5), (1, 1, 1, 1), [(0, 0)] * 3 + [(2, 2)])
        return x / (2 + 1e-4 * squares) ** 0.75

    class AlexNet(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            pool = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
            x = pool(lrn(nn.relu(nn.Conv(96, (11, 11), 4, padding=((0, 3), (0, 3)))(x))))
            x = pool(lrn(nn.relu(nn.Conv(256, (5, 5), padding=2, feature_group_count=2)(x))))
            x = nn.relu(nn.Conv(384, (3, 3))(x))
            x = nn.relu(nn.Conv(384, (3, 3), feature_group_count=2)(x))
            x = pool(nn.relu(nn.Conv(256, (3, 3), feature_group_count=2)(x)))
            x = x.reshape(len(x), -1)
            for _ in range(2):
                x = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(4096)(x)))
            return nn.Dense(1000)(x)

    config = config_of(net, batch)
    images, labels = images_and_labels(config, net, config.data.crop)
    x, labels = jnp.array(images / np.float32(128) - 1), jnp.array(labels)
    model, rule = AlexNet(), optax.sgd(0.01, momentum=0.9)
    params = jax.jit(model.init)({"params": jax.random.key(0), "dropout": jax.random.key(0)}, x[:1])
    state = rule.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, key: jax.Array, x: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = model.apply(params, x, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        gradients = jax.grad(loss)(params)
        gradients = jax.tree.map(lambda g, p: g + 5e-4 * p, gradients, params)
        updates, state = rule.update(gradients, state)
        return optax.apply_updates(params, updates), state

    number = 0

    def one() -> None:
        nonlocal params, state, number
        number += 1
        params, state = jax.block_until_ready(step(params, state, jax.random.key(number), x, labels))

    return one


def keras_seed(net: str, what: str, batch: int, kind: str) -> Callable[[], Any]:
    """The seed's first net as it has it, by ``fit`` on images in memory: one epoch of STEPS steps."""
    import keras
    from keras import layers

    image = layers.Input((224, 224, 3))
    x = layers.ZeroPadding2D(((1, 2), (1, 2)))(image)
    x = layers.MaxPool2D(3, 2)(layers.Conv2D(48, 11, strides=4, activation="relu")(x))
    x = layers.MaxPool2D(3, 2)(layers.Conv2D(128, 5, padding="same", activation="relu")(x))
    for features in (192, 192, 128):
        x = layers.Conv2D(features, 3, padding="same", activation="relu")(x)
    x = layers.Flatten()(layers.MaxPool2D(3, 2)(x))
    for _ in range(2):
        x = layers.Dense(2048, activation="relu")(layers.Dropout(0.2)(x))
    model = keras.Model(image, layers.Softmax()(layers.Dense(1000)(x)))
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy")
    config = config_of(net, batch)
    images, labels = images_and_labels(config, net, 224)
    steps = int(sys.argv[5])
    images, labels = (np.concatenate([array] * steps) for array in (images / np.float32(128) - 1, labels))
    return lambda: model.fit(images, labels, batch_size=batch, epochs=1, verbose=0)


def matmul(net: str, what: str, batch: int, kind: str) -> Callable[[], Any]:
    """A product of two float32 matrices of 4,096 x 4,096: 137.4 GFLOP on all cores."""
    import jax
    import jax.numpy as jnp

    square = jnp.ones((4096, 4096))
    product = jax.jit(jnp.matmul)
    return lambda: product(square, square).block_until_ready()


def startup() -> None:
    """From the import of the command to the first finished step of the embedded job."""
    towers.ensure_host_devices(2)
    from alexnet_jax import batches, main, pixels, train

    main._keep_compiled()
    config = config_of("embedded", 8)
    dataset, executor = train.prepare(config)
    seen = pixels.measured(dataset, config.data)
    state = executor.place(train.init_state(config, dataset))
    step = train.train_step(config, dataset, seen, executor)
    batch = next(batches.train_batches(dataset.train, config, seed=0, start=0, stop=1))
    import jax

    jax.block_until_ready(step(state, batch, np.uint32(0), np.int32(1), np.int32(0)))
    print("ready", flush=True)


def main() -> None:
    """Builds the contestant of the command line and lets it run as it is told."""
    kind, what, net, batch, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    builders = {"ours": ours, "pytorch": pytorch, "flax": plain_flax, "keras": keras_seed, "matmul": matmul}
    one = builders[kind.split("-")[0]](net, what, batch, kind)
    calls = 1 if kind == "keras" else steps
    one()
    one()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(calls):
            one()
        print(time.perf_counter() - began, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


if __name__ == "__main__":
    startup() if sys.argv[1] == "startup" else main()
