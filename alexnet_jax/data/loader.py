"""Batches by (seed, step): uint8 images and labels, read ahead by threads."""

import functools
from collections.abc import Iterator

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
    if config.train.batch_size % processes:
        raise ValueError(f"train.batch_size={config.train.batch_size}: must be a multiple of the {processes} processes")

    def positions(step: int) -> np.ndarray:
        drawn = np.arange(step * config.train.batch_size, (step + 1) * config.train.batch_size)[process::processes]
        epochs, places = np.divmod(drawn, len(source))
        return np.concatenate([order(len(source), seed, epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])

    return _read_ahead(source, grain.MapDataset.range(start, stop).map(positions), config)


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
    positions = np.arange(process, len(source), processes)
    parts = [positions[first : first + size] for first in range(0, len(positions), size)]
    for batch in _read_ahead(source, grain.MapDataset.source(parts), config):
        count = len(batch["label"])
        batch["mask"] = np.ones(count, bool)
        yield {
            name: np.concatenate([array, np.zeros((size - count, *array.shape[1:]), array.dtype)])
            for name, array in batch.items()
        }


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch, counted from 0, sees the examples: a permutation of their positions."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def read(source: Source, positions: np.ndarray, size: int) -> Batch:
    """Examples as squares: {"image": uint8 (count, size, size, channels), "label": int32 (count,)}.

    Raises:
      ValueError: an image is damaged; names it.
    """
    images = np.empty((len(positions), size, size, source.channels), np.uint8)
    labels = np.empty(len(positions), np.int32)
    for place, position in enumerate(positions):
        example = source[int(position)]
        labels[place] = example["label"]
        try:
            pictures.fill(images[place], example["image"])
        except OSError as error:
            raise ValueError(f"{source}: image {position} is damaged ({error}); prepare the set again") from error
    return {"image": images, "label": labels}


def _read_ahead(source: Source, positions: grain.MapDataset, config: ConfigDict) -> Iterator[Batch]:
    """At most ``data.prefetch`` batches wait in memory, and ``data.threads`` are being decoded."""
    batches = positions.map(functools.partial(read, source, size=config.data.image_size))
    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=config.data.prefetch)
    return iter(batches.to_iter_dataset(options))
