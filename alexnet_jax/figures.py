"""Figures of a network: its first layer's filters (paper, figure 3) and its predictions (figure 4). Imports no JAX."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alexnet_jax import run_dir
from alexnet_jax.data import image_io

if TYPE_CHECKING:  # these modules import JAX, and the report does not need it
    from alexnet_jax.data.datasets import Dataset
    from alexnet_jax.evaluate import Outcomes

SHUFFLES = 1000
ERRORS_SHOWN = 25


def filter_grid(filters: np.ndarray) -> np.ndarray:
    """Arrange filters as in the paper's figure 3: the first tower's in the upper rows, the next one's below.

    Args:
      filters: (towers, height, width, channels, features) with 1 or 3 channels.

    Returns:
      RGB image (height, width, 3) from 0 to 1. Each filter is scaled to its own largest value; grey is zero.
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
    """Return the fraction of each filter's energy (sum of squares) off the grey axis.

    Args:
      filters: (towers, height, width, 3, features).

    Returns:
      (towers, features) from 0 (grey) to 1; 2/3 on average for noise.
    """
    grey = filters.sum(axis=3) ** 2 / filters.shape[3]
    energy = (filters**2).sum(axis=(1, 2, 3))
    return 1 - grey.sum(axis=(1, 2)) / energy.clip(1e-12)


def colour_metrics(filters: np.ndarray) -> dict[str, float]:
    """Measure how colour-specific the filters are, and whether one of two towers is more so (paper, section 6.1).

    Args:
      filters: (towers, height, width, channels, features).

    Returns:
      Nothing for grey images. Otherwise ``colour/share``, the mean of ``colour_fractions``. With two towers also
      ``colour/difference``, the absolute difference of the towers' means, and ``colour/excess``, that difference less
      its mean over ``SHUFFLES`` random assignments of the same filters to the towers.
    """
    if filters.shape[3] != 3:
        return {}
    fractions = colour_fractions(filters)
    metrics = {"colour/share": float(fractions.mean())}
    if len(fractions) != 2:
        return metrics
    difference = abs(float(fractions[0].mean() - fractions[1].mean()))
    generator = np.random.default_rng(0)
    shuffled = np.stack([generator.permutation(fractions.ravel()) for _ in range(SHUFFLES)])
    means = shuffled.reshape(SHUFFLES, *fractions.shape).mean(axis=2)
    by_chance = float(np.abs(means[:, 0] - means[:, 1]).mean())
    return metrics | {"colour/difference": difference, "colour/excess": difference - by_chance}


class Prediction(NamedTuple):
    """A network's prediction for one image file.

    Attributes:
      image: uint8 (size, size, channels), as the network receives it.
      truth: correct class, if the file's folder is named after a class; else None.
      classes: names of the (at most) five most probable classes, in descending order.
      probabilities: of these classes.
      neighbours: images and class names of the nearest held-out images, nearest first.
    """

    image: np.ndarray
    truth: str | None
    classes: list[str]
    probabilities: np.ndarray
    neighbours: list[tuple[np.ndarray, str]]


def confident_errors(outcomes: "Outcomes", dataset: "Dataset", size: int) -> np.ndarray:
    """Draw the misclassified held-out images of the highest loss, with correct and predicted class.

    Args:
      outcomes: those of ``dataset.evaluation``.
      dataset: images and class names.
      size: side of the images, in pixels.

    Returns:
      RGB image (height, width, 3) from 0 to 1.
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

    The bar of the correct class, if known, has another colour.
    """
    columns = 2 + max(len(prediction.neighbours) for prediction in predictions)
    widths = [1.0, 1.6] + [1.0] * (columns - 2)
    figure = Figure(figsize=(1.6 * sum(widths), 1.7 * len(predictions)), layout="constrained")
    grid = figure.add_gridspec(len(predictions), columns, width_ratios=widths)
    for row, prediction in enumerate(predictions):
        image, bars = (figure.add_subplot(grid[row, column]) for column in (0, 1))
        _show(image, prediction.image, prediction.truth or "")
        places = range(len(prediction.classes))
        colours = ["C3" if name == prediction.truth else "C0" for name in prediction.classes]
        bars.barh(places, prediction.probabilities, color=colours, alpha=0.6)
        for place, name in zip(places, prediction.classes, strict=True):
            bars.text(0.02, place, name, va="center", fontsize=9, parse_math=False)
        bars.invert_yaxis()
        bars.set(xlim=(0, 1), xticks=[], yticks=[])
        for column, (neighbour, name) in enumerate(prediction.neighbours, 2):
            _show(figure.add_subplot(grid[row, column]), neighbour, name)
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG, atomically."""
    with run_dir.atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _show(
    axes: Axes, image: np.ndarray, title: str = "", extent: tuple[float, float, float, float] | None = None
) -> None:
    """Draw a uint8 image, grey or RGB, without ticks; extent: left, right, bottom, top in units of the axes."""
    axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, extent=extent)
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_axis_off()
