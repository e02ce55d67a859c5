"""Predict time and cost of the paper's training, 90 epochs of ImageNet, on devices that are not here.

    python experiments/scaling/plan.py [--set=DEVICE.FIELD=VALUE ...] [--folder=...]

Writes plan.csv and plan.svg, and the tables of README.md where the folder has one. A step takes the roofline of each
layer (experiments/speed/cost.py) over the fraction of it that a device reaches, then the bytes sent over the link, and
no less than decoding its images. The fraction is calibrated on a published time, or assumed where there is none.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from alexnet_jax.tools import summary
from experiments.pages import insert, markdown
from experiments.speed import baselines, cost

HERE = Path(__file__).resolve().parent
IMAGES, EPOCHS, CLASSES = 1_200_000, 90, 1000  # paper, sections 2 and 5
BATCH = 128  # paper, section 5
COUNTS = (1, 2, 8, 64, 512)
LARGEST_BATCH = 1024  # of the runs whose errors are published: Krizhevsky (2014)
# Images that a core decodes per second: the median of our loader in experiments/data, which had two cores.
DECODED = pd.read_csv(HERE.parent / "data/results.csv").groupby("loader").images_per_second.median()["alexnet_jax"] / 2

# Networks, by layout: the paper's two towers, each sharded; one tower, sharded ("data"); and one tower with sharded
# convolutions and dense layers whose features are divided among all devices ("hybrid": Krizhevsky, 2014).
LAYOUTS = {"towers": "paper", "data": "one_weird_trick", "hybrid": "one_weird_trick"}
RULES: dict[str, Callable[[int], int]] = {  # images of a step on so many devices
    "batch 128 per device": lambda count: BATCH * count,
    "batch 128 in all": lambda count: BATCH,
}


class Device(NamedTuple):
    """Assumptions about a kind of device; rates are per second."""

    flops: float  # published peak for the dtype, without sparsity
    bandwidth: float  # bytes, of its memory
    link: float  # bytes sent to other devices of its machine
    per_machine: int
    network: float  # bytes sent to other machines, an equal part of what the machine has
    cores: float  # of the host, that decode its images
    price: float  # $ per hour
    fraction: float  # of the roofline that is reached
    dtype: str


# Peaks and links as published, [S]: read in the source or in a page that quotes it, [M]: from memory. The fractions
# of GTX 580 and K20, and the link of the K20, are those that give the published times (CHECKS); the others are assumed.
# Cores and prices are assumptions; those of GTX 580 and K20 are the purchase, spread over three years, and electricity.
DEVICES = {
    # 512 cores x 2 x 1.544 GHz, 192.4 GB/s [S: reviews of 2010]; PCI Express 2.0 x16, 10 Gb/s Ethernet [M].
    "GTX 580": Device(1.581e12, 192.4e9, 8e9, 2, 0.6e9, 3, 0.06, 0.2994, "float32"),
    # "Tesla K20 GPU Accelerator", board specification: 3.52 TFLOP/s, 208 GB/s, PCI Express 2.0 (8 GB/s) [S].
    "K20": Device(3.52e12, 208e9, 2.72e9, 8, 0.9e9, 2, 0.15, 0.3603, "float32"),
    # "NVIDIA A100 Tensor Core GPU", data sheet: SXM 80 GB, TF32, NVLink 600 GB/s both ways [S]; 200 Gb/s per GPU [M].
    "A100": Device(156e12, 2039e9, 300e9, 8, 25e9, 16, 2.0, 0.3, "float32"),
    # "NVIDIA H100 Tensor Core GPU", data sheet: SXM, TF32, NVLink 900 GB/s both ways [S]; 400 Gb/s per GPU [M].
    "H100": Device(494.7e12, 3350e9, 450e9, 8, 50e9, 16, 3.0, 0.3, "float32"),
    # "TPU v5e", Cloud TPU documentation: bfloat16, 400 GB/s both ways, pods of 256, 6.4 Tb/s per pod [S].
    "TPU v5e": Device(197e12, 819e9, 200e9, 256, 3.1e9, 14, 1.2, 0.3, "bfloat16"),
}


class Check(NamedTuple):
    """A published time of the whole training."""

    device: str
    layout: str
    count: int
    batch: int  # of 2014: 128 per device [M]
    hours: float
    used_for: str  # the field that is calibrated on it, or ""
    source: str


CHECKS = (
    Check("GTX 580", "towers", 2, 128, 5.5 * 24, "fraction", "paper, section 5, five to six days [S]"),
    Check("K20", "data", 1, 128, 98.05, "fraction", "Krizhevsky (2014) [M]"),
    Check("K20", "hybrid", 2, 256, 50.24, "link", "the same [M]"),
    Check("K20", "hybrid", 4, 512, 26.20, "", "the same [M]"),
    Check("K20", "hybrid", 8, 1024, 15.68, "", "the same [M]"),
)


@functools.cache
def network_rows(network: str) -> list[summary.Row]:
    """Return the layers of a network of baselines.py."""
    config = baselines.load_config(network, BATCH)
    return summary.rows(config.model, CLASSES, (config.data.crop, config.data.crop, 3))


@functools.cache
def step_costs(layout: str, count: int, batch: int, dtype: str) -> list[cost.Cost]:
    """Return the cost of every layer in a step on one of `count` devices; `batch` images on all of them."""
    config, rows = baselines.load_config(LAYOUTS[layout], batch), network_rows(LAYOUTS[layout])
    config.model.dtype = dtype
    sharded = cost.step(rows, config, 3, count)
    if layout != "hybrid" or count == 1:
        return sharded
    costs, others = [], batch * (count - 1) // count  # images on other devices
    for row, divided, whole in zip(rows, sharded, cost.step(rows, config, 3, 1), strict=True):
        if row.kind == "dense":
            # The layer's inputs are gathered; their gradients are reduced and scattered.
            sent = 2 * jnp.dtype(dtype).itemsize * others * row.kernel[0]
            divided = cost.Cost(row.name, *(number // count for number in whole[1:-1]), sent)
        costs.append(divided)
    return [*costs, cost.Cost("logits", 0, 0, 0, 0, cost.FLOAT32 * others * CLASSES)]


def step_seconds(device: Device, layout: str, count: int, batch: int) -> dict[str, float]:
    """Return the seconds of a step's parts: "compute", then "communication"; and "input", which runs beside them."""
    costs = step_costs(layout, count, batch, device.dtype)
    roofline = cost.seconds(costs, cost.Peak(device.flops, device.bandwidth, math.inf))
    return {
        "compute": roofline / device.fraction,
        "communication": cost.total(costs).sent / (device.link if count <= device.per_machine else device.network),
        "input": batch / count / device.cores / DECODED,
    }


