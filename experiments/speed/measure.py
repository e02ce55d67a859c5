"""Benchmark a training step against other libraries: python experiments/speed/measure.py [--only=GROUP,...]

Each baseline of a group runs in a process of its own that has compiled. They are measured interleaved, in another order
in each repetition. Writes results.csv, a row per repetition; results.png and scaling.png; and prints
medians. Other programs change the CPU seconds of a step less than its wall time. Rows from before they were measured
have none, and no instruction set. Names the libraries that are not installed, and leaves them out.
"""

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from alexnet_jax.parallel import instruction_set

HERE = Path(__file__).parent
TORCH = ("pytorch-contiguous", "pytorch-channels_last", "pytorch-compile")
WITHOUT = tuple(f"ours-auto-{variant}" for variant in ("no_conv", "no_normalise", "no_max_pool", "no_kernels"))
PACKAGES = {"pytorch": ("torch", "requirements-torch.lock"), "keras": ("keras", "requirements.lock")}
MATMUL_FLOP = 2 * 4096**3
STEP_FLOP = 4.136e9  # of the paper's network, per image: cost.py --config=configs/networks/paper.py


class Baseline(NamedTuple):
    """The arguments of baselines.py."""

    kind: str
    what: str
    network: str
    batch: int
    steps: int = 1


def each(kinds: tuple[str, ...], what: str, network: str, batch: int, steps: int = 1) -> list[Baseline]:
    """Return baselines that do the same."""
    return [Baseline(kind, what, network, batch, steps) for kind in kinds]


GROUPS: dict[str, list[Baseline]] = {
    "paper_128": each(("ours-auto", "ours-auto-concurrent", *TORCH, "matmul"), "train", "paper", 128),
    "paper_32": each(("ours-auto", *TORCH, "flax", "ours-vmap", "ours-vmap-grouped"), "train", "paper", 32),
    "operations_32": each(("ours-auto", *WITHOUT), "train", "paper", 32),
    "small_64": each(("ours-auto", "ours-auto-concurrent", *TORCH), "train", "small", 64, 10),
    "cifar_128": each(
        ("ours-auto", "ours-auto-sequential", "ours-vmap", *TORCH, "ours-auto-no_avg_pool"), "train", "cifar", 128, 10
    ),
    "keras_tutorial_v1_32": each(("ours-auto", "keras"), "train", "keras_tutorial_v1", 32, 2),
    "evaluation_128": each(("ours-auto", *TORCH), "evaluate", "paper", 128),
    "ten_views_32": each(("ours-auto", *TORCH), "ten_views", "paper", 32),
    "scaling_batch": [Baseline("ours-auto", "train", "paper", batch) for batch in (8, 16, 32, 64, 128, 256)],
    "scaling_width": [Baseline("ours-auto", "train", f"paper*{width}", 32) for width in (0.25, 0.5, 0.75, 1.0)],
    "scaling_devices": [
        Baseline(kind, "train", "paper", batch) for batch in (8, 16, 32, 64) for kind in ("ours-auto", "ours-vmap")
    ],
}


def start(baseline: Baseline, **environment: str) -> subprocess.Popen | None:
    """Start a baseline and wait until it has compiled; return None if it does not run here."""
    package, lock = PACKAGES.get(baseline.kind.split("-")[0], ("jax", "requirements.lock"))
    if importlib.util.find_spec(package) is None:
        print(f"{baseline.kind}: not installed: pip install --requirement {lock}")
        return None
    command = [sys.executable, HERE / "baselines.py", *map(str, baseline)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, env=os.environ | environment, **pipes)
    if process.stdout.readline() == "ready\n":
        return process
    print(f"{baseline}: does not run here")
    return None


def measure(group: str, repetitions: int) -> list[dict[str, object]]:
    """Return a row for each repetition of each baseline of a group."""
    # Start one after the other, because compiling takes all cores.
    running = {baseline: process for baseline in GROUPS[group] if (process := start(baseline))}
    seconds: dict[Baseline, list[list[float]]] = {baseline: [] for baseline in running}
    for repetition in range(repetitions):
        # A fixed order would always run a baseline after the same other one.
        for baseline in random.Random(repetition).sample(list(running), len(running)):
            process = running[baseline]
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[baseline].append([float(number) / baseline.steps for number in process.stdout.readline().split()])
    rows = []
    for baseline, process in running.items():
        kind, _, network, batch, _ = baseline
        peak = int(process.communicate()[0])
        for repetition, (passed, cpu) in enumerate(seconds[baseline]):
            row = {"group": group, "baseline": kind, "network": network, "batch": batch, "repetition": repetition}
            rows.append(row | {"seconds": round(passed, 5), "peak_bytes": peak, "cpu_seconds": round(cpu, 5)})
    return rows


def measure_startup(repetitions: int) -> list[dict[str, object]]:
    """Return the seconds from starting Python to the end of the first step, with a cold and a warm cache."""
    rows = []
    for repetition in range(repetitions):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                variables = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
                command = [sys.executable, HERE / "baselines.py", "startup"]
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": variables}
                began = time.perf_counter()
                with subprocess.Popen(command, text=True, **pipes) as process:
                    process.stdout.readline()  # "ready"
                    seconds = round(time.perf_counter() - began, 3)
                row = {"group": "startup", "baseline": kind, "network": "embedded", "batch": 8}
                rows.append(row | {"repetition": repetition, "seconds": seconds})
    return rows


