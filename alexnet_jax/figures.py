"""Figures of a network: its first layer's filters (paper, figure 3) and its predictions (figure 4). Imports no JAX."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alexnet_jax import run_dir
from alexnet_jax.data import image_io

if TYPE_CHECKING:  # these modules import JAX, and the report does not need it
    from alexnet_jax.data.datasets import Dataset
    from alexnet_jax.evaluate import Outcomes

FORMATS = (".png", ".jpg", ".pdf", ".svg")  # in which `save` writes
SHUFFLES = 1000
ERRORS_SHOWN = 25


def filter_grid(filters: np.ndarray) -> np.ndarray:
    """Arrange filters as in the paper's figure 3: the first tower's in the upper rows, the next one's below.

    Filters (towers, height, width, 1 or 3 channels, features) give an RGB image (height, width, 3) from 0 to 1. Each
    filter is scaled to its own largest value; grey is zero.
    """
    towers, height, width, _, features = filters.shape
    columns = min(features, 16)
    rows = -(-features // columns)
    filters = filters / np.abs(filters).max(axis=(1, 2, 3), keepdims=True).clip(1e-12)
    grid = np.full((towers * rows, height + 1, columns, width + 1, 3), 1.0)
    for tower in range(towers):
        for feature in range(features):
            row, column = divmod(feature, columns)
            grid[tower * rows + row, :height, column, :width] = 0.5 + 0.5 * filters[tower, ..., feature]
    return grid.reshape(towers * rows * (height + 1), columns * (width + 1), 3)


def colour_fractions(filters: np.ndarray) -> np.ndarray:
    """Return the fraction of each filter's energy (sum of squares) off the grey axis, (towers, features).

    It is 0 for grey and 2/3 on average for noise.
    """
    grey = filters.sum(axis=3) ** 2 / filters.shape[3]
    energy = (filters**2).sum(axis=(1, 2, 3))
    return 1 - grey.sum(axis=(1, 2)) / energy.clip(1e-12)


def colour_metrics(filters: np.ndarray) -> dict[str, float]:
    """Measure how colour-specific the filters are, and whether one of two towers is more so (paper, section 6.1).

    `colour/share` is the mean of `colour_fractions`. For two towers, `colour/difference` is the absolute
    difference of their means, and `colour/excess` that difference less its mean over `SHUFFLES` random assignments
    of the same filters to the towers. Filters of grey images have no metrics.
    """
    if filters.shape[3] != 3:
        return {}
    fractions = colour_fractions(filters)
    metrics = {"colour/share": float(fractions.mean())}
    if len(fractions) != 2:
        return metrics
    difference, by_chance = tower_difference(fractions, SHUFFLES)
    excess = difference - float(by_chance.mean())
    return metrics | {"colour/difference": difference, "colour/excess": excess}


def tower_difference(fractions: np.ndarray, shuffles: int) -> tuple[float, np.ndarray]:
    """Return how much the means of two towers differ, and how much they do in random assignments to the towers.

    Args:
      fractions: of the filters of each tower, (2, filters).

    Returns:
      The absolute difference of the means, and that of each assignment, (shuffles,).
    """
    shuffled = np.random.default_rng(0).permuted(np.tile(fractions.ravel(), (shuffles, 1)), axis=1)
    by_chance = np.abs(np.diff(shuffled.reshape(shuffles, 2, -1).mean(axis=2)))[:, 0]
    return abs(float(fractions[0].mean() - fractions[1].mean())), by_chance


class Prediction(NamedTuple):
    """A network's prediction for one image file."""

    image: np.ndarray  # uint8 (size, size, channels), as the network receives it
    truth: str | None  # correct class, if the file's folder is named after a class
    classes: list[str]  # the (at most) five most probable ones, in descending order
    probabilities: np.ndarray  # of these classes
    neighbours: list[tuple[np.ndarray, str]]  # images and class names of the nearest held-out images, nearest first


def confident_errors(outcomes: "Outcomes", dataset: "Dataset", size: int) -> np.ndarray:
    """Draw the misclassified images of `dataset.evaluation` with the highest loss, and their classes.

    Images have sides of `size` pixels; the result is an RGB image (height, width, 3) from 0 to 1.
    """
    wrong = np.flatnonzero(outcomes.metrics["top1_error"])
    worst = wrong[np.argsort(-outcomes.metrics["loss"][wrong], kind="stable")][:ERRORS_SHOWN]
    figure = Figure(figsize=(8, 9))
    figure.suptitle(f"{len(worst)} most confident of {len(wrong)} errors")
    axes = figure.add_axes((0.02, 0.01, 0.96, 0.92))  # one for all images: 25 axes take a second to draw
    axes.set(xlim=(0, 5), ylim=(5, 0))
    axes.set_axis_off()
    image = np.empty((size, size, dataset.channels), np.uint8)
    for place, position in enumerate(worst):
        row, column = divmod(place, 5)
        image_io.decode_into(image, dataset.evaluation[int(position)]["image"])
        _show(axes, image.copy(), extent=(column + 0.12, column + 0.88, row + 0.96, row + 0.2))
        label, predicted = (dataset.class_names[classes[position]] for classes in (outcomes.labels, outcomes.predicted))
        text = f"{label}\nnot {predicted}"
        axes.text(column + 0.5, row + 0.18, text, fontsize=8, ha="center", va="bottom", parse_math=False)
    return render(figure)


def render(figure: Figure) -> np.ndarray:
    """Return a figure as an RGB image (height, width, 3) from 0 to 1."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def figure_4(predictions: Sequence[Prediction]) -> Figure:
    """Draw the paper's figure 4: a row per image with the image, its most probable classes and its neighbours.

    The bar of the correct class, if known, has another colour. All images have equally many neighbours.
    """
    widths = [1.0, 1.6] + [1.0] * len(predictions[0].neighbours)
    figure = Figure(figsize=(1.6 * sum(widths), 1.7 * len(predictions)), layout="constrained")
    grid: Any = figure.subplots(len(predictions), len(widths), squeeze=False, width_ratios=widths)
    for (image, bars, *others), prediction in zip(grid, predictions, strict=True):
        _show(image, prediction.image, prediction.truth or "")
        places = range(len(prediction.classes))
        colours = ["C3" if name == prediction.truth else "C0" for name in prediction.classes]
        bars.barh(places, prediction.probabilities, color=colours, alpha=0.6)
        for place, name in zip(places, prediction.classes, strict=True):
            bars.text(0.02, place, name, va="center", fontsize=9, parse_math=False)
        bars.invert_yaxis()
        bars.set(xlim=(0, 1), xticks=[], yticks=[])
        for axes, neighbour in zip(others, prediction.neighbours, strict=True):
            _show(axes, *neighbour)
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write a figure, atomically, in the format that the file's name ends in, one of `FORMATS`."""
    with run_dir.atomic_write(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:].lower(), dpi=150)


def _show(axes: Axes, image: np.ndarray, title: str = "", **options: Any) -> None:
    """Draw a uint8 image, grey or RGB, without ticks; with options of `Axes.imshow`."""
    axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, **options)
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_axis_off()
