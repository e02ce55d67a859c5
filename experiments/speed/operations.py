"""Time each operation of a training step: python experiments/speed/operations.py NETWORK BATCH [--executor=auto]

Times each operation of a network alone, on all devices at once, and the whole step. Writes
operations_NETWORK_BATCH.csv beside the script and prints it. Bytes are those of an operation's operands and results on
all devices. --without=conv leaves out one of the CPU kernels, --without=kernels all of them; the name of the file then
ends in no_conv or no_kernels.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from baselines import NETWORKS, load_config, noise, ours, placeholder_dataset
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax import layers, model, optim, parallel, train
from alexnet_jax.data import augment, loader
from alexnet_jax.data.datasets import Source
from alexnet_jax.parallel import DATA, TOWER, Executor
from alexnet_jax.tools import summary

Operation = tuple[str, str, str, Callable, tuple[Any, ...]]  # layer, operation, what of it, function, arguments


class Part(model.AlexNet):
    """One operation of a network."""

    @nn.compact
    def __call__(self, name: str, part: str, x: jax.Array) -> jax.Array:
        """Return the result of an operation on one tower."""
        match part:
            case "gather":
                return self._gather(name, x)
            case "weights":
                return self._weights(name, x)
            case _:
                return self._operation(name, part, x, True)


def network_operations(network: Part, params: Any, images: Any, executor: Executor) -> Iterator[Operation]:
    """Yield the operations from the images to the logits, and their gradients."""

    def mapped(function: Callable, arguments: int) -> Callable:
        return executor.map(function, in_axes=(TOWER,) * arguments, out_axes=TOWER)

    x = images
    for name in network.config.order:
        layer, is_first = network.config.layers[name], name == network.config.order[0]
        variables = {"params": {name: params[name]}}
        gather = ["gather"] if layer.sees == "all" and executor.towers > 1 else []
        for part in [*gather, "weights", *layer.then]:

            def forward(variables: Any, x: jax.Array, name: str = name, part: str = part) -> jax.Array:
                return network.apply(variables, name, part, x, rngs={"dropout": jax.random.key(0)})

            def input_gradient(variables: Any, x: jax.Array, gradient: jax.Array, forward: Callable = forward) -> Any:
                return jax.vjp(partial(forward, variables), x)[1](gradient)[0]

            def weight_gradient(variables: Any, x: jax.Array, gradient: jax.Array, forward: Callable = forward) -> Any:
                return jax.vjp(lambda variables: forward(variables, x), variables)[1](gradient)[0]

            run = mapped(forward, 2)
            y = run(variables, x)
            yield name, part, "forward", run, (variables, x)
            if not (is_first and part == "weights"):
                yield name, part, "input gradient", mapped(input_gradient, 3), (variables, x, y)
            if part == "weights":
                yield name, part, "weight gradient", mapped(weight_gradient, 3), (variables, x, y)
            x = y


def other_operations(setup: train.Setup, network: str, state: train.State) -> Iterator[Operation]:
    """Yield the operations of a step before and after the network."""
    config, executor = setup.config, setup.executor
    _, dataset_statistics = placeholder_dataset(config, network)
    images, _ = noise(config, network, config.data.image_size)

    def inputs(_: Any, images: jax.Array) -> jax.Array:
        positions = parallel.global_positions(len(images))
        return augment.random_inputs(images, positions, config.data, dataset_statistics, jax.random.key(0))

    def all_reduce(params: Any) -> Any:
        return lax.psum(params, DATA)

    def update(params: Any, opt_state: Any, gradients: Any) -> Any:
        optimizer = optim.make_optimizer(config.optim, config.model.layers, setup.steps_per_epoch, setup.steps)
        return optimizer.update(gradients, opt_state, params, peak=optim.peak_learning_rate(config.optim))

    mapped = partial(executor.map, out_axes=TOWER)
    yield "", "augmentation", "forward", mapped(inputs, in_axes=(TOWER, DATA)), (state.sums, images)
    if executor.shards > 1:
        yield "", "gradients", "sum over devices", mapped(all_reduce, in_axes=(TOWER,)), (state.params,)
    updated = mapped(update, in_axes=(TOWER,) * 3)
    yield "", "update", "all layers", updated, (state.params, state.opt_state, state.params)


def median_seconds(function: Callable, arguments: tuple[Any, ...], repetitions: int) -> float:
    """Return the median time of a call, measured over as many calls in a row as take 20 ms."""
    jax.block_until_ready(function(*arguments))
    calls, seconds = 1, []
    while len(seconds) < repetitions:
        began = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(function(*arguments))
        passed = time.perf_counter() - began
        if passed < 0.02 and not seconds:
            calls *= 2
        else:
            seconds.append(passed / calls)
    return statistics.median(seconds)


class JpegNoise:
    """1,000 examples with the same JPEG of noise."""

    channels = 3

    def __init__(self, size: int):
        generator, file = np.random.default_rng(0), io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (size, size, 3)).astype(np.uint8)).save(file, "JPEG")
        self._jpeg = file.getvalue()

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"image": self._jpeg, "label": 0}


def data_wait(config: ConfigDict, step: float, repetitions: int) -> float:
    """Return the median seconds that a run waits for a batch, if a step takes `step` seconds."""
    source: Source = JpegNoise(config.data.image_size)
    batches, waits = loader.train_batches(source, config, seed=0, start=0, stop=repetitions + 3), []
    for _ in range(repetitions + 3):
        time.sleep(step)  # a real step leaves the decoding threads less of the CPU
        began = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - began)
    return statistics.median(waits[3:])


def totals(table: pd.DataFrame) -> pd.DataFrame:
    """Return the milliseconds of each kind of operation, summed over layers, and their share of the step."""
    kind = table["operation"].where(table["operation"] != "weights", "weights, " + table["what"])
    return table.groupby(kind, sort=False)[["milliseconds", "share of step"]].sum()


def measure(arguments: argparse.Namespace) -> pd.DataFrame:
    """Return a row for each operation."""
    config = load_config(arguments.network, arguments.batch)
    dataset, _ = placeholder_dataset(config, arguments.network)
    executor = parallel.make_executor(arguments.executor, config.model.towers, arguments.batch)
    setup = train.Setup(config, dataset, executor)
    state = executor.place(train.init_state(setup))
    side = config.data.crop
    shape = (config.model.towers, arguments.batch // executor.shards, side, side, 3)
    images = executor.place(np.random.default_rng(0).standard_normal(shape, np.float32))
    sizes = {row.name: row for row in summary.rows(config.model, dataset.classes, (side, side, 3))}
    rows = []

    def add(layer: str, operation: str, what: str, function: Callable, inputs: tuple[Any, ...]) -> float:
        seconds = median_seconds(function, inputs, arguments.repetitions)
        row = {"layer": layer, "operation": operation, "what": what, "milliseconds": round(1000 * seconds, 3)}
        if layer:
            arrays = jax.tree.leaves((inputs, function(*inputs)))
            row["megabytes"] = round(executor.shards * sum(array.nbytes for array in arrays) / 1e6, 3)
        if operation == "weights":
            row["GFLOP/s"] = round(2 * sizes[layer].multiply_adds * arguments.batch / seconds / 1e9, 2)
        rows.append(row)
        return seconds

    for operation in network_operations(Part(config.model, dataset.classes), state.params, images, executor):
        add(*operation)
    for operation in other_operations(setup, arguments.network, state):
        add(*operation)
    variant = f"-no_{arguments.without}" if arguments.without else ""
    step = ours(arguments.network, "train", arguments.batch, f"ours-{arguments.executor}{variant}")
    seconds = add("", "step", "all", step, ())
    wait = data_wait(config, seconds, arguments.repetitions)
    rows.append({"layer": "", "operation": "data", "what": "wait", "milliseconds": round(1000 * wait, 3)})
    table = pd.DataFrame(rows)
    table["share of step"] = (table["milliseconds"] / 1000 / seconds).round(4)
    return table


def main() -> None:
    """Measure, write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("batch", type=int)
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--without", choices=("kernels", *layers.KERNELS), help="CPU kernels to leave out")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where to write the CSV file")
    arguments = parser.parse_args()
    parallel.ensure_host_devices(2)
    without = arguments.without
    kernels = [kernel for kernel in layers.KERNELS if without not in (kernel, "kernels")]
    with layers.kernels(*kernels):
        table = measure(arguments)
    name = f"operations_{arguments.network}_{arguments.batch}" + (f"_no_{without}" if without else "")
    table.to_csv(arguments.folder / f"{name}.csv", index=False)
    print(table.to_string(index=False, na_rep=""))
    print(totals(table).round(4).to_string())


if __name__ == "__main__":
    main()
