"""Draw the README's figure of the two towers: python experiments/figures/towers.py

Writes towers.svg beside the script. The sizes and the numbers are those of `configs/networks/paper.py`.
"""

import math
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon
from matplotlib.path import Path as Curve

from alexnet_jax.config import reference_run
from alexnet_jax.configs.networks import paper
from alexnet_jax.tools import summary
from alexnet_jax.tools.summary import Row

WIDTH, HEIGHT = 812, 400  # pixels
TOWERS = {0: ("#3b6fb6", "#a9c5e8", "#dbe8f6"), 1: ("#c8662b", "#f0bf9c", "#fae4d5")}  # edge, side, front
CENTRES = {0: 292, 1: 108}  # y of each tower's boxes
INK, QUIET, ACCENT = "#24292f", "#6e7781", "#6f42c1"
IMAGE_X, FIRST_X, STEP_X = 44, 130, 81
ARRIVAL = 16  # pixels between the arrows that arrive at a box from the two towers
CLASSES = 1000


def box_size(shape: tuple[int, ...], towers: int) -> tuple[float, float, float]:
    """Return width, height and depth in pixels of the box of one tower's feature map (height, width, features)."""
    if len(shape) == 1:
        return 8.0, 22 + 1.6 * math.sqrt(shape[0] / towers), 0.0
    side, features = 13 * math.sqrt(shape[0]), shape[-1] / towers
    return 1.55 * math.sqrt(features), 0.82 * side, 0.28 * side


def draw_box(axes: Axes, x: float, y: float, size: tuple[float, float, float], colours: tuple[str, str, str]) -> None:
    """Draw a box centred on (x, y): its front face, top and right side."""
    edge, side, front = colours
    width, height, depth = size
    left, right, bottom, top = x - (width + depth) / 2, x + (width - depth) / 2, y - height / 2, y + height / 2
    bottom, top = bottom - depth / 4, top - depth / 4
    away = depth / 2
    faces = [
        (front, [(left, bottom), (right, bottom), (right, top), (left, top)]),
        (side, [(right, bottom), (right + depth, bottom + away), (right + depth, top + away), (right, top)]),
        (front, [(left, top), (right, top), (right + depth, top + away), (left + depth, top + away)]),
    ]
    for colour, corners in faces:
        axes.add_patch(Polygon(corners, facecolor=colour, edgecolor=edge, linewidth=1, joinstyle="round", zorder=3))


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> None:
    """Draw an arrow that leaves and arrives horizontally."""
    middle = (start[0] + end[0]) / 2
    curve = Curve([start, (middle, start[1]), (middle, end[1]), end], [Curve.MOVETO, *[Curve.CURVE4] * 3])
    style = {"arrowstyle": "-|>,head_length=3.2,head_width=1.9", "capstyle": "butt", "joinstyle": "miter"}
    axes.add_patch(FancyArrowPatch(path=curve, color=colour, linewidth=width, shrinkA=0, zorder=2, **style))


def draw_pill(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Draw a number on a rounded white label."""
    width, height = 12 + 6.6 * len(text), 20
    pill = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=10", zorder=4
    )
    pill.set(facecolor="white", edgecolor=colour, linewidth=1.3)
    axes.add_patch(pill)
    axes.text(x, y - 0.5, text, color=colour, ha="center", va="center", fontsize=8.5, weight="bold", zorder=5)


def draw(rows: list[Row], towers: int, image_shape: tuple[int, int, int]) -> Figure:
    """Draw the layers of two towers, left to right, and what they send to each other."""
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    layers, middle = rows[:-1], sum(CENTRES.values()) / 2
    places = [FIRST_X + STEP_X * number for number in range(len(layers))]
    sizes = [box_size(row.maps, towers) for row in layers]

    def edge(number: int, side: int) -> float:
        """Return the x of the left (-1) or right (1) edge of a layer's box, with a margin."""
        width, _, depth = sizes[number]
        return places[number] + side * ((width + depth) / 2 + 3)

    def label(x: float, top: float, name: str, shape: tuple[int, ...]) -> None:
        axes.text(x, top, name, color=INK, ha="center", va="top", fontsize=9, weight="bold")
        text = "×".join(f"{length:,}" for length in shape)
        axes.text(x, top - 14, text, color=QUIET, ha="center", va="top", fontsize=7.5)

    image, logits = (3, 54, 18), (8, box_size(rows[-1].maps, 1)[1], 0)
    logits_x = places[-1] + 0.95 * STEP_X
    for x, name, size, shape in ((IMAGE_X, "image", image, image_shape), (logits_x, "logits", logits, rows[-1].maps)):
        draw_box(axes, x, middle, size, (QUIET, "#d0d7de", "#eef1f4"))
        label(x, middle - size[1] / 2 - 9, name, shape)
    for tower, y in CENTRES.items():
        colours, inwards = TOWERS[tower], -1 if tower == 0 else 1
        draw_arrow(axes, (IMAGE_X + 15, middle), (edge(0, -1), y), QUIET, 1.2)
        draw_arrow(axes, (edge(len(layers) - 1, 1), y), (logits_x - 7, middle - inwards * ARRIVAL / 2), QUIET, 1.2)
        axes.text(16, y + 54 - 86 * tower, f"tower {tower}", color=colours[0], fontsize=11, weight="bold")
        axes.text(16, y + 40 - 86 * tower, f"on device {tower}", color=colours[0], fontsize=8)
        for number, (row, x, size) in enumerate(zip(layers, places, sizes, strict=True)):
            draw_box(axes, x, y, size, colours)
            label(x, y + 82 if tower == 0 else y - 57, row.name, (*row.maps[:-1], row.maps[-1] // towers))
            if number == 0:
                continue
            crosses = row.sees == "all"
            end = edge(number, -1), y - inwards * crosses * ARRIVAL / 2
            draw_arrow(axes, (edge(number - 1, 1), y), end, colours[0], 1.2)
            if crosses:
                end = edge(number, -1), 2 * middle - y - inwards * ARRIVAL / 2
                draw_arrow(axes, (edge(number - 1, 1), y), end, ACCENT, 1.5)
    for number, row in enumerate(layers):
        if row.sent:
            draw_pill(axes, (edge(number - 1, 1) + edge(number, -1)) / 2, middle, f"{sum(row.sent):,}", ACCENT)
    note = "activations that each tower\nsends to the other, per image"
    axes.text(places[3] + 4, middle, note, color=ACCENT, ha="center", va="center", fontsize=8, linespacing=1.5)
    return figure


def main() -> None:
    """Draw the paper's network and write towers.svg."""
    run = reference_run(paper.get_config())
    image_shape = (run.data.crop, run.data.crop, 3)
    mpl.rcParams["svg.hashsalt"] = "towers"
    figure = draw(summary.rows(run.model, CLASSES, image_shape), run.model.towers, image_shape)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
