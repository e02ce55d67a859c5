"""Predict the classes of image files with a trained network.

Prints the five most probable classes of each and draws the paper's figure 4: these classes on the left; on the right
the held-out images that are nearest in the last hidden layer.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict
from rich.table import Column, Table

from alexnet_jax import config as config_lib
from alexnet_jax import evaluate, figures, terminal, weights
from alexnet_jax.data import augment, datasets, image_io, loader
from alexnet_jax.data.datasets import Source
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.evaluate import Predictor
from alexnet_jax.figures import Prediction
from alexnet_jax.model import AlexNet
from alexnet_jax.parallel import TOWER, Executor, initialize, make_executor
from alexnet_jax.run_dir import RunDir

NEIGHBOURS = 6


def predict(
    run: Path,
    files: Sequence[Path],
    *,
    config: ConfigDict | None = None,
    views: int | None = None,
    neighbours: int | None = 0,
    data_dir: str | None = None,
) -> list[Prediction]:
    """Predict the classes of image files with the network of a run, or of a file of weights.

    Args:
      run: folder of a run, or a file of weights, which needs its config.
      files: images of any size; resized and cropped as in preparation (paper, section 2).
      views: 1 or 10 per image; None: as the run's config.
      neighbours: number of nearest held-out images to find, by Euclidean distance of `features` (section 6.1). None: 6,
        or without the dataset none, with a line on standard error.
      data_dir: folder of datasets; None: as the run's config.

    Raises:
      ValueError: the folder has no trained network, a file is no image, or there are fewer held-out images.
    """
    network = weights.load_network(run, config)
    config = network.config.copy_and_resolve_references()
    config.eval.views = views or config.eval.views
    config.data.data_dir = config.data.data_dir if data_dir is None else data_dir
    names = network.class_names or [str(label) for label in range(network.classes)]
    images = np.stack([_read(file, config.data.image_size, network.channels) for file in files])
    executor = make_executor("auto", config.model.towers, config.eval.batch_size)
    variables, statistics = executor.place(network.variables), executor.replicate(network.known_statistics())
    nearest: list[list[tuple[np.ndarray, str]]] = [[] for _ in files]
    dataset = None if neighbours == 0 else _dataset(run, config, optional=neighbours is None)
    if dataset is not None:
        held_out = dataset.evaluation
        neighbours = min(NEIGHBOURS, len(held_out)) if neighbours is None else neighbours
        if neighbours > len(held_out):
            raise ValueError(f"--neighbours={neighbours}: must be at most the {len(held_out)} held-out images")
        of_images = functools.partial(features(config, network.classes, executor), variables, statistics)
        for index, positions in enumerate(_nearest(of_images, images, held_out, config, neighbours)):
            batch = loader.read(held_out, positions, config.data.image_size)
            nearest[index] = list(
                zip(batch["image"], [dataset.class_names[label] for label in batch["label"]], strict=True)
            )
    logits = evaluate.make_predictor(config, network.classes, executor)(variables, statistics, images)
    softmax = np.asarray(jax.nn.softmax(logits))
    predictions = []
    for file, image, probabilities, near in zip(files, images, softmax, nearest, strict=True):
        best = np.argsort(-probabilities, kind="stable")[:5]
        folder = file.absolute().parent.name
        truth = folder if folder in names else None
        predictions.append(Prediction(image, truth, [names[label] for label in best], probabilities[best], near))
    return predictions


def features(config: ConfigDict, classes: int, executor: Executor) -> Predictor:
    """Return the compiled function (variables, statistics, images) -> last hidden layer of the images' centre crops.

    Its result has the features of all towers, (batch, neurons): 4,096 neurons in the paper.
    """
    model, last = AlexNet(config.model, classes), config.model.order[-1]
    (centre,) = augment.evaluation_views(1, config.data.image_size, config.data.crop)

    def last_inputs(variables: Any, statistics: Statistics, images: jax.Array) -> jax.Array:
        captured: list[jax.Array] = []

        def capture(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if context.module.name == last:
                captured.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(capture):
            model.apply(variables, augment.inputs(images, centre, config.data, statistics), train=False)
        hidden = captured[0].reshape(len(images), -1)
        sees_all = config.model.layers[last].sees == "all"
        return hidden if sees_all else lax.all_gather(hidden, TOWER, axis=1, tiled=True)

    return evaluate.map_over_batch(last_inputs, executor)


def _dataset(run: Path, config: ConfigDict, *, optional: bool) -> datasets.Dataset | None:
    """Return the dataset of a run or file; if it is optional and not there, print a line and return None."""
    try:
        dataset = datasets.load(config.data)
        RunDir(run).check_dataset(dataset.metadata(config.data))
    except ValueError as error:
        if not optional:
            raise
        print(f"nearest held-out images are left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return dataset


def _nearest(
    of_images: Callable[[np.ndarray], jax.Array], images: np.ndarray, held_out: Source, config: ConfigDict, count: int
) -> np.ndarray:
    """Return the positions (images, count) of the held-out images whose features are nearest, nearest first."""
    queries = np.asarray(of_images(images), np.float64)
    distances = []
    for batch in loader.all_batches(held_out, config, config.eval.batch_size):
        candidates = np.asarray(of_images(batch["image"]), np.float64)[batch["mask"]]
        distances.append(np.linalg.norm(queries[:, None] - candidates, axis=2))
    return np.argsort(np.concatenate(distances, axis=1), axis=1, kind="stable")[:, :count]


def _read(file: Path, size: int, channels: int) -> np.ndarray:
    """Read an image file as the network's input, uint8 (size, size, channels)."""
    try:
        return image_io.resize_and_crop(image_io.decode(file.read_bytes(), channels), size)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read as an image ({error}); give JPEG, PNG or the like") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb predict."""
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of a run, such as runs/ablation_lrn/lrn/seed_0, or weights"
    )
    parser.add_argument("--config", metavar="FILE[:SCALE]", help="architecture of a file of weights")
    parser.add_argument("--views", type=int, choices=(1, 10), help="views per image; default: as the run's config")
    parser.add_argument(
        "--neighbours",
        type=int,
        help=f"held-out images to find for each image; 0: none; default: {NEIGHBOURS}, or none without the dataset",
    )
    parser.add_argument("--data_dir", help="folder of datasets; default: as the run's config")
    parser.add_argument("--output", type=Path, default=Path("predictions.png"), help="figure; default: %(default)s")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image file")


def main(arguments: argparse.Namespace) -> None:
    """Print the most probable classes of each image, and draw them."""
    if arguments.neighbours is not None and arguments.neighbours < 0:
        raise ValueError(f"--neighbours={arguments.neighbours}: must be 0 or more")
    if arguments.output.suffix.lower() not in figures.FORMATS:
        raise ValueError(f"--output={arguments.output}: must end in one of {', '.join(figures.FORMATS)}")
    config = None if arguments.config is None else config_lib.reference_run(arguments.config)
    trained = config or RunDir(arguments.run).read_config()
    initialize(trained.model.towers if trained else 1)
    predictions = predict(
        arguments.run,
        arguments.images,
        config=config,
        views=arguments.views,
        neighbours=arguments.neighbours,
        data_dir=arguments.data_dir,
    )
    table = Table(Column("image", overflow="fold"), "class")
    table.add_column("probability, %", justify="right")
    for file, prediction in zip(arguments.images, predictions, strict=True):
        for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
            table.add_row(str(file) if name == prediction.classes[0] else "", name, f"{100 * probability:.2f}")
        table.add_section()
    terminal.console().print(table)
    figures.save(figures.figure_4(predictions), arguments.output)
    print(arguments.output)
