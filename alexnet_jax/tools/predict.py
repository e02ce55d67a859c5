"""What a trained net sees in pictures: python -m alexnet_jax.predict --run=DIR [--views=10] [--neighbours=6] IMAGE...

Prints the five most probable classes of each and draws the paper's figure 4: those on the left, and on the right the
held-out images that are nearest to it in the last hidden layer.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from alexnet_jax import augment, batches, checkpoint, data, evaluate, logs, panels, pictures, records, towers
from alexnet_jax.checkpoint import Weights
from alexnet_jax.model import AlexNet
from alexnet_jax.panels import Prediction
from alexnet_jax.pixels import Pixels
from alexnet_jax.towers import TOWER, Executor, all_rows, own_rows


def predict(
    workdir: Path, files: Sequence[Path], *, views: int | None = None, neighbours: int = 0, data_dir: str | None = None
) -> list[Prediction]:
    """What the net of a run says of pictures.

    Args:
      workdir: the run's folder.
      files: of any format and size; scaled and cut as in preparation (paper, section 2).
      views: 1 or 10 of each; None: as the run's config has it.
      neighbours: how many of the held-out images to find, by Euclidean distance of ``features`` (section 6.1).
      data_dir: where data sets are; None: as the run's config has it.

    Raises:
      ValueError: the folder holds no run that has begun, a file is no picture, or there are fewer held-out images.
    """
    run = checkpoint.read_run(workdir)
    config = run.config.copy_and_resolve_references()
    config.eval.views = views or config.eval.views
    config.data.data_dir = config.data.data_dir if data_dir is None else data_dir
    names = (records.read_json(workdir / "dataset.json") or {}).get("class_names", list(map(str, range(run.classes))))
    images = np.stack([_read(file, run) for file in files])
    seen, executor = run.known_pixels(), Executor(config.train.executor, config.model.towers)
    params = executor.place(run.params)
    nearest: list[list[tuple[np.ndarray, str]]] = [[] for _ in files]
    if neighbours:
        held_out = data.load(config.data).evaluation
        if neighbours > len(held_out):
            raise ValueError(f"--neighbours={neighbours}: must be at most the {len(held_out)} held-out images")
        nearest = _neighbours(config, run.classes, seen, executor, params, images, held_out, names, neighbours)
    logits = evaluate.predictor(config, run.classes, seen, executor)(params, images)
    found = []
    for file, image, probabilities, near in zip(
        files, images, np.asarray(jax.nn.softmax(logits)), nearest, strict=True
    ):
        best = np.argsort(-probabilities, kind="stable")[:5]
        truth = file.absolute().parent.name
        found.append(
            Prediction(image, truth if truth in names else None, [names[i] for i in best], probabilities[best], near)
        )
    return found


def features(config: ConfigDict, classes: int, pixels: Pixels, executor: Executor) -> Callable[[Any, Any], jax.Array]:
    """The compiled function from parameters and uint8 images to what the last layer sees of their centre crops.

    That is the last hidden layer of all towers, (batch, neurons): 4,096 in the paper.
    """
    model, last = AlexNet(config.model, classes), config.model.order[-1]
    (centre,) = augment.evaluation_views(1, config.data.image_size, config.data.crop)

    def tower(params: Any, images: jax.Array) -> jax.Array:
        inputs: list[jax.Array] = []

        def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if context.module.name == last:
                inputs.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            own = augment.inputs(own_rows(images), centre, config.data, pixels)
            model.apply({"params": params}, own, train=False)
        (found,) = inputs
        found = all_rows(found.reshape(len(found), -1), len(images))
        return found if config.model.layers[last].crosses else lax.all_gather(found, TOWER, axis=1, tiled=True)

    return executor.map(tower, in_axes=(0, None), out_axes=None)


def _neighbours(
    config: ConfigDict,
    classes: int,
    pixels: Pixels,
    executor: Executor,
    params: Any,
    images: np.ndarray,
    held_out: data.Source,
    names: Sequence[str],
    count: int,
) -> list[list[tuple[np.ndarray, str]]]:
    """The nearest held-out images to each image, with the names of their classes."""
    of_net = features(config, classes, pixels, executor)
    wanted = np.asarray(of_net(params, images), np.float64)
    distances = np.concatenate(
        [
            np.linalg.norm(
                wanted[:, None] - np.asarray(of_net(params, batch["image"]), np.float64)[batch["mask"]], axis=2
            )
            for batch in batches.all_batches(held_out, config)
        ],
        axis=1,
    )
    found = []
    for positions in np.argsort(distances, axis=1, kind="stable")[:, :count]:
        read = batches.read(held_out, positions, config.data.image_size)
        found.append([(image, names[label]) for image, label in zip(read["image"], read["label"], strict=True)])
    return found


def _read(file: Path, run: Weights) -> np.ndarray:
    """A picture as the net's images are: square, grey or in colour."""
    channels = run.params[run.config.model.order[0]]["kernel"].shape[-2]
    try:
        return pictures.square(pictures.decode(file.read_bytes(), channels), run.config.data.image_size)
    except OSError as error:
        raise ValueError(f"{file}: is no picture that can be read ({error}); give JPEG, PNG or the like") from error


def main(argv: list[str] | None = None) -> None:
    """Prints the most probable classes of each picture, and draws them."""
    parser = argparse.ArgumentParser(prog="python -m alexnet_jax.predict", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder, such as runs/ablation_lrn/lrn/seed_0")
    parser.add_argument("--views", type=int, choices=(1, 10), help="of each picture; by default as the run has it")
    parser.add_argument(
        "--neighbours", type=int, default=6, help="held-out images to find for each; 0: none, no data set"
    )
    parser.add_argument("--data_dir", help="where data sets are; by default as the run has it")
    parser.add_argument("--output", type=Path, default=Path("predictions.png"), help="the drawing; %(default)s")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="a picture")
    arguments = parser.parse_args(argv)
    logs.quiet_libraries()
    config = records.read_json(arguments.run / "config.json")
    towers.ensure_host_devices(config["model"]["towers"] if config else 1)
    try:
        if arguments.neighbours < 0:
            raise ValueError(f"--neighbours={arguments.neighbours}: must be 0 or more")
        found = predict(
            arguments.run,
            arguments.images,
            views=arguments.views,
            neighbours=arguments.neighbours,
            data_dir=arguments.data_dir,
        )
        panels.save(panels.figure_4(found), arguments.output)
    except (ValueError, OSError) as error:
        sys.exit(f"predict: {error}")
    table = Table()
    for column in ("picture", "class", "probability, %"):
        table.add_column(column, justify="right" if "%" in column else "left")
    for file, prediction in zip(arguments.images, found, strict=True):
        for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
            table.add_row(str(file) if name == prediction.classes[0] else "", name, f"{100 * probability:.2f}")
        table.add_section()
    Console().print(table)
    print(arguments.output)


if __name__ == "__main__":
    main()
