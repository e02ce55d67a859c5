"""Print the layers of a network as a table, to compare with the paper's figure 2; only shapes are computed."""

import argparse
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.table import Table

from alexnet_jax import config as config_lib
from alexnet_jax import model, terminal
from alexnet_jax.data import datasets
from alexnet_jax.optim import KERNEL
from alexnet_jax.parallel import DATA, TOWER


class Row(NamedTuple):
    """One layer, of all towers together; or "logits", the gathering of all towers' logits."""

    name: str
    kind: str  # "" for the logits
    maps: tuple[int, ...]  # shape of the feature maps, (height, width, features) before pooling, or (features,)
    kernel: tuple[int, ...]  # (height, width, input channels), or (input neurons,)
    stride: int
    sees: str
    then: tuple[str, ...]
    parameters: int  # those of batch normalisation included
    multiply_adds: int  # for one image
    neurons: int  # values of the feature maps
    sent: tuple[int, ...]  # activations that a tower sends for one image: before the layer, and within normalisation


def rows(config: ConfigDict, classes: int, image_shape: tuple[int, int, int]) -> list[Row]:
    """Return the layers of a config's `model` and, for several towers, the gathering of the logits.

    `image_shape` is (height, width, channels) after cropping. Layers that do not fit their input raise ValueError.
    """
    network, towers = model.AlexNet(config, classes), config.towers

    def intermediates(variables: Any) -> Any:
        images = jnp.zeros((1, *image_shape))
        options: dict[str, Any] = {"capture_intermediates": True, "mutable": ["intermediates"]}
        return network.apply(variables, images, train=False, **options)[1]["intermediates"]

    variables = model.shapes(config, classes, image_shape)
    params = variables["params"]
    outputs = jax.eval_shape(jax.vmap(intermediates, axis_name=TOWER), variables)

    def sent(name: str) -> tuple[int, ...]:
        keys = [key for key in (f"{name}_sent", f"{name}_lrn_sent") if key in outputs]
        return tuple(outputs[key][0].size // towers for key in keys) if towers > 1 else ()

    table = []
    for name in config.order:
        layer, kernel = config.layers[name], params[name][KERNEL].shape[1:]
        _, _, *shape, features = outputs[name]["__call__"][0].shape  # (towers, batch, ..., features of a tower)
        maps = (*shape, features * towers)
        channels = kernel[-2] // layer.kernel**2 if layer.kind == "local" else kernel[-2]
        table.append(
            Row(
                name=name,
                kind=layer.kind,
                maps=maps,
                kernel=(channels,) if layer.kind == "dense" else (layer.kernel, layer.kernel, channels),
                stride=1 if layer.kind == "dense" else layer.stride,
                sees=layer.sees,
                then=tuple(layer.then),
                parameters=model.count_parameters({key: params.get(key, {}) for key in (name, f"{name}_batch_norm")}),
                # A convolution uses each weight at every position of its feature map; other layers use it once.
                multiply_adds=math.prod(kernel) * towers * (math.prod(shape) if layer.kind == "conv" else 1),
                neurons=math.prod(maps),
                sent=sent(name),
            )
        )
    if towers > 1:
        table.append(Row("logits", "", (classes,), (), 1, "all", (), 0, 0, 0, sent("logits")))
    return table


def sizes(config: ConfigDict, classes: int, channels: int) -> dict[str, Any]:
    """Return the size of a run's network: parameters, multiply-adds for one image, and feature maps by layer."""
    layers = rows(config.model, classes, (config.data.crop, config.data.crop, channels))
    return {
        "parameters": sum(row.parameters for row in layers),
        "multiply_adds": sum(row.multiply_adds for row in layers),
        "maps": {row.name: "x".join(map(str, row.maps)) for row in layers},
    }


class Sent(NamedTuple):
    """Bytes that a device sends in a training step, with a device for each tower; as many are received."""

    activations: int  # and their gradients
    parameters: int  # and their gradients


def bytes_sent(
    config: ConfigDict, classes: int, image_shape: tuple[int, int, int], batch_size: int, layout: str
) -> Sent:
    """Return what a device sends in a layout of `config_lib.LAYOUTS`, counted in the program of the loss's gradient.

    The first three arguments are those of `rows`; errors are those of `model.forward`.
    """
    network, axes = model.AlexNet(config, classes), {TOWER: config.towers, DATA: 1}

    def gradient(variables: Any, images: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            dropout_key = jax.random.key(0)
            return model.forward(network, layout, variables | {"params": params}, images, dropout_key)[0].sum()

        return jax.grad(loss)(variables["params"])

    of_all_towers = model.shapes(config, classes, image_shape)
    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), of_all_towers)
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    program: Any = jax.make_jaxpr(gradient, axis_env=list(axes.items()))(variables, images)
    sent = list(collectives(program.jaxpr, axes))
    parameters = sum(count for scope, count in sent if model.SHARED_PARAMETERS in scope)
    return Sent(round(sum(count for _, count in sent) - parameters), round(parameters))


