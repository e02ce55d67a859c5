"""Pictures of what a net says of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alexnet_jax import batches, records
from alexnet_jax.data import DataSet
from alexnet_jax.evaluate import Outcomes

MISTAKES = 25


class Prediction(NamedTuple):
    """What a net says of a picture.

    Attributes:
      image: (size, size, channels) of uint8, as the net sees it before it takes views.
      truth: its class, if the folder it is in is called as one; else None.
      classes: names of the five most probable classes, the most probable first; of all, where there are fewer.
      probabilities: of these.
      neighbours: images and class names of the nearest held-out images, the nearest first.
    """

    image: np.ndarray
    truth: str | None
    classes: list[str]
    probabilities: np.ndarray
    neighbours: list[tuple[np.ndarray, str]]


def mistakes(outcomes: Outcomes, dataset: DataSet, size: int) -> np.ndarray:
    """The held-out images that the net is most wrong about, with the right class and the one it took them for.

    Args:
      outcomes: of ``dataset.evaluation``.
      size: of the images, in pixels.

    Returns:
      (height, width, 3) from 0 to 1.
    """
    wrong = np.flatnonzero(outcomes.metrics["top1_error"])
    worst = wrong[np.argsort(-outcomes.metrics["loss"][wrong], kind="stable")][:MISTAKES]
    images = batches.read(dataset.evaluation, worst, size)["image"]
    figure = Figure(figsize=(8, 9))
    figure.suptitle(f"the {len(worst)} of {len(wrong)} mistakes with the highest loss")
    axes = figure.add_axes((0.02, 0.01, 0.96, 0.92))  # one for all: 25 of them take a second
    axes.set(xlim=(0, 5), ylim=(5, 0))
    for place, (position, image) in enumerate(zip(worst, images, strict=True)):
        row, column = divmod(place, 5)
        show(axes, image, (column + 0.12, column + 0.88, row + 0.96, row + 0.2))
        right, taken = (dataset.class_names[of[position]] for of in (outcomes.labels, outcomes.predicted))
        axes.text(column + 0.5, row + 0.18, f"{right}\nnot {taken}", fontsize=8, ha="center", va="bottom")
    return to_pixels(figure)


def figure_4(predictions: Sequence[Prediction]) -> Figure:
    """The paper's figure 4, a row for each picture: the picture, its most probable classes as bars, its neighbours.

    The bar of the right class, where that is known, has another colour.
    """
    near = max(len(prediction.neighbours) for prediction in predictions)
    widths = [1.0, 1.6] + [1.0] * near
    figure = Figure(figsize=(1.6 * sum(widths), 1.7 * len(predictions)), layout="constrained")
    grid = figure.add_gridspec(len(predictions), len(widths), width_ratios=widths)
    for row, prediction in enumerate(predictions):
        picture, bars = (figure.add_subplot(grid[row, column]) for column in (0, 1))
        show(picture, prediction.image)
        picture.set_title(prediction.truth or "", fontsize=9)
        places = range(len(prediction.classes))
        colours = ["C3" if name == prediction.truth else "C0" for name in prediction.classes]
        bars.barh(places, prediction.probabilities, color=colours, alpha=0.6)
        for place, name in zip(places, prediction.classes, strict=True):
            bars.text(0.02, place, name, va="center", fontsize=9)
        bars.invert_yaxis()
        bars.set(xlim=(0, 1), xticks=[], yticks=[])
        for column, (image, name) in enumerate(prediction.neighbours, 2):
            axes = figure.add_subplot(grid[row, column])
            show(axes, image)
            axes.set_title(name, fontsize=9)
    return figure


def save(figure: Figure, file: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    with records.whole(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)


def show(axes: Axes, image: np.ndarray, extent: tuple[float, float, float, float] | None = None) -> None:
    """An image of uint8, grey or RGB, without ticks; extent: left, right, bottom and top, in units of the axes."""
    axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, extent=extent)
    axes.set_axis_off()


def to_pixels(figure: Figure) -> np.ndarray:
    """A figure as (height, width, 3) from 0 to 1."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255
