"""How fast a step is beside other libraries: python experiments/speed/measure.py [--only=GROUP,...] [--repetitions=7]

The contestants of a group take turns, each time in another order, and each in a process of its own that has compiled.
Ours have huge pages of memory, as the training command has; what a contestant's name has in brackets is otherwise than
usual. Writes results.csv beside it, a row for each turn, and prints medians; results.png and scaling.png show them.
Peers that are not installed are named and left out.
"""

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pandas as pd
from matplotlib.figure import Figure

from alexnet_jax import huge_pages

HERE = Path(__file__).parent
HUGE, SMALL = " (huge pages)", " (small pages)"
TORCH = ("pytorch-contiguous", "pytorch-channels_last", "pytorch-compile")
PAGES = (f"ours-auto{SMALL}", f"pytorch-compile{HUGE}")
WITHOUT = tuple(f"ours-auto-{form}" for form in ("conv", "normalise", "max_pool", "plain"))
PACKAGES = {"pytorch": ("torch", "requirements-torch.lock"), "keras": ("keras", "requirements.lock")}
MATMUL = 2 * 4096**3  # FLOP of a turn of "matmul"
STEP_FLOP = 4.136e9  # of the paper's net, an image: alexnet_jax.summary --devices=1
Contestant = tuple[str, str, str, int, int]


def each(kinds: tuple[str, ...], what: str, net: str, batch: int, steps: int = 1) -> list[Contestant]:
    """Contestants that do the same, in steps of which a turn has several; as contestants.py takes them."""
    return [(kind, what, net, batch, steps) for kind in kinds]


GROUPS: dict[str, list[Contestant]] = {
    "paper_128": each(("ours-auto", "ours-auto-concurrent", *PAGES, *TORCH, "matmul"), "train", "paper", 128),
    "paper_32": each(("ours-auto", *PAGES, *TORCH, "flax", "ours-vmap", "ours-vmap-grouped"), "train", "paper", 32),
    "operations_32": each(("ours-auto", *WITHOUT), "train", "paper", 32),
    "small_64": each(("ours-auto", "ours-auto-concurrent", *TORCH), "train", "small", 64, 10),
    "cifar_128": each(
        ("ours-auto", "ours-auto-in_turn", "ours-vmap", *TORCH, "ours-auto-avg_pool"), "train", "cifar", 128, 10
    ),
    "seed_v1_32": each(("ours-auto", "keras"), "train", "seed_v1", 32, 2),
    "evaluation_128": each(("ours-auto", *TORCH), "evaluate", "paper", 128),
    "ten_views_32": each(("ours-auto", *TORCH), "ten_views", "paper", 32),
    "scaling_batch": [("ours-auto", "train", "paper", batch, 1) for batch in (8, 16, 32, 64, 128, 256)],
    "scaling_width": [("ours-auto", "train", f"paper*{width}", 32, 1) for width in (0.25, 0.5, 0.75, 1.0)],
    "scaling_devices": [
        (kind, "train", "paper", batch, 1) for batch in (8, 16, 32, 64) for kind in ("ours-auto", "ours-vmap")
    ],
}


def environment(kind: str) -> dict[str, str]:
    """The environment variables of a contestant."""
    huge = kind.endswith(HUGE) or (kind.startswith("ours") and not kind.endswith(SMALL))
    return os.environ | (huge_pages.variables() if huge else {})


def measured(group: str, repetitions: int) -> list[dict[str, object]]:
    """The turns of a group's contestants."""
    running = {}
    for contestant in GROUPS[group]:
        kind = contestant[0]
        package, lock = PACKAGES.get(kind.split("-")[0], ("jax", "requirements.lock"))
        if importlib.util.find_spec(package) is None:
            print(f"{kind}: not installed: pip install --requirement {lock}")
            continue
        command = [sys.executable, HERE / "contestants.py", kind.partition(" ")[0], *map(str, contestant[1:])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, text=True, env=environment(kind), **pipes)
        if process.stdout.readline() == "ready\n":  # one after the other: compiling takes all cores
            running[contestant] = process
        else:
            print(f"{group}, {kind}: does not run here")
    seconds: dict[Contestant, list[float]] = {contestant: [] for contestant in running}
    for turn in range(repetitions):
        # In one order, what comes after a product of large matrices, say, would come after it every time.
        for contestant in random.Random(turn).sample(list(running), len(running)):
            process = running[contestant]
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[contestant].append(float(process.stdout.readline()))
    rows = []
    for contestant, process in running.items():
        kind, _, net, batch, steps = contestant
        peak = int(process.communicate()[0])
        for repetition, turn in enumerate(seconds[contestant]):
            row = {"group": group, "contestant": kind, "net": net, "batch": batch, "repetition": repetition}
            rows.append(row | {"seconds": round(turn / steps, 5), "peak_bytes": peak})
    return rows


