"""Figures of filters and predictions, and how colour-specific filters are."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from alexnet_jax import figures
from alexnet_jax.data.datasets import Arrays, Dataset
from alexnet_jax.evaluate import Outcomes
from alexnet_jax.figures import Prediction

UNBALANCED = "$\\frac{$"  # mathtext would refuse it


def test_filters_are_arranged_tower_by_tower() -> None:
    filters = np.zeros((2, 5, 4, 3, 20))
    filters[0, 0, 0, 0, 17] = 2.0  # the first tower's second row, second column: one red corner
    filters[1, ..., 3] = -1.0  # the second tower's first row, fourth column: all black
    grid = figures.filter_grid(filters)
    assert grid.shape == (2 * 2 * 6, 16 * 5, 3)
    np.testing.assert_array_equal(grid[6, 5], [1.0, 0.5, 0.5])
    assert (grid[12:17, 15:19] == 0).all()
    grid[6, 5] = grid[12:17, 15:19] = 0.5
    assert set(np.unique(grid)) == {0.5, 1.0}  # zero is grey, gaps are white


def test_filters_of_grey_images_are_grey_and_use_the_whole_range() -> None:
    filters = np.random.default_rng(0).normal(size=(2, 5, 5, 1, 4))
    grid = figures.filter_grid(filters)
    assert (grid == grid[..., :1]).all()
    extremes = 0.5 + 0.5 * filters / np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    assert grid.min() == extremes.min()
    assert grid.max() == 1.0
    assert grid.min() >= 0.0


def test_colour_fraction_is_the_energy_off_the_grey_axis() -> None:
    filters = np.zeros((1, 2, 2, 3, 4))
    filters[0, 0, 0, :, 0] = 2.0  # grey
    filters[0, 1, :, :, 1] = [1.0, -1.0, 0.0]  # a colour without brightness
    filters[0, 0, 1, 0, 2] = 5.0  # red: a third of its energy is grey
    filters[0, ..., 3] = np.random.default_rng(0).normal(size=(2, 2, 3)) * 1e-3
    fractions = figures.colour_fractions(filters)[0]
    np.testing.assert_allclose(fractions[:3], [0.0, 1.0, 2 / 3], atol=1e-12)
    np.testing.assert_allclose(figures.colour_fractions(filters * 7)[0], fractions)  # the scale does not matter
    noise = np.random.default_rng(0).normal(size=(1, 11, 11, 3, 500))
    assert abs(figures.colour_metrics(noise)["colour/share"] - 2 / 3) < 0.01


def test_colour_excess_is_large_for_specialised_towers_and_zero_for_noise() -> None:
    generator = np.random.default_rng(0)
    grey = np.repeat(generator.normal(size=(1, 5, 5, 1, 48)), 3, axis=3)
    colour = generator.normal(size=(1, 5, 5, 3, 48))
    colour -= colour.mean(axis=3, keepdims=True)
    metrics = figures.colour_metrics(np.concatenate([grey, colour]))
    swapped = figures.colour_metrics(np.concatenate([colour, grey]))
    assert metrics["colour/difference"] == swapped["colour/difference"]
    np.testing.assert_allclose(metrics["colour/difference"], 1.0)
    assert metrics["colour/excess"] > 0.8
    excesses = [figures.colour_metrics(generator.normal(size=(2, 5, 5, 3, 48)))["colour/excess"] for _ in range(50)]
    assert abs(np.mean(excesses)) < 2.5 * np.std(excesses) / 50**0.5


def test_grey_images_have_no_colour_metrics_and_one_tower_no_difference() -> None:
    generator = np.random.default_rng(0)
    assert figures.colour_metrics(generator.normal(size=(2, 5, 5, 1, 4))) == {}
    assert set(figures.colour_metrics(generator.normal(size=(1, 5, 5, 3, 4)))) == {"colour/share"}


def test_confident_errors_are_the_misclassified_images_of_the_highest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (200, 8, 8, 1)).astype(np.uint8), np.arange(200) // 20
    source = Arrays(images, labels)
    names = [*map(str, range(9)), UNBALANCED]
    dataset = Dataset(source, None, source, names, channels=1)
    wrong = np.arange(200) % 20 == 7
    losses = np.where(wrong, np.arange(200), 2000.0)  # correct images do not count, however large their loss
    outcomes = Outcomes({"loss": losses, "top1_error": wrong.astype(float)}, labels, np.full(200, 9))
    drawn: list[Figure] = []
    render = figures.render

    def spy(figure: Figure) -> np.ndarray:
        drawn.append(figure)
        return render(figure)

    monkeypatch.setattr(figures, "render", spy)
    image = figures.confident_errors(outcomes, dataset, 8)
    assert image.shape[-1] == 3
    assert 0 <= image.min() < image.max() == 1
    (axes,) = drawn[0].axes
    for shown, position in zip(axes.images, range(187, 0, -20), strict=True):
        np.testing.assert_array_equal(shown.get_array(), images[position].squeeze())
    assert [text.get_text() for text in axes.texts] == [
        f"{names[label]}\nnot {UNBALANCED}" for label in range(9, -1, -1)
    ]


def test_figure_4_has_images_bars_and_neighbours() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    known = Prediction(image, "cat", ["dog", "cat"], np.array([0.7, 0.3]), [(image, "cat"), (image, UNBALANCED)])
    unknown = known._replace(truth=None, classes=[UNBALANCED, "cat"])
    figure = figures.figure_4([known, unknown])
    figures.render(figure)
    axes = figure.axes
    assert [ax.get_title() for ax in axes] == ["cat", "", "cat", UNBALANCED, "", "", "cat", UNBALANCED]
    assert [bar.get_width() for bar in axes[1].patches] == [0.7, 0.3]  # type: ignore[attr-defined]
    dog, cat = (bar.get_facecolor() for bar in axes[1].patches)
    assert dog != cat
    assert {bar.get_facecolor() for bar in axes[5].patches} == {dog}
    assert [text.get_text() for text in axes[1].texts] == ["dog", "cat"]


def test_figures_import_no_jax() -> None:
    """The report draws them where JAX is not installed."""
    script = "import sys; from alexnet_jax import figures; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