def hours(parts: dict[str, float], batch: int) -> float:
    """Return the hours of the whole training, from the parts of a step."""
    return max(parts["compute"] + parts["communication"], parts["input"]) * IMAGES * EPOCHS / batch / 3600


def predict(devices: dict[str, Device]) -> pd.DataFrame:
    """Return a row for each device, batch rule, layout and number of devices that divide the batch equally."""
    rows = []
    for name, rule, layout, count in itertools.product(devices, RULES, LAYOUTS, COUNTS):
        device, batch = devices[name], RULES[rule](count)
        if batch % (max(1, count // 2) if layout == "towers" else count):
            continue
        parts = step_seconds(device, layout, count, batch)
        total = hours(parts, batch)
        sent = cost.total(step_costs(layout, count, batch, device.dtype)).sent
        row = {"device": name, "rule": rule, "layout": layout, "devices": count, "batch": batch, "sent_bytes": sent}
        row |= {f"{part}_ms": 1000 * seconds for part, seconds in parts.items()}
        row |= {"images_per_second": IMAGES * EPOCHS / total / 3600}
        rows.append(row | {"hours": total, "dollars": total * count * device.price})
    return pd.DataFrame(rows).map(lambda value: float(f"{value:.4g}") if isinstance(value, float) else value)


def fastest(table: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Return the predictions of the fastest layout for each device and number of devices."""
    rows = table[table.rule == rule]
    return rows.loc[rows.groupby(["device", "devices"], sort=False).hours.idxmin()]


def to_markdown(devices: dict[str, Device], table: pd.DataFrame) -> str:
    """Return the tables of README.md: published times, assumptions, and predictions for both rules."""
    checks = [["published", "hours", "predicted", "predicted / published", ""]]
    for check in CHECKS:
        device = devices[check.device]
        parts = step_seconds(device, check.layout, check.count, check.batch)
        predicted = hours(parts, check.batch)
        step = check.hours * 3600 * check.batch / IMAGES / EPOCHS
        link = device.link * parts["communication"] / (step - parts["compute"]) / 1e9
        use = f"calibrates the {check.used_for}" if check.used_for else f"**a prediction**; exact with {link:.2g} GB/s"
        what = f"{check.count} x {check.device}, {check.layout}, batch {check.batch}: {check.source}"
        checks.append([what, f"{check.hours:.4g}", f"{predicted:.4g}", f"{predicted / check.hours:.2f}", use])
    columns = ["peak, TFLOP/s", "memory, GB/s", "link, GB/s", "network, GB/s", "fraction", "$ per hour", "cores"]
    assumed = [["assumed", *columns, "cores needed"]]
    for name, device in devices.items():
        parts = step_seconds(device, "towers", 1, BATCH)
        giga = [number / 1e9 for number in (device.flops / 1e3, device.bandwidth, device.link, device.network)]
        needed = device.cores * parts["input"] / parts["compute"]
        numbers = (*giga, device.fraction, device.price, device.cores, needed)
        assumed.append([f"{name}, {device.dtype}", *(f"{number:,.4g}" for number in numbers)])
    grids = []
    for rule in RULES:
        cells = {(row.device, row.devices): describe(row) for row in fastest(table, rule).itertuples()}
        lines = [[name, *(cells.get((name, count), "") for count in COUNTS)] for name in devices]
        grids.append([[rule, *map(str, COUNTS)], *lines])
    return "\n".join(map(markdown, (checks, assumed, *grids)))


def describe(row: tuple) -> str:
    """Return a row of the predictions as text: time, cost, layout, and what limits it."""
    time = f"{row.hours:.3g} h" if row.hours >= 1 else f"{60 * row.hours:.2g} min"
    busy = row.compute_ms + row.communication_ms
    limit = "input" if row.input_ms > busy else f"{row.communication_ms / busy:.0%} sent"
    layout = f", {row.layout}, {limit}" if row.devices > 1 else ""
    return f"{time}{'*' if row.batch > LARGEST_BATCH else ''}, ${row.dollars:,.0f}{layout}"


def draw(devices: dict[str, Device], table: pd.DataFrame) -> Figure:
    """Draw hours against the number of devices, with the published times; dotted beyond `LARGEST_BATCH`."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, rule in zip(figure.subplots(1, 2, sharex=True, sharey=True), RULES, strict=True):
        for number, name in enumerate(devices):
            rows = fastest(table, rule).query("device == @name")
            known = rows[rows.batch <= LARGEST_BATCH]
            axes.plot(rows.devices, rows.hours, f"C{number}:")
            axes.plot(known.devices, known.hours, f"C{number}o-", markersize=4, label=name)
        points = [(check.count, check.hours) for check in CHECKS if check.batch == RULES[rule](check.count)]
        axes.plot(*zip(*points, strict=True), "kx", label="published")
        axes.legend(fontsize="small")
        axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="hours for 90 epochs, predicted", title=rule)
        axes.set_xticks(COUNTS, COUNTS)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    return figure


def parse(settings: list[str]) -> dict[str, Device]:
    """Return the devices with changed fields; raise ValueError if a setting is not DEVICE.FIELD=VALUE."""
    devices = dict(DEVICES)
    for setting in settings:
        name, _, change = setting.partition(".")
        field, _, value = change.partition("=")
        if name not in devices or not isinstance(getattr(devices[name], field, None), float | int):
            raise ValueError(f"--set={setting}: must be DEVICE.FIELD=VALUE; use --set=H100.price=2.5")
        devices[name] = devices[name]._replace(**{field: float(value)})
    return devices


def main() -> None:
    """Write the predictions, their tables and their figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="DEVICE.FIELD=VALUE", help="change an assumption")
    parser.add_argument("--folder", type=Path, default=HERE, help="of plan.csv, plan.svg and README.md")
    arguments = parser.parse_args()
    devices = parse(arguments.set)
    table = predict(devices)
    table.to_csv(arguments.folder / "plan.csv", index=False)
    mpl.rcParams["svg.hashsalt"] = "plan"  # the same file each time
    draw(devices, table).savefig(arguments.folder / "plan.svg", metadata={"Date": None})
    print(tables := to_markdown(devices, table))
    if (readme := arguments.folder / "README.md").exists():
        readme.write_text(insert(readme.read_text(), tables))


if __name__ == "__main__":
    main()
