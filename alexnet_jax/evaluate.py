"""Errors on held-out data: every image counted exactly once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from alexnet_jax import augment, data
from alexnet_jax.model import AlexNet
from alexnet_jax.towers import Executor


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


def evaluator(config: ConfigDict, dataset: data.DataSet, executor: Executor) -> Callable[[Any], dict[str, float]]:
    """A function from parameters to the means over all held-out images, as ``eval/...``, from their centre crops.

    It raises RuntimeError where an image was missed or counted twice.
    """
    model = AlexNet(config.model, dataset.classes)

    def step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        images = augment.centre_views(batch["image"], config.data)
        logits: Any = model.apply({"params": params}, images, train=False)
        metrics = per_image(logits, batch["label"]) | {"count": jnp.ones(len(logits))}
        return {name: jnp.sum(values, where=batch["mask"]) for name, values in metrics.items()}

    compiled = executor.map(step, in_axes=(0, None), out_axes=None)

    def evaluate(params: Any) -> dict[str, float]:
        sums: dict[str, float] = {}
        for batch in data.eval_batches(dataset, config):
            for name, value in jax.device_get(compiled(params, batch)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        count = sums.pop("count")
        if count != len(dataset.evaluation):
            raise RuntimeError(f"counted {count:.0f} of {len(dataset.evaluation)} held-out images")
        return {f"eval/{name}": value / count for name, value in sums.items()}

    return evaluate