def startup(repetitions: int) -> list[dict[str, object]]:
    """Seconds from starting Python to the first finished step of the embedded job, without and with a warm cache."""
    rows = []
    for repetition in range(repetitions):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                variables = environment("ours") | {"JAX_COMPILATION_CACHE_DIR": cache}
                command = [sys.executable, HERE / "contestants.py", "startup"]
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": variables}
                began = time.perf_counter()
                with subprocess.Popen(command, text=True, **pipes) as process:
                    process.stdout.readline()  # "ready"
                    seconds = round(time.perf_counter() - began, 3)
                row = {"group": "startup", "contestant": kind, "net": "embedded", "batch": 8, "repetition": repetition}
                rows.append(row | {"seconds": seconds})
    return rows


def medians(results: pd.DataFrame) -> pd.DataFrame:
    """A row for each contestant of a group: n, median, lowest and highest seconds a step, and what follows from them.

    "ratio" is the median over that of the group's first contestant, of the same net and batch; its range is that of the
    ratios turn by turn. Of the paper's net, and beside a matmul, "of matmul" is the rate of its arithmetic over that of
    the matmul.
    """
    same = ["contestant", "net", "batch"]
    table = results.groupby(same, sort=False)["seconds"].agg(["count", "median", "min", "max"])
    turns = results.set_index([*same, "repetition"])["seconds"].sort_index()
    first = results.contestant.iloc[0]
    for contestant, net, batch in table.index:
        if (first, net, batch) in table.index and contestant != "matmul":
            ratios = turns[contestant, net, batch] / turns[first, net, batch]
            table.loc[(contestant, net, batch), ["ratio", "from", "to"]] = (
                table["median"][contestant, net, batch] / table["median"][first, net, batch],
                ratios.min(),
                ratios.max(),
            )
    if "matmul" in results.contestant.values:
        matmul = MATMUL / table["median"].xs("matmul").iloc[0]
        batch = table.index.get_level_values("batch")
        table["of matmul"] = (STEP_FLOP * batch / table["median"] / matmul).drop("matmul")
    table["images/s"] = table.index.get_level_values("batch") / table["median"]
    table["peak GB"] = results.groupby(same, sort=False)["peak_bytes"].max() / 1e9
    return table


def plot_scaling(results: pd.DataFrame) -> None:
    """scaling.png: milliseconds of a step for each of its images, against batch and width."""
    if not {"scaling_batch", "scaling_devices", "scaling_width"} <= set(results.group):
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    by_batch, by_width = figure.subplots(1, 2)
    rows = results.assign(
        milliseconds=1000 * results.seconds / results.batch,
        width=pd.to_numeric(results.net.str.partition("*")[2]),
    )
    for axes, group, kind, against, label in (
        (by_batch, "scaling_batch", "ours-auto", "batch", "two devices"),
        (by_batch, "scaling_devices", "ours-vmap", "batch", "one device"),
        (by_width, "scaling_width", "ours-auto", "width", "two devices"),
    ):
        turns = rows[(rows.group == group) & (rows.contestant == kind)].groupby(against).milliseconds
        middle = turns.median()
        spread = middle - turns.min(), turns.max() - middle
        axes.errorbar(middle.index, middle, spread, marker="D", capsize=3, label=label)
        axes.set(xlabel=against, ylabel="ms an image", ylim=(0, None))
        axes.grid(alpha=0.3)
    by_batch.set_xscale("log", base=2)
    by_batch.legend()
    figure.savefig(HERE / "scaling.png", dpi=80)


def plot(results: pd.DataFrame) -> None:
    """results.png: every turn, over the median of the first contestant."""
    groups = [group for group in GROUPS if group in set(results.group) and not group.startswith("scaling")]
    if not groups:
        return
    figure = Figure(figsize=(9, 1.5 + 1.2 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), squeeze=False, sharex=True)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        rows = results[(results.group == group) & (results.contestant != "matmul")]
        first = rows[rows.contestant == rows.contestant.iloc[0]].seconds.median()
        kinds = list(rows.contestant.unique())
        for place, kind in enumerate(kinds):
            seconds = rows[rows.contestant == kind].seconds
            axes.plot(seconds / first, [place] * len(seconds), "o", color=f"C{place}", alpha=0.5, markersize=4)
            axes.plot(seconds.median() / first, place, "D", color=f"C{place}")
        axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
        axes.set(ylim=(len(kinds) - 0.5, -0.5), xscale="log")
        axes.set_title(group, loc="left", fontsize="small")
        axes.axvline(1, color="black", lw=0.5)
        axes.grid(axis="x", alpha=0.3, which="both")
    panels[-1].set_xticks(ticks := [1, 1.5, 2, 3, 4], ticks)
    panels[-1].minorticks_off()
    panels[-1].set_xlabel("time of a step over the first one's median (diamonds: medians)")
    figure.savefig(HERE / "results.png", dpi=80)


def main() -> None:
    """Measures the groups in turn, and prints and draws them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join((*GROUPS, "startup")), help="groups, with commas")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    path = HERE / "results.csv"
    results = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["group"])
    for group in arguments.only.split(","):
        rows = startup(arguments.repetitions) if group == "startup" else measured(group, arguments.repetitions)
        results = pd.concat([results[results.group != group], pd.DataFrame(rows)], ignore_index=True)
        results.to_csv(path, index=False)
        print(f"\n{group}\n{medians(results[results.group == group]).round(3).to_string()}", flush=True)
    plot(results)
    plot_scaling(results)


if __name__ == "__main__":
    main()