def medians(results: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each baseline of a group: n, median, lowest and highest seconds of a step, and derived numbers.

    "ratio" is the median over that of the group's first baseline with the same network and batch, "from" and "to" the
    range of the ratios of single repetitions; "CPU ratio" is that of the median CPU seconds.
    "of matmul" is the FLOP rate over that of "matmul", if the group has it.
    """
    same = ["baseline", "network", "batch"]
    table = results.groupby(same, sort=False)["seconds"].agg(["count", "median", "min", "max"])
    table["CPU s"] = results.reindex(columns=[*same, "cpu_seconds"]).groupby(same, sort=False)["cpu_seconds"].median()
    repetitions = results.set_index([*same, "repetition"])["seconds"].sort_index()
    first = results.baseline.iloc[0]
    for baseline, network, batch in table.index:
        if (first, network, batch) in table.index:
            ratios = repetitions[baseline, network, batch] / repetitions[first, network, batch]
            table.loc[(baseline, network, batch), ["ratio", "from", "to", "CPU ratio"]] = (
                table["median"][baseline, network, batch] / table["median"][first, network, batch],
                ratios.min(),
                ratios.max(),
                table["CPU s"][baseline, network, batch] / table["CPU s"][first, network, batch],
            )
    if "matmul" in results.baseline.values:
        matmul = MATMUL_FLOP / table["median"].xs("matmul").iloc[0]
        batch = table.index.get_level_values("batch")
        table["of matmul"] = (STEP_FLOP * batch / table["median"] / matmul).drop("matmul")
    table["images/s"] = table.index.get_level_values("batch") / table["median"]
    table["peak GB"] = results.groupby(same, sort=False)["peak_bytes"].max() / 1e9
    return table


def plot_scaling(results: pd.DataFrame, folder: Path) -> None:
    """Write scaling.png: milliseconds of a step per image, against batch size and width."""
    if not {"scaling_batch", "scaling_devices", "scaling_width"} <= set(results.group):
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    by_batch, by_width = figure.subplots(1, 2)
    rows = results.assign(
        milliseconds=1000 * results.seconds / results.batch,
        width=pd.to_numeric(results.network.str.partition("*")[2]),
    )
    for axes, group, kind, against, label in (
        (by_batch, "scaling_batch", "ours-auto", "batch", "two devices"),
        (by_batch, "scaling_devices", "ours-vmap", "batch", "one device"),
        (by_width, "scaling_width", "ours-auto", "width", "two devices"),
    ):
        repetitions = rows[(rows.group == group) & (rows.baseline == kind)].groupby(against).milliseconds
        median = repetitions.median()
        spread = median - repetitions.min(), repetitions.max() - median
        axes.errorbar(median.index, median, spread, marker="D", capsize=3, label=label)
        axes.set(xlabel=against, ylabel="ms per image", ylim=(0, None))
        axes.grid(alpha=0.3)
    by_batch.set_xscale("log", base=2)
    by_batch.legend()
    figure.savefig(folder / "scaling.png", dpi=80)


def plot(results: pd.DataFrame, folder: Path) -> None:
    """Write results.png: every repetition, relative to the median of the group's first baseline."""
    groups = [group for group in GROUPS if group in set(results.group) and not group.startswith("scaling")]
    if not groups:
        return
    figure = Figure(figsize=(9, 1.5 + 1.2 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), squeeze=False, sharex=True)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        rows = results[(results.group == group) & (results.baseline != "matmul")]
        first = rows[rows.baseline == rows.baseline.iloc[0]].seconds.median()
        kinds = list(rows.baseline.unique())
        for place, kind in enumerate(kinds):
            seconds = rows[rows.baseline == kind].seconds
            axes.plot(seconds / first, [place] * len(seconds), "o", color=f"C{place}", alpha=0.5, markersize=4)
            axes.plot(seconds.median() / first, place, "D", color=f"C{place}")
        axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
        axes.set(ylim=(len(kinds) - 0.5, -0.5), xscale="log")
        axes.set_title(group, loc="left", fontsize="small")
        axes.axvline(1, color="black", lw=0.5)
        axes.grid(axis="x", alpha=0.3, which="both")
    panels[-1].set_xticks(ticks := [1, 1.5, 2, 3, 4], ticks)
    panels[-1].minorticks_off()
    panels[-1].set_xlabel("time of a step relative to the first baseline's median (diamonds: medians)")
    figure.savefig(folder / "results.png", dpi=80)


def main() -> None:
    """Measure the groups one after the other; print and plot them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join((*GROUPS, "startup")), help="groups, separated by commas")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=HERE, help="of results.csv and the plots")
    parser.add_argument("--plot", action="store_true", help="measure nothing; draw the plots of results.csv again")
    arguments = parser.parse_args()
    path = arguments.folder / "results.csv"
    results = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["group"])
    for group in [] if arguments.plot else arguments.only.split(","):
        measured = measure_startup if group == "startup" else partial(measure, group)
        rows = pd.DataFrame(measured(arguments.repetitions)).assign(instruction_set=instruction_set())
        results = pd.concat([results[results.group != group], rows], ignore_index=True)
        results.to_csv(path, index=False)
        print(f"\n{group}\n{medians(results[results.group == group]).round(3).to_string()}", flush=True)
    plot(results, arguments.folder)
    plot_scaling(results, arguments.folder)


if __name__ == "__main__":
    main()
