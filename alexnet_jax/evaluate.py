"""Errors on held-out data: python -m alexnet_jax.evaluate --run=DIR [--run=DIR ...] [--views=10] [--data_dir=DIR]

Of each run, and of all together, whose probabilities are averaged as the paper's five nets' are (section 6). Every
image counts exactly once.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from alexnet_jax import augment, batches, checkpoint, data, logs, records, towers
from alexnet_jax.model import AlexNet
from alexnet_jax.pixels import Pixels
from alexnet_jax.towers import Executor, all_rows, own_rows

# The function from parameters and a batch of uint8 images to logits (batch, classes).
Predict = Callable[[Any, Any], jax.Array]


def per_image(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Cross-entropy (in nats) and whether the label misses the best one and the best five, per image.

    Args:
      logits: (batch, classes).
      labels: int (batch,).

    Returns:
      loss, top1_error and top5_error, each (batch,) of float32.
    """
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = best == labels[:, None]
    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        "top1_error": 1.0 - hits[:, 0],
        "top5_error": 1.0 - hits.any(axis=1),
    }


def predictor(config: ConfigDict, classes: int, pixels: Pixels, executor: Executor) -> Predict:
    """The compiled function from parameters and uint8 images to logits.

    Probabilities are averaged over ``eval.views`` views of each image (paper, section 4.1), one view at a time.
    """
    model = AlexNet(config.model, classes)
    views = augment.evaluation_views(config.eval.views, config.data.image_size, config.data.crop)
    stacked = augment.View(*(jnp.array(field) for field in zip(*views, strict=True)))

    def tower(params: Any, images: jax.Array) -> jax.Array:
        own = own_rows(images)

        def of_view(view: augment.View) -> jax.Array:
            inputs = augment.inputs(own, view, config.data, pixels)
            logits: Any = model.apply({"params": params}, inputs, train=False)
            return logits

        return all_rows(averaged(lax.map(of_view, stacked)), len(images))

    return executor.map(tower, in_axes=(0, None), out_axes=None)


def averaged(logits: jax.Array) -> jax.Array:
    """The logits of the mean of the probabilities over the first axis."""
    if len(logits) == 1:
        return logits[0]  # nothing is rounded
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0)


class Outcomes(NamedTuple):
    """What became of each image of a source, in its order; each is an array (images,).

    Attributes:
      metrics: loss, top1_error and top5_error, as of ``per_image``.
      labels: the right classes.
      predicted: the classes that were found most probable.
    """

    metrics: dict[str, np.ndarray]
    labels: np.ndarray
    predicted: np.ndarray

    def means(self) -> dict[str, float]:
        """Loss and errors over all images."""
        return {name: float(values.mean(dtype=np.float64)) for name, values in self.metrics.items()}


def outcomes(predictions: Sequence[Callable[[Any], jax.Array]], source: data.Source, config: ConfigDict) -> Outcomes:
    """Evaluates every image of a source once, by the mean of the probabilities of one or more nets.

    Args:
      predictions: functions from a batch of uint8 images to logits.
      config: of a run, for the size of the images and of the batches.

    Raises:
      RuntimeError: an image was missed or counted twice.
    """
    found: list[Any] = []
    for batch in batches.all_batches(source, config):
        logits = np.stack([predict(batch["image"]) for predict in predictions])
        of_batch = Outcomes(*jax.device_get(_of_batch(logits, batch["label"])))
        found.append(jax.tree.map(lambda values, mask=batch["mask"]: values[mask], of_batch))
    together = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    if len(together.labels) != len(source):
        raise RuntimeError(f"counted {len(together.labels)} of {len(source)} held-out images")
    return together


@jax.jit
def _of_batch(logits: jax.Array, labels: jax.Array) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    mean = averaged(logits)
    return per_image(mean, labels), labels, mean.argmax(axis=-1)


def evaluate_runs(workdirs: Sequence[Path], *, views: int | None = None, data_dir: str | None = None) -> dict[str, Any]:
    """The errors of trained nets on the held-out images, each alone and, where there are several, averaged.

    Args:
      workdirs: the runs' folders.
      views: 1 or 10 of each image; None: as the first run has it.
      data_dir: where data sets are; None: as the first run has it.

    Returns:
      data, split, images (how many), views, and errors: by run, and for "average", loss (nats), top1_error and
      top5_error (fractions of 1).

    Raises:
      ValueError: a folder holds no run that has begun, or the runs are not of the same images.
    """
    runs = {workdir: checkpoint.read_run(workdir) for workdir in workdirs}
    first, *others = workdirs
    common = runs[first].config.copy_and_resolve_references()
    common.data.data_dir = common.data.data_dir if data_dir is None else data_dir
    common.eval.views = views or common.eval.views
    for workdir in others:
        for field in ("name", "eval_split", "image_size"):
            here, there = runs[workdir].config.data[field], common.data[field]
            if here != there:
                raise ValueError(
                    f"{workdir}: its data.{field} is {here!r}, that of {first} {there!r}; only nets that see the same "
                    "images can be averaged"
                )
    dataset = data.load(common.data)
    predictions = {}
    for workdir, run in runs.items():
        if run.pixels is None:
            raise ValueError(f"{workdir}: has not begun, so the mean of its pixels is not known; train it first")
        config = run.config.copy_and_resolve_references()
        config.eval.views = common.eval.views
        executor = Executor(config.train.executor, config.model.towers)
        predict = predictor(config, run.classes, run.pixels, executor)
        predictions[str(workdir)] = functools.partial(predict, executor.place(run.params))
    errors = {name: outcomes([predict], dataset.evaluation, common).means() for name, predict in predictions.items()}
    if others:
        errors["average"] = outcomes(list(predictions.values()), dataset.evaluation, common).means()
    return {
        "data": common.data.name,
        "split": common.data.eval_split,
        "images": len(dataset.evaluation),
        "views": common.eval.views,
        "errors": errors,
    }


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each run and one for their average."""
    parser = argparse.ArgumentParser(prog="python -m alexnet_jax.evaluate", description=__doc__)
    parser.add_argument("--run", type=Path, action="append", required=True, help="a run's folder; may come again")
    parser.add_argument("--views", type=int, choices=(1, 10), help="of each image; by default as the run's config says")
    parser.add_argument("--data_dir", help="where data sets are; by default as the run's config says")
    parser.add_argument("--output", type=Path, help="a JSON file for the same numbers")
    arguments = parser.parse_args(argv)
    logs.quiet_libraries()
    configs = [records.read_json(run / "config.json") for run in arguments.run]
    towers.ensure_host_devices(max((config["model"]["towers"] for config in configs if config), default=1))
    try:
        found = evaluate_runs(arguments.run, views=arguments.views, data_dir=arguments.data_dir)
    except ValueError as error:
        sys.exit(f"evaluate: {error}")
    if arguments.output:
        records.write_json(arguments.output, found)
    table = Table(
        title=f"{found['data']}, {found['split']}: {found['images']:,} images, views of each: {found['views']}"
    )
    for column in ("run", "top-1 error, %", "top-5 error, %", "loss, nats"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, errors in found["errors"].items():
        percent = (f"{100 * errors[error]:.2f}" for error in ("top1_error", "top5_error"))
        table.add_row(name, *percent, f"{errors['loss']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
