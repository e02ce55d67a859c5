"""Where a step's time goes: python experiments/speed/operations.py NET BATCH [--executor=auto] [--repetitions=7]

Times each operation of a net alone, on all devices at once, and the whole step. Writes operations_NET_BATCH.csv beside
it and prints it. Bytes are those of an operation's operands and results, of all devices. --without=plain leaves out the
forms for CPUs, --without=max_pool one of them; the file's name ends in it, too.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from alexnet_jax import huge_pages

if __name__ == "__main__":
    huge_pages.restart_with(sys.argv[0])  # as the training command does

import numpy as np
import pandas as pd
from contestants import NETS, config_of, images_and_labels, leave_out, no_data, ours
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax import augment, batches, optim, summary, towers, train

towers.ensure_host_devices(2)  # before JAX is used

import jax
from flax import linen as nn
from jax import lax

from alexnet_jax import model

Operation = tuple[str, str, str, Callable, tuple[Any, ...]]


class Part(model.AlexNet):
    """One operation of a net."""

    @nn.compact
    def __call__(self, name: str, part: str, x: jax.Array) -> jax.Array:
        """What a tower has after it."""
        match part:
            case "gather":
                return self._gather(name, x)
            case "weights":
                return self._weights(name, x)
            case _:
                return self._operation(name, part, x, True)


def of_net(net: Part, params: Any, images: Any, executor: towers.Executor) -> Iterator[Operation]:
    """(layer, operation, what of it, function, arguments) of everything between images and logits."""
    x = images
    for name in net.config.order:
        layer, first = net.config.layers[name], name == net.config.order[0]
        own = {"params": {name: params[name]}}
        gather = ["gather"] if layer.crosses and executor.towers > 1 else []
        for part in [*gather, "weights", *layer.then]:

            def forward(own: Any, x: jax.Array, name: str = name, part: str = part) -> jax.Array:
                return net.apply(own, name, part, x, rngs={"dropout": jax.random.key(0)})

            def of_input(own: Any, x: jax.Array, gradient: jax.Array, forward: Callable = forward) -> jax.Array:
                return jax.vjp(partial(forward, own), x)[1](gradient)[0]

            def of_weights(own: Any, x: jax.Array, gradient: jax.Array, forward: Callable = forward) -> Any:
                return jax.vjp(lambda own: forward(own, x), own)[1](gradient)[0]

            on_devices = partial(executor.map, in_axes=0, out_axes=0)
            mapped = on_devices(forward)
            y = mapped(own, x)
            yield name, part, "forward", mapped, (own, x)
            if not (first and part == "weights"):
                yield name, part, "input gradient", on_devices(of_input), (own, x, y)
            if part == "weights":
                yield name, part, "weight gradient", on_devices(of_weights), (own, x, y)
            x = y


def around_net(config: ConfigDict, net: str, state: train.State, executor: towers.Executor) -> Iterator[Operation]:
    """The same of what a step does before and after the net."""
    _, pixels = no_data(config, net)
    images, _ = images_and_labels(config, net, config.data.image_size)

    def inputs(_: Any, images: jax.Array) -> jax.Array:
        own = towers.own_rows(images)
        key = jax.random.key(0)
        return augment.random_inputs(own, towers.row_numbers(len(own)), config.data, pixels, key)

    def sum_up(params: Any) -> Any:
        return lax.psum(params, towers.DATA)

    def update(params: Any, velocities: Any, gradients: Any) -> Any:
        rates = optim.learning_rates(config.optim, config.model.layers, 0, 1.0, 0)
        return optim.sgd(config.optim, config.model.layers).update(gradients, velocities, params, rates=rates)

    on_devices = partial(executor.map, out_axes=0)
    yield "", "augmentation", "forward", on_devices(inputs, in_axes=(0, None)), (state.sums, images)
    if len(executor.devices) > executor.towers:
        yield "", "gradients", "sum over devices", on_devices(sum_up, in_axes=0), (state.params,)
    yield "", "update", "all layers", on_devices(update, in_axes=0), (state.params, state.opt_state, state.params)


def timed(function: Callable, arguments: tuple[Any, ...], repetitions: int) -> float:
    """Median of seconds, of turns of at least 20 ms."""
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


def data_wait(config: ConfigDict, step: float, repetitions: int) -> float:
    """Seconds that a step of so many waits for its batch, which is decoded from JPEGs of noise."""

    class Noise(list):
        channels = 3

    size, file = config.data.image_size, io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    source: Any = Noise([{"image": file.getvalue(), "label": 0}] * 1000)
    ready, waits = batches.train_batches(source, config, seed=0, start=0, stop=repetitions + 3), []
    for _ in range(repetitions + 3):
        time.sleep(step)  # devices are busy, which leaves threads of the CPU less than this does
        began = time.perf_counter()
        next(ready)
        waits.append(time.perf_counter() - began)
    return statistics.median(waits[3:])


def totals(table: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds of each kind of operation, of all layers, and their share of the step."""
    kind = table["operation"].where(table["operation"] != "weights", "weights, " + table["what"])
    return table.groupby(kind, sort=False)[["milliseconds", "of the step"]].sum()


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("net", choices=NETS)
    parser.add_argument("batch", type=int)
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--without", choices=("plain", "conv", "normalise", "max_pool", "avg_pool"))
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.without:
        leave_out(arguments.without)
    config = config_of(arguments.net, arguments.batch)
    executor = towers.Executor(arguments.executor, config.model.towers)
    side, shares = config.data.crop, max(1, len(executor.devices) // config.model.towers)
    dataset, _ = no_data(config, arguments.net)
    state = executor.place(train.init_state(config, dataset))
    shape = (config.model.towers, arguments.batch // shares, side, side, 3)
    images = executor.place(np.random.default_rng(0).standard_normal(shape, np.float32))
    layers = {row.name: row for row in summary.rows(config.model, dataset.classes, (side, side, 3))}
    rows = []

    def measure(operation: Operation) -> float:
        layer, name, what, function, given = operation
        seconds = timed(function, given, arguments.repetitions)
        row = {"layer": layer, "operation": name, "what": what, "milliseconds": round(1000 * seconds, 3)}
        if layer:
            arrays = jax.tree.leaves((given, function(*given)))
            row["megabytes"] = round(shares * sum(array.nbytes for array in arrays) / 1e6, 3)
        if name == "weights":
            row["GFLOP/s"] = round(2 * layers[layer].multiply_adds * arguments.batch / seconds / 1e9, 2)
        rows.append(row)
        return seconds

    for operation in of_net(Part(config.model, dataset.classes), state.params, images, executor):
        measure(operation)
    for operation in around_net(config, arguments.net, state, executor):
        measure(operation)
    whole = ours(arguments.net, "train", arguments.batch, f"ours-{arguments.executor}")
    step = measure(("", "step", "all", whole, ()))
    wait = data_wait(config, step, arguments.repetitions)
    rows.append({"layer": "", "operation": "data", "what": "wait", "milliseconds": round(1000 * wait, 3)})
    table = pd.DataFrame(rows)
    table["of the step"] = (table["milliseconds"] / 1000 / step).round(4)
    name = "_".join(filter(None, ("operations", arguments.net, str(arguments.batch), arguments.without)))
    table.to_csv(Path(__file__).parent / f"{name}.csv", index=False)
    print(table.to_string(index=False, na_rep=""))
    print(totals(table).round(4).to_string())


if __name__ == "__main__":
    main()
