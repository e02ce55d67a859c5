"""What a net is made of, as a table to hold against the paper's figure 2; and what training it costs on paper.

    python -m alexnet_jax.summary --config=configs/nets/paper.py [--classes=1000] [--channels=3]
        [--devices=2 [--flops=65e9 --bandwidth=10e9 --link=5e9]]

Nothing is computed but shapes.
"""

import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from alexnet_jax import config as config_lib
from alexnet_jax import cost, logs, model
from alexnet_jax.cost import Cost, Peak
from alexnet_jax.optim import KERNEL
from alexnet_jax.towers import TOWER


class Row(NamedTuple):
    """One layer, of all towers together.

    Attributes:
      name: of the layer; "logits" is what all towers' last layers make together.
      kind: "conv", "local" or "dense"; "" for the logits.
      maps: (height, width, features) before pooling, or (features,).
      kernel: (height, width, channels seen), or (neurons seen,).
      stride: in pixels.
      crosses: whether it sees all towers or its own only.
      then: the operations that follow.
      parameters: weights and biases.
      multiply_adds: for one image.
      neurons: values of ``maps``.
      exchanged: values that a tower gives away for one image: to what this layer sees, then in its normalisation.
    """

    name: str
    kind: str
    maps: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int
    crosses: bool
    then: tuple[str, ...]
    parameters: int
    multiply_adds: int
    neurons: int
    exchanged: tuple[int, ...]


