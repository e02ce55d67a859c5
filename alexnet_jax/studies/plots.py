"""Plots of a study's runs. Imports neither JAX nor the model."""

import pandas as pd
from matplotlib.figure import Figure

from alexnet_jax.results import GOAL, compare, is_share


def plot_arms(runs: pd.DataFrame, metric: str = "eval/top1_error") -> Figure:
    """A metric of each arm: a dot for every seed, a diamond for the mean, a line for its 95 % interval."""
    compared = compare(runs, metric)
    scale = 100 if is_share(metric) else 1
    figure = Figure(figsize=(7, 0.8 + 0.4 * len(compared)), layout="constrained")
    axes = figure.add_subplot()
    for place, (arm, row) in enumerate(compared.iterrows()):
        values = runs.loc[runs["arm"] == arm, metric].dropna() * scale
        axes.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.5, markersize=5)
        axes.plot([row["low"] * scale, row["high"] * scale], [place] * 2, color=f"C{place}")
        axes.plot(row["mean"] * scale, place, "D", color=f"C{place}")
    axes.set_yticks(range(len(compared)), list(compared.index))
    axes.set(xlabel=_label(metric), ylim=(len(compared) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    return figure


def plot_curves(curves: pd.DataFrame, metric: str, *, log: bool = False) -> Figure:
    """A metric against epochs: a line for each arm's mean over its seeds, a band from the lowest to the highest.

    Args:
      curves: as from ``load_curves``.
      log: whether the metric's axis is logarithmic.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for arm, by_epoch in _by_epoch(curves, metric):
        (line,) = axes.plot(by_epoch.index, by_epoch["mean"], label=arm, marker="." if len(by_epoch) < 20 else "")
        axes.fill_between(by_epoch.index, by_epoch["min"], by_epoch["max"], color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xlabel="epoch", ylabel=_label(metric), yscale="log" if log else "linear")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(frameon=False)
    return figure


def plot_figure_1(curves: pd.DataFrame) -> Figure:
    """The paper's figure 1: training error against epochs, the first arm solid and the others dashed, the 25 % line."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, (arm, by_epoch) in enumerate(_by_epoch(curves, "train/top1_error")):
        axes.plot(by_epoch.index, by_epoch["mean"], label=arm, linestyle="-" if place == 0 else "--", color=f"C{place}")
    axes.axhline(100 * GOAL, color="gray", linestyle=":")
    axes.annotate("25 %", (1, 100 * GOAL), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel="epochs", ylabel="training error rate (%)", ylim=(0, None))
    if len(axes.lines) > 1:
        axes.legend(frameon=False)
    return figure


def _by_epoch(curves: pd.DataFrame, metric: str) -> list[tuple[str, pd.DataFrame]]:
    """By arm, mean, min and max over seeds at each epoch; errors in percent."""
    scale = 100 if is_share(metric) else 1
    recorded = curves.dropna(subset=[metric]) if metric in curves else curves.iloc[:0]
    return [
        (str(arm), of_arm.groupby("epoch")[metric].agg(["mean", "min", "max"]) * scale)
        for arm, of_arm in recorded.groupby("arm", sort=False)
    ]


def _label(metric: str) -> str:
    return f"{metric} (%)" if is_share(metric) else metric
