"""One implementation to benchmark, in a process of its own: baselines.py KIND WHAT NETWORK BATCH STEPS

Prints "ready" once it has compiled. For each line on standard input it runs STEPS steps and prints the seconds they
took, and the CPU seconds, user and system. At the end of the input it prints the peak memory of the process in bytes.
measure.py starts it. Only what KIND needs is imported, because that memory counts.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import optim, parallel
from alexnet_jax.config import reference_run

if TYPE_CHECKING:
    from alexnet_jax.data.datasets import Dataset
    from alexnet_jax.data.statistics import Statistics

NETWORKS = {
    "paper": "networks.paper",
    "one_weird_trick": "networks.one_weird_trick",
    "torchvision": "networks.torchvision",
    "keras_tutorial_v1": "networks.keras_tutorial_v1",
    "cifar": "networks.cifar_80sec",
    "small": "base:cifar10",
    "embedded": "base:embedded",
}


def load_config(network: str, batch: int) -> ConfigDict:
    """Return the config of a run; "paper*0.5" is the paper's network with half the features in each layer."""
    network, _, width = network.partition("*")
    module, _, scale = NETWORKS[network].partition(":")
    study = import_module(f"alexnet_jax.configs.{module}").get_config(*([scale] if scale else []))
    config = reference_run(study)
    config.train.batch_size = batch
    for layer in config.model.layers.values():
        if width and layer.features:
            layer.features = round(float(width) * layer.features)
    return config


def count_classes(network: str) -> int:
    """Return the number of classes of a network's dataset."""
    return 10 if network in ("cifar", "small", "embedded") else 1000


