"""Errors of trained networks on the held-out images: of each run and, for several, of their ensemble.

An ensemble averages the probabilities of its networks, as the paper does for five (section 6). Every image counts
exactly once.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from ml_collections import ConfigDict, FrozenConfigDict
from rich.table import Column, Table

from alexnet_jax import checkpoint, model, processes, terminal
from alexnet_jax.data import augment, datasets, loader
from alexnet_jax.data.datasets import Source
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.parallel import DATA, TOWER, Executor, initialize, make_executor
from alexnet_jax.run_dir import RunDir, write_json

# A compiled function (variables, statistics, images) -> array (batch, ...), for uint8 images (batch, size, size, ch) or
# a `loader.Selection` of them.
Predictor = Callable[[Any, Statistics, Any], jax.Array]
ONE_DEVICE = Executor("vmap", 1)


def per_example_metrics(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> dict[str, jax.Array]:
    """Return the "loss", cross-entropy in nats, and the "top1_error" and "top5_error", 0 or 1, of each example.

    Args:
      logits: float32 (batch, classes).
      label_smoothing: probability that the target distribution of the loss spreads evenly over all classes.
    """
    classes = logits.shape[-1]
    _, best = lax.top_k(logits, min(5, classes))
    hits = best == labels[:, None]
    # A product with one-hot targets instead of an index: the gradient of an index is a scatter, slow on GPUs.
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), label_smoothing)
    return {
        "loss": jax.nn.logsumexp(logits, axis=-1) - (targets * logits).sum(axis=-1),
        "top1_error": 1.0 - hits[:, 0],
        "top5_error": 1.0 - hits.any(axis=1),
    }


def mean_of_probabilities(logits: jax.Array) -> jax.Array:
    """Average probabilities over the first axis: logits (k, ..., classes) to logits (..., classes)."""
    if len(logits) == 1:
        return logits[0]  # without rounding
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0)


def make_predictor(config: ConfigDict, classes: int, executor: Executor) -> Predictor:
    """Return the compiled function (variables, statistics, images) -> logits (batch, classes), for any batch size.

    It averages probabilities over `eval.views` views of each image (paper, section 4.1), one view at a time. Runs
    that differ in seed, optimiser or training only share one compiled function.
    """
    key = FrozenConfigDict({section: config[section] for section in ("model", "data", "eval")})
    return _make_predictor(key, classes, config.train.layout, config.train.matmul_precision, executor)


@functools.lru_cache(maxsize=16)
def _make_predictor(
    config: FrozenConfigDict, classes: int, layout: str, precision: str, executor: Executor
) -> Predictor:
    network = model.AlexNet(config.model, classes)
    views = augment.evaluation_views(config.eval.views, config.data.image_size, config.data.crop)
    stacked_views = augment.View(*(jnp.array(field) for field in zip(*views, strict=True)))

    @jax.default_matmul_precision(precision)
    def predict(variables: Any, statistics: Statistics, images: jax.Array) -> jax.Array:
        def predict_view(view: augment.View) -> Any:
            inputs = augment.inputs(images, view, config.data, statistics)
            return model.forward(network, layout, variables, inputs)[0]

        return mean_of_probabilities(lax.map(predict_view, stacked_views))

    return map_over_batch(predict, executor)


def map_over_batch(function: Callable[[Any, Statistics, jax.Array], jax.Array], executor: Executor) -> Predictor:
    """Compile a per-tower function of (variables, statistics, images) for batches of any size.

    Its result must have a leading batch axis and be the same on every tower. Each data shard computes its slice of the
    batch, zero-padded to equal slices.
    """

    def of_selection(variables: Any, statistics: Statistics, images: jax.Array, positions: jax.Array) -> jax.Array:
        return function(variables, statistics, images.at[positions].get(mode="clip"))

    mapped = executor.map(function, in_axes=(TOWER, None, DATA), out_axes=DATA)
    mapped_selection = executor.map(of_selection, in_axes=(TOWER, None, None, DATA), out_axes=DATA)

    @functools.wraps(mapped)
    def call(variables: Any, statistics: Statistics, images: Any) -> jax.Array:
        *resident, batch = images if isinstance(images, loader.Selection) else (images,)
        mapped_batch = mapped_selection if resident else mapped
        padding = -len(batch) % len(executor.local_rows(executor.shards))
        if padding == 0:
            return mapped_batch(variables, statistics, *resident, batch)
        padded = np.pad(batch, [(0, padding), *[(0, 0)] * (batch.ndim - 1)])
        return mapped_batch(variables, statistics, *resident, padded)[: len(batch)]

    return call


class Outcomes(NamedTuple):
    """Metrics and predictions of each image of a source, in its order: arrays (images,)."""

    metrics: dict[str, np.ndarray]  # those of `per_example_metrics`
    labels: np.ndarray  # correct classes
    predicted: np.ndarray  # most probable classes

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over all images."""
        return {name: float(values.mean(dtype=np.float64)) for name, values in self.metrics.items()}


