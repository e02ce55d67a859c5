"""Measure whether one tower's filters are for colour, and draw them as figure 3.

    python experiments/figure3/figure3.py --runs=RUNS    # add the filters of the runs in RUNS, then draw
    python experiments/figure3/figure3.py                # draw from colour.csv and filters.npz beside the script

RUNS has the studies ablation_contributions_cifar10 and initialisation_imagenette of PLAN.md, with their filters.npy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from alexnet_jax import figures
from alexnet_jax.run_dir import StudyDir
from alexnet_jax.studies import analysis
from experiments import pages

HERE = Path(__file__).resolve().parent
SMALL, PAPERS = "CIFAR-10, small network", "Imagenette, the paper's network"
STUDIES = {
    "ablation_contributions_cifar10": SMALL,
    "initialisation_imagenette": PAPERS,
    "ablation_contributions_imagenette_small": "Imagenette, a quarter of the paper's filters",
}
DRAWN = {f"initialisation_imagenette/text/seed_{seed}": f"Imagenette, text, seed {seed}" for seed in (0, 1)}
SHUFFLES = 9_999  # of a permutation test
LEVEL = 0.05
UNTRAINED = ("text_scaled",)  # its filters are the initial noise


def measure(runs: Path) -> Iterator[dict[str, Any]]:
    """Yield, for each finished run of two towers, the mean colour fraction of each tower's filters and a p-value.

    `by_chance` is the mean difference of the towers in random assignments of the same filters to them, and `p` the
    fraction of these that have at least the same difference as the run: a permutation test.
    """
    for study, name in STUDIES.items():
        folder = StudyDir(runs / study)
        for arm, seed, run in folder.runs() if folder.path.exists() else []:
            if (filters := run.read_filters()) is None or len(filters) != 2:
                continue
            fractions = figures.colour_fractions(filters)
            difference, by_chance = figures.tower_difference(fractions, SHUFFLES)
            p = (1 + (by_chance >= difference - 1e-6).sum()) / (1 + SHUFFLES)
            tower_0, tower_1 = fractions.mean(axis=1)
            colours = {"tower_0": tower_0, "tower_1": tower_1, "by_chance": by_chance.mean(), "p": p}
            yield {"study": name, "arm": arm, "seed": seed} | colours


def collect(runs: Path) -> None:
    """Add the runs to colour.csv, and write filters.npz, in float16, if the runs that are drawn are among them.

    The archives of experiments/keep.py have no filters, so runs from there stay as they are.
    """
    both = pd.concat([read(), pd.DataFrame(measure(runs))])
    both.drop_duplicates(["study", "arm", "seed"], keep="last").to_csv(
        HERE / "colour.csv", index=False, float_format="%.4g"
    )
    if all((runs / run / "filters.npy").exists() for run in DRAWN):
        filters = {run: np.load(runs / run / "filters.npy").astype(np.float16) for run in DRAWN}
        np.savez_compressed(HERE / "filters.npz", **filters)


def read() -> pd.DataFrame:
    """Return a row for each run: study, arm, seed, each tower's mean colour fraction, difference by chance, p-value."""
    return pd.read_csv(HERE / "colour.csv")


def table() -> str:
    """Return a row for each arm, in Markdown: how much more the towers differ than by chance, and in how many runs."""
    headings = ["images, network", "arm", "n", "colour of all filters", "difference of the towers", "by chance"]
    rows = [[*headings, "excess", "95 % CI", "runs with p < 0.05"]]
    for (study, arm), runs in read().groupby(["study", "arm"], sort=False):
        difference = (runs["tower_0"] - runs["tower_1"]).abs()
        excess, low, high = analysis.mean_and_interval((difference - runs["by_chance"]).to_numpy())
        means = [runs[["tower_0", "tower_1"]].to_numpy().mean(), difference.mean(), runs["by_chance"].mean()]
        interval = f"{low:+.2f} to {high:+.2f}" if len(runs) > 2 else ""  # two runs say too little
        clear = (runs["p"] < LEVEL).sum()
        rows.append(
            [study, arm, str(len(runs)), *(f"{mean:.2f}" for mean in means), f"{excess:+.2f}", interval, str(clear)]
        )
    return pages.markdown(rows)