def rows(config: ConfigDict, classes: int, image_shape: tuple[int, int, int]) -> list[Row]:
    """The layers of a net, and what is exchanged for the logits.

    Args:
      config: the ``model`` section.
      image_shape: (height, width, channels) of what the net sees.

    Raises:
      ValueError: a kernel or a pooling window does not fit the map it meets.
    """
    net, towers = model.AlexNet(config, classes), config.towers

    def tower(own: Any) -> Any:
        images = jnp.zeros((1, *image_shape))
        return net.apply({"params": own}, images, train=False, capture_intermediates=True, mutable=["intermediates"])[
            1
        ]["intermediates"]

    params = model.shapes(config, classes, image_shape)
    seen = jax.eval_shape(jax.vmap(tower, axis_name=TOWER), params)

    def exchanged(name: str) -> tuple[int, ...]:
        found = [seen[key][0] for key in (f"{name}_exchanged", f"{name}_lrn_exchanged") if key in seen]
        return tuple(array.size // towers for array in found) if towers > 1 else ()

    table = []
    for name in config.order:
        layer, kernel = config.layers[name], params[name][KERNEL].shape[1:]
        maps = seen[name]["__call__"][0].shape[2:]
        maps = (*maps[:-1], maps[-1] * towers)
        weights = math.prod(kernel) * towers
        channels = kernel[-2] if layer.kind != "local" else kernel[-2] // layer.kernel**2
        table.append(
            Row(
                name=name,
                kind=layer.kind,
                maps=maps,
                kernel=(channels,) if layer.kind == "dense" else (layer.kernel, layer.kernel, channels),
                stride=1 if layer.kind == "dense" else layer.stride,
                crosses=layer.crosses,
                then=tuple(layer.then),
                parameters=model.count_parameters(params[name]),
                # A convolution uses each weight at every position of its map; the others use each just once.
                multiply_adds=weights * (math.prod(maps[:-1]) if layer.kind == "conv" else 1),
                neurons=math.prod(maps),
                exchanged=exchanged(name),
            )
        )
    if towers > 1:
        table.append(Row("logits", "", (classes,), (), 1, True, (), 0, 0, 0, exchanged("logits")))
    return table


def sizes(config: ConfigDict, classes: int, channels: int) -> dict[str, Any]:
    """How large a net is: parameters, multiply-adds for one image, and maps, by layer.

    Args:
      config: of a run.
    """
    layers = rows(config.model, classes, (config.data.crop, config.data.crop, channels))
    return {
        "parameters": sum(row.parameters for row in layers),
        "multiply_adds": sum(row.multiply_adds for row in layers),
        "maps": {row.name: "x".join(map(str, row.maps)) for row in layers},
    }


def table(layers: list[Row], towers: int) -> Table:
    """The rows as they are printed, with totals and what one tower has of them."""
    printed = Table(title="multiply-adds and exchanged values are those of one image", title_justify="left")
    for column in ("layer", "map", "kernel", "stride", "sees", "then"):
        printed.add_column(column)
    for column in ("parameters", "multiply-adds", "neurons", "exchanged a side"):
        printed.add_column(column, justify="right", no_wrap=True)
    for row in layers:
        sees = "" if towers == 1 else "all towers" if row.crosses else "its own tower"
        printed.add_row(
            row.name,
            "x".join(map(str, row.maps)),
            "x".join(map(str, row.kernel)) + (" unshared" if row.kind == "local" else ""),
            str(row.stride) if row.kind in ("conv", "local") else "",
            "the image" if row is layers[0] else sees,
            ", ".join(row.then),
            *(f"{number:,}" if number else "" for number in (row.parameters, row.multiply_adds, row.neurons)),
            " + ".join(f"{number:,}" for number in row.exchanged),
        )
    totals = [
        sum(numbers) for numbers in zip(*((r.parameters, r.multiply_adds, r.neurons) for r in layers), strict=True)
    ]
    given = sum(sum(row.exchanged) for row in layers)
    printed.add_section()
    printed.add_row("total", *[""] * 5, *(f"{number:,}" for number in totals), f"{given:,}" if given else "")
    if towers > 1:
        printed.add_row(f"each of {towers} towers", *[""] * 5, *(f"{number // towers:,}" for number in totals), "")
    return printed


def cost_table(costs: list[Cost], batch_size: int, devices: int, peak: Peak | None = None) -> Table:
    """What one device does in a training step, as it is printed; with times, where its peak is known."""
    where = f"each of {devices} devices" if devices > 1 else "one device"
    title = f"a training step of {batch_size} images on {where}, 2 FLOPs for each multiply-add"
    printed = Table(title=title, title_justify="left", caption_justify="left")
    printed.add_column("layer")
    columns = ["forward, FLOPs", "input gradient, FLOPs", "weight gradient, FLOPs", "memory, bytes", "exchanged, bytes"]
    for column in [*columns, "roofline, ms"] if peak else columns:
        printed.add_column(column, justify="right", no_wrap=True)

    def add(each: Cost, layers: list[Cost]) -> None:
        numbers = [f"{number:,}" if number else "" for number in each[1:]]
        time = [f"{1000 * cost.seconds(layers, peak):,.3f}"] if peak and layers else []
        printed.add_row(each.name, *numbers, *time)

    for each in costs:
        add(each, [each])
    total = cost.total(costs)
    printed.add_section()
    add(total, costs)
    if peak:
        arithmetic = total.flops / peak.flops / cost.seconds(costs, peak)
        printed.caption = f"{100 * arithmetic:.1f} % of the time is arithmetic"
    if devices > 1:
        add(Cost(f"all {devices} devices", *(devices * number for number in total[1:])), [])
    return printed


def _define_flags() -> None:
    """Not when this file is imported: flags are everybody's, and the study's command would take these for its own."""
    flags.DEFINE_integer("classes", None, "Classes; by default 10 for the small images, else 1000.", 1)
    flags.DEFINE_integer("channels", None, "Channels; by default 1 for the embedded images, else 3.", 1)
    flags.DEFINE_integer("devices", None, "Devices of a training step: prints what each does in it.", 1)
    flags.DEFINE_float("flops", None, "FLOPs that a device can do in a second: prints times, with the next two.", 1)
    flags.DEFINE_float("bandwidth", None, "Bytes that a device can read or write in its memory in a second.", 1)
    flags.DEFINE_float("link", None, "Bytes that a device can send to others in a second.", 1)


def main(argv: list[str]) -> None:
    """Prints the tables of the flags' config."""
    given = flags.FLAGS
    if len(argv) > 1 or config_lib.FLAG.value is None:
        raise app.UsageError("say which net: --config=configs/nets/paper.py")
    logs.quiet_libraries()
    rates = (given.flops, given.bandwidth, given.link)
    missing = [f"--{name}" for name in ("devices", *Peak._fields) if given[name].value is None]
    if any(rates) and missing:
        sys.exit(f"times are of --devices, --flops, --bandwidth and --link together: {', '.join(missing)} missing")
    run = config_lib.reference_run(config_lib.FLAG.value)
    classes = given.classes or (1000 if run.data.name == "imagenet2012" else 10)
    channels = given.channels or (1 if run.data.name == "mnist5k" else 3)
    try:
        config_lib.validate(run)
        layers = rows(run.model, classes, (run.data.crop, run.data.crop, channels))
        costs = cost.step(layers, run, channels, given.devices) if given.devices else []
    except ValueError as error:
        sys.exit(f"{config_flags.get_config_filename(flags.FLAGS['config'])}: {error}")
    console = Console(width=max(Console().width, 150))
    console.print(table(layers, run.model.towers))
    if costs:
        console.print(cost_table(costs, run.train.batch_size, given.devices, Peak(*rates) if any(rates) else None))


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=config_lib.parse_flags)