def evaluate(
    predictions: Sequence[Callable[[Any], jax.Array]],
    source: Source,
    config: ConfigDict,
    executor: Executor = ONE_DEVICE,
) -> Outcomes:
    """Evaluate the mean of the probabilities of networks, which turn images into logits, on all images of a source.

    Args:
      executor: in a job of several processes, what the networks predict with: each process reads its rows of a batch.
        All have the same outcomes.
    """
    parts: list[Any] = []
    size = -(-config.eval.batch_size // executor.shards) * executor.shards
    for batch in loader.all_batches(source, config, size, executor.local_rows(size)):
        logits = np.stack([processes.fetch(predict(batch["image"])) for predict in predictions])
        labels, mask = (executor.gather_rows(batch[name]) for name in ("label", "mask"))
        outcomes = Outcomes(*jax.device_get(_outcomes(logits, labels)))
        parts.append(jax.tree.map(lambda values, mask=mask: values[mask], outcomes))
    outcomes = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    if len(outcomes.labels) != len(source):
        raise RuntimeError(f"counted {len(outcomes.labels)} of {len(source)} images")
    return outcomes


@jax.jit
def _outcomes(logits: jax.Array, labels: jax.Array) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    mean = mean_of_probabilities(logits)
    return per_example_metrics(mean, labels), labels, mean.argmax(axis=-1)


def evaluate_runs(
    run_dirs: Sequence[Path], *, views: int | None = None, data_dir: str | None = None, split: str | None = None
) -> dict[str, Any]:
    """Evaluate trained networks on the held-out images, each alone and, for several, their ensemble.

    Args:
      views: 1 or 10 per image; None: as the first run's config.
      data_dir: folder of datasets; None: as the first run's config.
      split: of the dataset; None: `data.eval_split` of the runs' configs.

    Returns:
      "data", "split", number of "images", "views" and "errors": {run or "average": `Outcomes.means`}.

    Raises:
      ValueError: a folder holds no run with a checkpoint, or the runs are of different images.
    """
    networks = {str(run_dir): checkpoint.load_run(run_dir) for run_dir in run_dirs}
    first, *others = networks
    common = networks[first].config.copy_and_resolve_references()
    common.eval.views = views or common.eval.views
    common.data.data_dir = common.data.data_dir if data_dir is None else data_dir
    for name in others:
        for field in ("name", "image_size", *(["eval_split"] if split is None else [])):
            value, expected = networks[name].config.data[field], common.data[field]
            if value != expected:
                raise ValueError(
                    f"{name}: data.{field}={value!r}: must be {expected!r}, as in {first}; an ensemble averages over "
                    "the same images"
                )
    common.data.eval_split = common.data.eval_split if split is None else split
    dataset = datasets.load(common.data)
    for name in networks:
        RunDir(name).check_dataset(dataset.metadata(common.data))
    predictions = {}
    for name, network in networks.items():
        config = network.config.copy_and_resolve_references()
        config.eval.views = common.eval.views
        executor = make_executor("auto", config.model.towers, common.eval.batch_size)
        variables, statistics = executor.place(network.variables), executor.replicate(network.known_statistics())
        predictor = make_predictor(config, network.classes, executor)
        predictions[name] = functools.partial(predictor, variables, statistics)
    errors = {name: evaluate([predict], dataset.evaluation, common).means() for name, predict in predictions.items()}
    if others:
        errors["average"] = evaluate(list(predictions.values()), dataset.evaluation, common).means()
    return {
        "data": common.data.name,
        "split": common.data.eval_split,
        "images": len(dataset.evaluation),
        "views": common.eval.views,
        "errors": errors,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb evaluate."""
    parser.add_argument("--run", type=Path, action="append", required=True, help="folder of a run; repeatable")
    parser.add_argument("--views", type=int, choices=(1, 10), help="views per image; default: as the run's config")
    parser.add_argument("--data_dir", help="folder of datasets; default: as the run's config")
    parser.add_argument("--split", help="split to evaluate on; default: data.eval_split of the runs' configs")
    parser.add_argument("--output", type=Path, help="JSON file to write the same numbers to")


def main(arguments: argparse.Namespace) -> None:
    """Print a row for each run and one for their ensemble."""
    configs = [RunDir(run).read_config() for run in arguments.run]
    initialize(max((config.model.towers for config in configs if config), default=1))
    results = evaluate_runs(arguments.run, views=arguments.views, data_dir=arguments.data_dir, split=arguments.split)
    if arguments.output:
        write_json(arguments.output, results)
    title = f"{results['data']}, {results['split']}: {results['images']:,} images, {results['views']} view(s) of each"
    table = Table(Column("run", overflow="fold"), title=title)
    for column in ("top-1 error, %", "top-5 error, %", "loss, nats"):
        table.add_column(column, justify="right")
    for name, errors in results["errors"].items():
        percent = (f"{100 * errors[metric]:.2f}" for metric in ("top1_error", "top5_error"))
        table.add_row(name, *percent, f"{errors['loss']:.4f}")
    terminal.console().print(table)