def draw_filters(axes: Axes, filters: np.ndarray, title: str) -> None:
    """Draw the filters of both towers, as in the paper's figure: the first tower's in the upper rows."""
    axes.imshow(figures.filter_grid(filters.astype(np.float32)), interpolation="nearest")
    height = axes.get_ylim()[0]
    axes.axhline(height / 2, color="black", linewidth=1)
    fractions = figures.colour_fractions(filters.astype(np.float32)).mean(axis=1)
    labels = [f"tower {tower}\n{fraction:.2f}" for tower, fraction in enumerate(fractions)]
    axes.set_yticks([height / 4, 3 * height / 4], labels)
    axes.set_xticks([])
    axes.set_title(title)


def draw_runs(axes: Axes) -> None:
    """Draw the mean colour fraction of one tower's filters against that of the other's, a mark for each run."""
    runs = read()
    trained = runs[~runs["arm"].isin(UNTRAINED)]
    for (study, of_study), colour in zip(trained.groupby("study", sort=False), ("C0", "C1", "C2"), strict=True):
        clear = of_study["p"] < LEVEL
        for chosen, label, face in ((clear, f"p < {LEVEL}", colour), (~clear, "other runs", "none")):
            towers = of_study.loc[chosen, ["tower_0", "tower_1"]].to_numpy().T
            axes.scatter(*towers, facecolors=face, edgecolors=colour, label=f"{study}, {label}")
    axes.plot([0, 0.6], [0, 0.6], color="gray", linewidth=1)
    axes.set(xlabel="colour of tower 0's filters", ylabel="colour of tower 1's filters", aspect="equal")
    axes.legend(fontsize="x-small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def draw() -> None:
    """Draw the filters of two runs, and all runs beside them."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes: Any = figure.subplot_mosaic([[run, "all runs"] for run in DRAWN], width_ratios=(2, 1))
    with np.load(HERE / "filters.npz") as filters:
        for run, title in DRAWN.items():
            draw_filters(axes[run], filters[run], title)
    draw_runs(axes["all runs"])
    figure.savefig(HERE / "figure3.png", dpi=100, metadata={"Software": None})


def over_arms() -> str:
    """Return in a sentence what all arms of the small network say together: the mean excess, and what seeds decide.

    Analyses of variance, grouped by seed: of the difference with its sign, which tells the towers apart, and of its
    excess.
    """
    runs = read().query("study == @SMALL")
    signed = runs["tower_0"] - runs["tower_1"]
    excess = signed.abs() - runs["by_chance"]
    mean, low, high = analysis.mean_and_interval(excess.groupby(runs["seed"]).mean().to_numpy())
    by_seed = runs["seed"].nunique() - 1, len(runs) - runs["seed"].nunique()

    def variance(values: pd.Series) -> str:
        statistic, p = stats.f_oneway(*(group for _, group in values.groupby(runs["seed"])))
        return f"F({by_seed[0]}, {by_seed[1]}) = {statistic:.1f}, p = {p:.0e}"

    return (
        f"{SMALL}, the mean over arms of each seed: excess {mean:+.2f}, 95 % CI {low:+.2f} to {high:+.2f}, "
        f"n = {by_seed[0] + 1}. Grouped by seed: which tower has more colour, {variance(signed)}; the excess, "
        f"{variance(excess)}.\n"
    )


def tables() -> str:
    """Return the table of the README and the sentence about all arms."""
    return f"{table()}\n{over_arms()}"


if __name__ == "__main__":
    pages.renew(__doc__, HERE, collect, draw, tables)
