"""Pictures of what a net says of images."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alexnet_jax import batches
from alexnet_jax.data import DataSet
from alexnet_jax.evaluate import Outcomes

MISTAKES = 25


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
    figure = Figure(figsize=(8, 9), layout="constrained")
    figure.suptitle(f"the {len(worst)} of {len(wrong)} mistakes with the highest loss")
    for place, (position, image) in enumerate(zip(worst, images, strict=True)):
        axes = figure.add_subplot(5, 5, place + 1)
        show(axes, image)
        right, taken = (dataset.class_names[of[position]] for of in (outcomes.labels, outcomes.predicted))
        axes.set_title(f"{right}\nnot {taken}", fontsize=8)
    return to_pixels(figure)


def show(axes: Axes, image: np.ndarray) -> None:
    """An image of uint8, grey or RGB, without ticks."""
    axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()


def to_pixels(figure: Figure) -> np.ndarray:
    """A figure as (height, width, 3) from 0 to 1."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255