def noise(config: ConfigDict, network: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch of random images, uint8 (batch, side, side, 3), and labels."""
    generator = np.random.default_rng(0)
    batch = config.train.batch_size
    images = generator.integers(0, 256, (batch, side, side, 3)).astype(np.uint8)
    return images, generator.integers(0, count_classes(network), batch).astype(np.int32)


def placeholder_dataset(config: ConfigDict, network: str) -> "tuple[Dataset, Statistics]":
    """Return a dataset of the right sizes, whose images are not read, and its statistics."""
    from alexnet_jax.data.datasets import Arrays, Dataset
    from alexnet_jax.data.statistics import Statistics

    size = config.data.image_size
    source = Arrays(np.broadcast_to(np.uint8(0), (10_000, size, size, 3)), np.zeros(10_000, int))
    mean = np.full((size, size, 3), 120, np.float32)
    statistics = Statistics(mean, np.full(3, 30, np.float32), np.eye(3, dtype=np.float32))
    return Dataset(source, None, source, [str(label) for label in range(count_classes(network))], 3), statistics


def ours(network: str, what: str, batch: int, kind: str) -> Callable[[], Any]:
    """Return a step, or an evaluation, of this repository; it includes crops, flips and colour noise.

    Args:
      network: A key of `NETWORKS`.
      what: "train", "evaluate" or "ten_views".
      batch: Images.
      kind: "ours-EXECUTOR", or "ours-EXECUTOR-VARIANT". Variants: "no_KERNEL" without one of the CPU kernels,
        "no_kernels" without all of them, "grouped" with vmapped convolutions as grouped ones, "concurrent" and
        "sequential" to let XLA run several operations of a device at a time or not.
    """
    parallel.ensure_host_devices(2)
    import jax

    from alexnet_jax import evaluate, layers, train

    executor_name, _, variant = kind.removeprefix("ours-").partition("-")
    kernels = [name for name in layers.KERNELS if variant not in (f"no_{name}", "no_kernels")]
    if variant == "grouped":
        layers.unrolled_vmap = lambda function: function
    elif variant == "concurrent":
        parallel.CPU_COMPILER_OPTIONS.clear()
    elif variant == "sequential":
        parallel.CPU_COMPILER_OPTIONS["shard_map"] = parallel.CPU_COMPILER_OPTIONS["pmap"]
    config = load_config(network, batch)
    config.eval.views = 10 if what == "ten_views" else 1
    dataset, statistics = placeholder_dataset(config, network)
    executor = parallel.make_executor(executor_name, config.model.towers, batch)
    setup = train.Setup(config, dataset, executor)
    images, labels = noise(config, network, config.data.image_size)
    state, replicated = executor.place(train.init_state(setup)), executor.replicate(statistics)
    if what != "train":
        predict = evaluate.make_predictor(config, dataset.classes, executor)

        def predict_batch() -> None:
            with layers.kernels(*kernels):  # it matters in the first call, which compiles
                jax.block_until_ready(predict(state.variables, replicated, images))

        return predict_batch
    step = train.make_train_step(setup)
    number, peak = 0, optim.peak_learning_rate(config.optim)

    def train_step() -> None:
        nonlocal state, number
        number += 1
        batch = {"image": images, "label": labels}
        with layers.kernels(*kernels):
            state = step(state, batch, replicated, np.uint32(0), np.int32(number), peak)
        jax.block_until_ready(state)

    return train_step


def pytorch_network(config: ConfigDict, classes: int) -> Any:
    """Return a run's network as a `torch.nn.Sequential` on the CPU; its towers are groups."""
    from torch import nn

    model, pool, lrn = config.model, config.model.pool, config.model.lrn
    normalise = partial(nn.LocalResponseNorm, lrn.n, lrn.n * lrn.alpha, lrn.beta, lrn.k)  # it divides alpha by n
    operations: dict[str, Callable[[], Any]] = {
        "activation": {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}[model.activation],
        "lrn": normalise if lrn.enabled else nn.Identity,
        "max_pool": partial(nn.MaxPool2d, pool.window, pool.stride, ceil_mode=pool.ceil),
        "avg_pool": partial(nn.AvgPool2d, pool.window, pool.stride, ceil_mode=pool.ceil, count_include_pad=False),
        "dropout": partial(nn.Dropout, model.dropout.rate),
    }
    parts: list[Any] = []
    channels, is_flat = 3, False
    for number, name in enumerate(model.order):
        layer = model.layers[name]
        features = classes if layer.features is None else layer.features
        if layer.kind == "dense":
            parts += [] if is_flat else [nn.Flatten()]
            parts.append(nn.LazyLinear(features))
            is_flat = True
        else:
            before, after = layer.padding
            if before != after:
                parts.append(nn.ZeroPad2d((before, after, before, after)))
            padding = before if before == after else 0
            groups = 1 if number == 0 or layer.sees == "all" else model.towers
            parts.append(nn.Conv2d(channels, features, layer.kernel, layer.stride, padding, groups=groups))
        channels = features
        parts += [operations[operation]() for operation in layer.then]
    return nn.Sequential(*parts)


def pytorch(network: str, what: str, batch: int, kind: str) -> Callable[[], Any]:
    """Return the same network in PyTorch, on float images: kind "pytorch-" contiguous, channels_last or compile."""
    import torch
    from torch import nn

    config = load_config(network, batch)
    model = pytorch_network(config, count_classes(network))
    images, labels = noise(config, network, config.data.crop)
    x = torch.tensor(images).permute(0, 3, 1, 2).float().contiguous() / 128 - 1
    y = torch.tensor(labels).long()
    model(x[:1])
    if kind != "pytorch-contiguous":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
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


def plain_flax(network: str, what: str, batch: int, kind: str) -> Callable[[], Any]:
    """Return a step of the paper's network as a Flax tutorial would write it: one device, float images."""
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

    config = load_config(network, batch)
    images, labels = noise(config, network, config.data.crop)
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

    def train_step() -> None:
        nonlocal params, state, number
        number += 1
        params, state = jax.block_until_ready(step(params, state, jax.random.key(number), x, labels))

    return train_step


def keras_tutorial(network: str, what: str, batch: int, kind: str) -> Callable[[], Any]:
    """Return an epoch of STEPS steps of the Keras tutorial's network: `fit` on float images in memory."""
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
    config = load_config(network, batch)
    images, labels = noise(config, network, 224)
    steps = int(sys.argv[5])
    images, labels = (np.concatenate([array] * steps) for array in (images / np.float32(128) - 1, labels))
    return lambda: model.fit(images, labels, batch_size=batch, epochs=1, verbose=0)


def matmul(network: str, what: str, batch: int, kind: str) -> Callable[[], Any]:
    """Return a product of two float32 matrices of 4,096 x 4,096 (137.4 GFLOP), on all cores."""
    import jax
    import jax.numpy as jnp

    square = jnp.ones((4096, 4096))
    product = jax.jit(jnp.matmul)
    return lambda: product(square, square).block_until_ready()


def startup() -> None:
    """Run from the import of the command to the end of the first step of the embedded job."""
    import_module("alexnet_jax.studies.runner")  # imports all that the command does
    parallel.initialize(2)
    import jax

    from alexnet_jax import train
    from alexnet_jax.data import loader, statistics

    config = load_config("embedded", 8)
    setup = train.open_run(config)
    measured = setup.executor.replicate(statistics.measure(setup.dataset, config.data))
    state = setup.executor.place(train.init_state(setup))
    batch = next(loader.train_batches(setup.dataset.train, config, seed=0, start=0, stop=1))
    step = train.make_train_step(setup)
    jax.block_until_ready(
        step(state, batch, measured, np.uint32(0), np.int32(1), optim.peak_learning_rate(config.optim))
    )
    print("ready", flush=True)


def main() -> None:
    """Build the baseline of the command line and run it as often as standard input has lines."""
    kind, what, network, batch, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    builders = {"ours": ours, "pytorch": pytorch, "flax": plain_flax, "keras": keras_tutorial, "matmul": matmul}
    run = builders[kind.split("-")[0]](network, what, batch, kind)
    calls = 1 if kind == "keras" else steps
    run()
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(calls):
            run()
        print(time.perf_counter() - began, time.process_time() - cpu_began, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


if __name__ == "__main__":
    startup() if sys.argv[1] == "startup" else main()
