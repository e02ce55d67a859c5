"""Batches as a function of (seed, step): uint8 images and labels, read ahead by threads."""

import functools
from collections.abc import Iterator

import grain
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.data import image_io
from alexnet_jax.data.datasets import Source

Batch = dict[str, np.ndarray]  # "image": uint8 (batch, image_size, image_size, channels), "label": int32 (batch,)


def train_batches(source: Source, config: ConfigDict, *, seed: int, start: int, stop: int) -> Iterator[Batch]:
    """Iterate over the training batches of the 0-based steps `start` (inclusive) to `stop` (exclusive).

    A step's images depend on the seed and the step alone. Each epoch is a new permutation of the training set; a batch
    may span the end of one epoch and the beginning of the next.
    """

    def positions(step: int) -> np.ndarray:
        batch_size = config.train.batch_size
        epochs, offsets = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), len(source))
        return np.concatenate(
            [epoch_order(len(source), seed, epoch)[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        )

    return _read_ahead(source, grain.MapDataset.range(start, stop).map(positions), config.data)


def all_batches(source: Source, config: ConfigDict, size: int) -> Iterator[Batch]:
    """Iterate over every image once, in order, in batches of `size` with "mask": bool, False for padding with zeros."""
    positions = [np.arange(first, min(first + size, len(source))) for first in range(0, len(source), size)]
    for batch in _read_ahead(source, grain.MapDataset.source(positions), config.data):
        count = len(batch["label"])
        batch["mask"] = np.ones(count, bool)
        yield {
            name: np.concatenate([array, np.zeros((size - count, *array.shape[1:]), array.dtype)])
            for name, array in batch.items()
        }


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of the positions of `count` examples in an epoch (0-based)."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def read(source: Source, positions: np.ndarray, size: int) -> Batch:
    """Read examples, resized and cropped to `size` x `size` pixels; raise ValueError if an image is damaged."""
    images = np.empty((len(positions), size, size, source.channels), np.uint8)
    labels = np.empty(len(positions), np.int32)
    for index, position in enumerate(positions):
        example = source[int(position)]
        labels[index] = example["label"]
        try:
            image_io.decode_into(images[index], example["image"])
        except OSError as error:
            raise ValueError(f"{source}: image {position} is damaged ({error}); prepare the dataset again") from error
    return {"image": images, "label": labels}


def _read_ahead(source: Source, positions: grain.MapDataset, data_config: ConfigDict) -> Iterator[Batch]:
    """Read batches in `data.threads` threads, with at most `data.prefetch` batches in memory."""
    batches = positions.map(functools.partial(read, source, size=data_config.image_size))
    options = grain.ReadOptions(num_threads=data_config.threads, prefetch_buffer_size=data_config.prefetch)
    return iter(batches.to_iter_dataset(options))
