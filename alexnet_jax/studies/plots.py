"""Plots of a study's runs, from the data frames of `analysis`. Imports neither JAX nor the model."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

from alexnet_jax.studies.analysis import AT_LEAST, AT_MOST, TARGET_ERROR, compare, is_fraction


def plot_arms(runs: pd.DataFrame, metric: str = "eval/top1_error") -> Figure:
    """Plot a metric of each arm: a dot for each seed, a diamond for the mean, a line for its 95 % CI."""
    compared, scale = compare(runs, metric), _scale(metric)
    figure = Figure(figsize=(7, 0.8 + 0.4 * len(compared)), layout="constrained")
    axes = figure.add_subplot()
    for place, (arm, row) in enumerate(compared.iterrows()):
        values = runs.loc[runs["arm"] == arm, metric].dropna() * scale
        axes.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.5, markersize=5)
        axes.plot([row["low"] * scale, row["high"] * scale], [place] * 2, color=f"C{place}")
        axes.plot(row["mean"] * scale, place, "D", color=f"C{place}")
    _name_rows(axes, list(compared.index), _label(metric))
    return figure


def plot_effects(effects: pd.DataFrame) -> Figure:
    """Plot the claims as a forest plot: differences of errors, ratios, and other differences on axes of their own.

    A dot and a line are the effect measured and its 95 % CI, a triangle points from a bound to where the effect is, the
    diamond is the paper's effect, the grey band the margin. The axis of errors is linear up to 2 points and
    logarithmic beyond. The frames of several studies may be concatenated.
    """
    units = effects.apply(_unit, axis="columns")
    counts = units.value_counts(sort=False)
    names = effects["arm"] + ": " + effects["metric"]
    width = 4 + 0.07 * names.str.len().max()  # of the axes and of the longest name, in inches
    figure = Figure(figsize=(width, 0.4 * len(effects) + 0.9 * len(counts)), layout="constrained")
    grid: Any = figure.subplots(len(counts), squeeze=False, height_ratios=[count + 1 for count in counts])
    for axes, unit in zip(grid[:, 0], counts.index, strict=True):
        of_unit = effects[units == unit]
        scale = 100 if unit == POINTS else 1
        axes.axvline(1 if unit == RATIO else 0, color="black", linewidth=1)
        if unit == RATIO:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        elif unit == POINTS:
            axes.set_xscale("symlog", linthresh=2)
            ticks = (1, 2, 5, 10, 20, 50)
            axes.xaxis.set_major_locator(FixedLocator([*(-tick for tick in ticks), 0, *ticks]))
            axes.xaxis.set_major_formatter("{x:g}")
        for place, row in enumerate(of_unit.itertuples()):
            band = (1 / row.margin, row.margin) if unit == RATIO else (-row.margin * scale, row.margin * scale)
            axes.fill_betweenx([place - 0.35, place + 0.35], *band, color="gray", alpha=0.25, linewidth=0)
            axes.plot([row.low * scale, row.high * scale], [place] * 2, color="C0")
            axes.plot(row.effect * scale, place, {"": "o", AT_LEAST: ">", AT_MOST: "<"}.get(row.bound, "x"), color="C0")
            axes.plot(row.paper * scale, place, "D", color="C1", fillstyle="none")
        _name_rows(axes, names[units == unit].tolist(), unit)
    return figure


def plot_curves(curves: pd.DataFrame, metric: str, *, log: bool = False) -> Figure:
    """Plot a metric against epochs: a line for each arm's mean over seeds, a band from the lowest to the highest."""
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for arm, by_epoch in _by_epoch(curves, metric):
        (line,) = axes.plot(by_epoch.index, by_epoch["mean"], label=arm, marker="." if len(by_epoch) < 20 else "")
        axes.fill_between(by_epoch.index, by_epoch["min"], by_epoch["max"], color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xlabel="epoch", ylabel=_label(metric))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        _add_legend(axes)
    return figure


def plot_figure_1(curves: pd.DataFrame) -> Figure:
    """Plot the paper's figure 1: training error against epochs, the first arm solid, the others dashed, 25 % dotted."""
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for place, (arm, by_epoch) in enumerate(_by_epoch(curves, "train/top1_error")):
        axes.plot(by_epoch.index, by_epoch["mean"], label=arm, linestyle="-" if place == 0 else "--", color=f"C{place}")
    axes.axhline(100 * TARGET_ERROR, color="gray", linestyle=":")
    axes.annotate("25 %", (1, 100 * TARGET_ERROR), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel="epochs", ylabel="training error rate (%)", ylim=(0, None))
    if len(axes.lines) > 1:
        _add_legend(axes)
    return figure


POINTS, RATIO = "difference (percentage points)", "ratio to the first arm"


def _unit(effect: pd.Series) -> str:
    """Return the label of the axis that an effect is on."""
    if effect["ratio"]:
        return RATIO
    return POINTS if is_fraction(effect["metric"]) else f"difference of {effect['metric']} to the first arm"


def _name_rows(axes: Axes, names: list[str], xlabel: str) -> None:
    """Label the rows of a plot, the first at the top."""
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlabel=xlabel, ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)


def _add_legend(axes: Axes) -> None:
    """Name the lines of a plot; the name of an arm is no formula."""
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)


def _by_epoch(curves: pd.DataFrame, metric: str) -> list[tuple[str, pd.DataFrame]]:
    """Return for each arm the mean, min and max over seeds at each epoch; errors in percent."""
    logged = curves.dropna(subset=[metric]) if metric in curves else curves.iloc[:0]
    return [
        (str(arm), of_arm.groupby("epoch")[metric].agg(["mean", "min", "max"]) * _scale(metric))
        for arm, of_arm in logged.groupby("arm", sort=False)
    ]


def _scale(metric: str) -> int:
    return 100 if is_fraction(metric) else 1


def _label(metric: str) -> str:
    return f"{metric} (%)" if is_fraction(metric) else metric