def collectives(jaxpr: Any, axis_sizes: Mapping[str, int]) -> Iterator[tuple[str, float]]:
    """Yield the named scopes of each collective in a program, and the bytes that a device sends in it.

    In a ring of n devices each one sends (n - 1) / n of what is gathered, scattered or exchanged, and twice that of
    what is all-reduced (Patarasuk and Yuan, 2009). Scalars, such as metrics, are left out.
    """
    of_operand = {
        "all_gather": lambda n: n - 1,
        "reduce_scatter": lambda n: (n - 1) / n,
        "all_to_all": lambda n: (n - 1) / n,
        "psum": lambda n: 2 * (n - 1) / n,
        "ppermute": lambda n: n > 1,
    }
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in of_operand:
            axes = equation.params.get("axes") or equation.params["axis_name"]
            devices = math.prod(axis_sizes[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))
            arrays = [operand.aval for operand in equation.invars if operand.aval.shape]
            size = sum(array.size * array.dtype.itemsize for array in arrays)
            yield str(equation.source_info.name_stack), of_operand[name](devices) * size
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                yield from collectives(inner, axis_sizes)


def layout_table(config: ConfigDict, classes: int, image_shape: tuple[int, int, int]) -> Table:
    """Return the table of the bytes that each layout sends in a training step of a run's config."""
    batch_size, towers = config.train.batch_size, config.model.towers
    title = f"bytes sent by each of {towers} devices in a training step of {batch_size} images, gradients included"
    printed = Table("layout", title=title, title_justify="left")
    for column in (*Sent._fields, "total"):
        printed.add_column(column, justify="right", no_wrap=True)
    for layout in config_lib.LAYOUTS if batch_size % towers == 0 else config_lib.LAYOUTS[:1]:
        sent = bytes_sent(config.model, classes, image_shape, batch_size, layout)
        printed.add_row(layout, *(f"{count:,}" for count in (*sent, sum(sent))))
    return printed


def table(layers: list[Row], towers: int) -> Table:
    """Return the table that the command prints, with totals and the part of one tower."""
    printed = Table(title="multiply-adds and activations sent are per image", title_justify="left")
    for column in ("layer", "feature maps", "kernel", "stride", "sees", "then"):
        printed.add_column(column)
    for column in ("parameters", "multiply-adds", "neurons", "sent by a tower"):
        printed.add_column(column, justify="right", no_wrap=True)
    sees = {"all": "all towers", "own": "own tower"} if towers > 1 else {"all": "", "own": ""}
    for row in layers:
        printed.add_row(
            row.name,
            "x".join(map(str, row.maps)),
            "x".join(map(str, row.kernel)) + (" unshared" if row.kind == "local" else ""),
            str(row.stride) if row.kind in ("conv", "local") else "",
            "images" if row is layers[0] else sees[row.sees],
            ", ".join(row.then),
            *(f"{number:,}" if number else "" for number in (row.parameters, row.multiply_adds, row.neurons)),
            " + ".join(f"{number:,}" for number in row.sent),
        )
    totals = [sum(getattr(row, field) for row in layers) for field in ("parameters", "multiply_adds", "neurons")]
    sent = sum(sum(row.sent) for row in layers)
    printed.add_section()
    printed.add_row("total", *[""] * 5, *(f"{number:,}" for number in totals), f"{sent:,}" if sent else "")
    if towers > 1:
        printed.add_row(f"each of {towers} towers", *[""] * 5, *(f"{number // towers:,}" for number in totals), "")
    return printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb summary."""
    parser.add_argument(
        "--config", required=True, metavar="FILE[:SCALE]", help="network, such as configs/networks/paper.py"
    )
    defaults = "default: those of the embedded dataset if the config names it, else"
    parser.add_argument("--classes", type=int, help=f"number of classes; {defaults} 1000")
    parser.add_argument("--channels", type=int, choices=(1, 3), help=f"channels of the images; {defaults} 3")


def main(arguments: argparse.Namespace) -> None:
    """Print the table of a config's reference run."""
    run = config_lib.reference_run(arguments.config)
    config_lib.validate(run)
    if arguments.classes is not None and arguments.classes < 1:
        raise ValueError(f"--classes={arguments.classes}: must be 1 or more")
    classes, channels = 1000, 3
    if run.data.name == datasets.EMBEDDED:
        dataset = datasets.load(run.data)
        classes, channels = dataset.classes, dataset.channels
    classes, channels = arguments.classes or classes, arguments.channels or channels
    image_shape, console = (run.data.crop, run.data.crop, channels), terminal.console(width=150)
    console.print(table(rows(run.model, classes, image_shape), run.model.towers))
    if run.model.towers > 1:
        console.print(layout_table(run, classes, image_shape))
