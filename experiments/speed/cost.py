"""Estimate what a training step costs each device: FLOPs, memory traffic, communication, and time by the roofline.

    python experiments/speed/cost.py --config=configs/networks/paper.py --devices=2 \
        [--flops=65e9 --bandwidth=10e9 --link=5e9]

The estimate follows from the shapes of the layers alone, in the layout "towers". It leaves out augmentation, the loss,
and copies within a device. The last three flags are the peak rates of one device (FLOP/s, and bytes/s of its memory and
of its link to the others); with them the table has times.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from alexnet_jax import config as config_lib
from alexnet_jax import layers
from alexnet_jax.tools import summary
from alexnet_jax.tools.summary import Row

FLOAT32 = 4  # bytes: parameters, gradients, optimiser state and logits are float32 whatever `model.dtype` is
OPTIMIZER_TRAFFIC = {"paper": 5, "sgd": 5, "adamw": 7}  # values read and written per parameter in an update


class Cost(NamedTuple):
    """The cost of one layer, and of the operations that follow it, in a training step on one device.

    Attributes:
      name: Name of the layer.
      forward: FLOPs, 2 per multiply-add, including those with the zeros of padding.
      input_gradient: FLOPs; 0 in the first layer, because images need no gradient.
      weight_gradient: FLOPs.
      moved: Bytes read from memory and written to it.
      sent: Bytes sent to other devices; as many are received.
    """

    name: str
    forward: int
    input_gradient: int
    weight_gradient: int
    moved: int
    sent: int

    @property
    def flops(self) -> int:
        """FLOPs of the three products."""
        return self.forward + self.input_gradient + self.weight_gradient


class Peak(NamedTuple):
    """Peak rates of one device per second: FLOPs, bytes from and to its memory, bytes sent to other devices."""

    flops: float
    bandwidth: float
    link: float


def step(rows: list[Row], config: ConfigDict, channels: int, devices: int) -> list[Cost]:
    """Estimate the cost of every layer in one training step on one device.

    Memory: each operation reads each operand and writes each result once. Each of the three products (forward, input
    gradient, weight gradient) reads two of input, output and parameters, and writes the third. The gradient of an
    operation reads the output's gradient and the input. Fused operations move less.

    Communication: towers gather activations and, backwards, reduce-scatter their gradients; data shards all-reduce the
    gradients of the parameters. In a ring of n devices each one sends (n - 1) / n of what is gathered or scattered, and
    twice that of what is all-reduced (Patarasuk and Yuan, 2009). Response normalisation across towers sends border
    channels to both neighbours, and their gradients back.

    Args:
      rows: Layers, from `summary.rows`.
      config: Config of a run.
      channels: Channels of the images.
      devices: 1 for all towers on one device, or a multiple of the number of towers.

    Raises:
      ValueError: The devices cannot be shared equally by the towers, or the batch by the devices.
    """
    towers, batch_size = config.model.towers, config.train.batch_size
    if devices > 1 and devices % towers:
        raise ValueError(
            f"--devices={devices}: must be 1 or a multiple of model.towers={towers}; "
            f"use {devices // towers * towers or 1} or {(devices // towers + 1) * towers}"
        )
    shards, local_towers = max(1, devices // towers), towers if devices == 1 else 1
    if batch_size % shards:
        raise ValueError(
            f"--devices={devices}: must divide train.batch_size={batch_size} into {shards} equal shards; "
            f"use --config.train.batch_size={-(-batch_size // shards) * shards}"
        )
    images = batch_size // shards
    value_bytes = jnp.dtype(config.model.dtype).itemsize
    lrn_off = not config.model.lrn.enabled
    disabled = {"lrn": lrn_off, "spatial_lrn": lrn_off, "dropout": config.model.dropout.rate == 0}
    pool = partial(layers.max_pool, **config.model.pool)
    costs, shape = [], (config.data.crop, config.data.crop, channels)
    for row in rows:
        has_input_gradient = row is not rows[0]
        products, values = 2 + has_input_gradient, 0
        sees_all = row.sees == "all"
        if row.kind:
            inputs = math.prod(shape) * (towers if sees_all else 1)
            shape = (*row.maps[:-1], row.maps[-1] // towers)
            values = products * (inputs + math.prod(shape))
        for operation in row.then:
            before = shape
            if operation in ("max_pool", "avg_pool"):
                shape = jax.eval_shape(pool, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).shape[1:]
            values += 0 if disabled.get(operation) else 3 * math.prod(before) + 2 * math.prod(shape)
        sent_values = 0
        if devices > 1:
            gathered, borders = row.sent[:sees_all], row.sent[sees_all:]
            sent_values = (1 + has_input_gradient) * (towers - 1) * sum(gathered) + 2 * 2 * sum(borders)
        parameter_bytes = FLOAT32 * row.parameters // towers * local_towers
        flops = 2 * row.multiply_adds // towers * local_towers * images
        update = OPTIMIZER_TRAFFIC[config.optim.name]
        costs.append(
            Cost(
                name=row.name,
                forward=flops,
                input_gradient=has_input_gradient * flops,
                weight_gradient=flops,
                moved=local_towers * images * value_bytes * values + (products + update) * parameter_bytes,
                sent=images * (value_bytes if row.kind else FLOAT32) * sent_values
                + 2 * (shards - 1) * parameter_bytes // shards,
            )
        )
    return costs


def total(costs: list[Cost]) -> Cost:
    """Add up the costs of all layers."""
    return Cost("total", *(sum(column) for column in zip(*(cost[1:] for cost in costs), strict=True)))


def seconds(costs: list[Cost], peak: Peak) -> float:
    """Return the time of layers that run in turn: the roofline of each (Williams et al., 2009), then communication."""
    return sum(max(cost.flops / peak.flops, cost.moved / peak.bandwidth) + cost.sent / peak.link for cost in costs)


def table(costs: list[Cost], batch_size: int, devices: int, peak: Peak | None = None) -> Table:
    """Return the table that the command prints; it has times if the peak rates are given."""
    where = f"each of {devices} devices" if devices > 1 else "one device"
    title = f"a training step of {batch_size} images on {where}, 2 FLOPs per multiply-add"
    printed = Table(title=title, title_justify="left", caption_justify="left")
    printed.add_column("layer")
    columns = ["forward, FLOPs", "input gradient, FLOPs", "weight gradient, FLOPs", "memory, bytes", "sent, bytes"]
    for column in [*columns, "roofline, ms"] if peak else columns:
        printed.add_column(column, justify="right", no_wrap=True)

    def add(cost: Cost, timed: list[Cost]) -> None:
        numbers = [f"{number:,}" if number else "" for number in cost[1:]]
        printed.add_row(cost.name, *numbers, *([f"{1000 * seconds(timed, peak):,.3f}"] if peak and timed else []))

    for cost in costs:
        add(cost, [cost])
    summed = total(costs)
    printed.add_section()
    add(summed, costs)
    if devices > 1:
        add(Cost(f"all {devices} devices", *(devices * number for number in summed[1:])), [])
    if peak:
        printed.caption = f"{100 * summed.flops / peak.flops / seconds(costs, peak):.1f} % of the time is arithmetic"
    return printed


def main() -> None:
    """Print the table for the config of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE[:SCALE]", help="a study or network")
    parser.add_argument("--devices", type=int, default=1, help="1, or a multiple of the number of towers")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--channels", type=int, default=3, help="of the images")
    for rate in Peak._fields:
        parser.add_argument(f"--{rate}", type=float, help="peak rate of one device, per second")
    arguments, overrides = parser.parse_known_args()
    if unknown := [override for override in overrides if not override.startswith("--config.")]:
        parser.error(f"unknown argument {unknown[0]!r}")
    rates = [getattr(arguments, rate) for rate in Peak._fields]
    if any(rate is not None for rate in rates) and not all(rate is not None and rate > 0 for rate in rates):
        parser.error("--flops, --bandwidth and --link: must be given together and be above 0")
    try:
        run = config_lib.reference_run(config_lib.load_study(arguments.config, overrides))
        config_lib.validate(run)
        rows = summary.rows(run.model, arguments.classes, (run.data.crop, run.data.crop, arguments.channels))
        costs = step(rows, run, arguments.channels, arguments.devices)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{Path(__file__).name}: {error}\n")
    peak = Peak(*rates) if rates[0] is not None else None
    console = Console(width=max(Console().width, 150))
    console.print(table(costs, run.train.batch_size, arguments.devices, peak))


if __name__ == "__main__":
    main()
