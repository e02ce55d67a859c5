"""Plots of a study, from their data."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alexnet_jax.studies import analysis, plots


def test_figure_1_is_training_error_against_epochs_with_a_line_at_25(study: Path) -> None:
    (axes,) = plots.plot_figure_1(analysis.load_curves(study)).axes
    first, second, target = axes.lines
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--")  # as in the paper
    np.testing.assert_allclose(sorted(np.asarray(first.get_ydata())), [20, 25, 25, 25])
    np.testing.assert_allclose(np.asarray(target.get_ydata()), [25, 25])


def test_curves_are_means_with_bands_from_lowest_to_highest(study: Path) -> None:
    (axes,) = plots.plot_curves(analysis.load_curves(study), "eval/top1_error").axes
    assert [line.get_label() for line in axes.lines] == ["lrn", "no_lrn"]
    np.testing.assert_allclose(np.asarray(axes.lines[0].get_xdata()), [0.1, 0.2])
    np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), [11.0, 5.5])
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [5.0, 12.0])


def test_curves_can_have_a_logarithmic_axis(study: Path) -> None:
    curves = analysis.load_curves(study)
    scales = [plots.plot_curves(curves, "eval/loss", log=log).axes[0].get_yscale() for log in (False, True)]
    assert scales == ["linear", "log"]


def test_curves_without_the_metric_are_empty(study: Path) -> None:
    (axes,) = plots.plot_curves(analysis.load_curves(study), "train/loss").axes
    assert not axes.lines


def test_arms_are_dots_a_diamond_and_an_interval(study: Path) -> None:
    runs = analysis.load_runs(study)
    (axes,) = plots.plot_arms(runs).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lrn", "no_lrn"]
    dots, interval, mean = (np.asarray(line.get_xdata(), float) for line in axes.lines[:3])
    compared = analysis.compare(runs).loc["lrn"]
    np.testing.assert_allclose(dots, [10, 12, 11])
    np.testing.assert_allclose(interval, 100 * compared[["low", "high"]].to_numpy(float))
    np.testing.assert_allclose(mean, [11])


def test_forest_plot_shows_effect_interval_paper_and_margin_of_each_claim(study: Path) -> None:
    effects = analysis.claim_effects(study)
    differences, ratios = plots.plot_effects(effects).axes
    for axes, row, scale, none in ((differences, effects.iloc[0], 100, 0), (ratios, effects.iloc[1], 1, 1)):
        zero, interval, effect, paper = (np.asarray(line.get_xdata(), float) for line in axes.lines)
        assert zero.tolist() == [none, none]
        np.testing.assert_allclose(interval, [row["low"] * scale, row["high"] * scale])
        np.testing.assert_allclose([*effect, *paper], [row["effect"] * scale, row["paper"] * scale])
    margins = [np.asarray(axes.collections[0].get_paths()[0].vertices)[:, 0] for axes in (differences, ratios)]
    np.testing.assert_allclose([[band.min(), band.max()] for band in margins], [[-0.7, 0.7], [0.8, 1.25]])
    assert ratios.get_xscale() == "log"
    assert [label.get_text() for label in differences.get_yticklabels()] == ["no_lrn: eval/top1_error"]


@pytest.mark.parametrize("seeds", [0, 1])
def test_forest_plot_needs_no_interval(study: Path, seeds: int) -> None:
    effects = analysis.claim_effects(study).assign(low=np.nan, high=np.nan)
    if seeds == 0:
        effects = effects.assign(effect=np.nan)
    plots.plot_effects(effects).draw_without_rendering()


def test_forest_plot_of_several_studies_has_all_their_claims(study: Path) -> None:
    effects = analysis.claim_effects(study)
    axes = plots.plot_effects(pd.concat([effects, effects])).axes
    assert [len(of_unit.get_yticks()) for of_unit in axes] == [2, 2]
