"""Batches by (seed, step): uint8 images and labels, read ahead by threads."""

import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import pictures
from alexnet_jax.data import Source

Batch = dict[str, np.ndarray]


def train_batches(
    source: Source, config: ConfigDict, *, seed: int, start: int, stop: int, share: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """The training batches of the steps from ``start`` up to ``stop``.

    The images of a step depend on the seed and the step alone. Every epoch is a new permutation of the whole
    training set; a batch may span the end of one and the beginning of the next.

    Args:
      config: of a run.
      share: (i, n) for the i-th of n processes, which together see every image of a batch once.

    Yields:
      {"image": uint8 (batch / n, image_size, image_size, channels), "label": int32 (batch / n,)}

    Raises:
      ValueError: the batch cannot be shared evenly.
    """
    process, processes = share
    size, rest = divmod(config.train.batch_size, processes)
    if rest:
        raise ValueError(f"train.batch_size={config.train.batch_size}: must be a multiple of the {processes} processes")
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()[process::processes]
    batches = examples.map(_fit(config)).batch(size, drop_remainder=True)
    return _read_ahead(batches.slice(slice(start, stop)), config)


def all_batches(source: Source, config: ConfigDict, *, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
    """Every image once, in order, in batches of ``eval.batch_size``; the last one is filled up with zeros.

    Args:
      config: of a run.
      share: (i, n) for the i-th of n processes, which together see every image once.

    Yields:
      As ``train_batches``, and "mask": bool (batch,), False where it was filled up.
    """
    process, processes = share
    size = config.eval.batch_size
    examples = grain.MapDataset.source(source)[process::processes]
    for batch in _read_ahead(examples.map(_fit(config)).batch(size, drop_remainder=False), config):
        count = len(batch["label"])
        batch["mask"] = np.ones(count, bool)
        yield {
            name: np.concatenate([array, np.zeros((size - count, *array.shape[1:]), array.dtype)])
            for name, array in batch.items()
        }


def _fit(config: ConfigDict) -> Any:
    def fit(example: dict[str, Any], size: int) -> dict[str, Any]:
        return {"image": pictures.square(example["image"], size), "label": np.int32(example["label"])}

    return functools.partial(fit, size=config.data.image_size)


def _read_ahead(batches: grain.MapDataset, config: ConfigDict) -> Iterator[Batch]:
    """At most ``data.prefetch`` batches wait in memory, and ``data.threads`` are being decoded."""
    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=config.data.prefetch)
    return iter(batches.to_iter_dataset(options))
