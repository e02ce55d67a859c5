"""Batches as a function of (seed, step), of images that are in memory or streamed.

Decoded images stay on the devices (`datasets.Resident`) or in the host's memory (`datasets.Arrays`) if the budgets of
the `data` section allow it. Otherwise threads decode them again in each epoch.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from ml_collections import ConfigDict
from rich.progress import track

from alexnet_jax.data import image_io
from alexnet_jax.data.datasets import Arrays, Dataset, Resident, Source, Subset, locate, origin
from alexnet_jax.parallel import Executor

Batch = dict[str, Any]  # "image": uint8 (batch, image_size, image_size, channels), "label": int32 (batch,)
_DECODED_TOGETHER = 256  # images
Rows = np.ndarray | slice
ALL = slice(None)


class Selection(NamedTuple):
    """Some of the images on the devices: uint8 (count, image_size, image_size, channels), and int (batch,)."""

    images: jax.Array
    positions: np.ndarray


def keep_in_memory(dataset: Dataset, data_config: ConfigDict, executor: Executor) -> Dataset:
    """Return the dataset with its images decoded in memory, where the budgets allow it, or else as it is.

    All runs of a process that use the same images share them.
    """
    size = data_config.image_size
    sources = [dataset.train, dataset.evaluation, *([dataset.validation] if dataset.validation else [])]
    files = tuple(dict.fromkeys(map(origin, sources)))
    needed = sum(len(source) * size**2 * source.channels for source in files)
    copies = executor.copies if executor.platform == "cpu" else 1  # in the same memory
    if copies * needed <= data_config.resident_bytes:
        decoded: tuple[Arrays, ...] = _place(files, size, executor)
    elif needed <= data_config.host_bytes:
        decoded = _decode(files, size)
    else:
        return dataset
    in_memory = dict(zip(files, decoded, strict=True))

    def replace(source: Source) -> Source:
        return Subset(in_memory[source.source], source.positions) if isinstance(source, Subset) else in_memory[source]

    validation = replace(dataset.validation) if dataset.validation else None
    evaluation = replace(dataset.evaluation)
    return dataclasses.replace(dataset, train=replace(dataset.train), validation=validation, evaluation=evaluation)


# The last dataset only: another one needs the memory.
@functools.lru_cache(maxsize=1)
def _place(sources: Sequence[Source], size: int, executor: Executor) -> tuple[Resident, ...]:
    """Decode sources, and put their images on every device."""
    return tuple(Resident(arrays, executor.replicate(arrays.images)) for arrays in _decode(sources, size))


@functools.lru_cache(maxsize=1)
def _decode(sources: Sequence[Source], size: int) -> tuple[Arrays, ...]:
    """Decode all images of sources, resized and cropped to `size` pixels, on all cores."""

    def decode(source: Source) -> Arrays:
        if isinstance(source, Arrays) and source.images.shape[1:3] == (size, size):
            return source
        threads, chunks = os.cpu_count() or 1, _chunks(len(source), _DECODED_TOGETHER)
        batches = _read_ahead(source, grain.MapDataset.source(chunks), size, threads, 2 * threads)
        arrays = Arrays(np.empty((len(source), size, size, source.channels), np.uint8), np.empty(len(source), np.int32))
        progress = track(batches, f"decoding {len(source):,} images", len(chunks), disable=not sys.stdout.isatty())
        for positions, batch in zip(chunks, progress, strict=True):
            arrays.images[positions], arrays.labels[positions] = batch["image"], batch["label"]
        return arrays

    return tuple(map(decode, sources))


def train_batches(
    source: Source, config: ConfigDict, *, seed: int, start: int, stop: int, rows: Rows = ALL
) -> Iterator[Batch]:
    """Iterate over the training batches of the 0-based steps `start` (inclusive) to `stop` (exclusive).

    A step's images depend on the seed and the step alone. Each epoch is a new permutation of the training set; a batch
    may span the end of one epoch and the beginning of the next.

    Args:
      rows: which rows of each batch to read (`Executor.local_rows`).
    """

    def positions(step: int) -> np.ndarray:
        return _train_positions(len(source), config.train.batch_size, seed, step)[rows]

    steps = grain.MapDataset.range(start, stop)
    data = config.data
    return _read_ahead(source, steps.map(positions), data.image_size, data.threads, data.prefetch)


def resident_train_batches(
    source: Source, config: ConfigDict, *, seed: int, spans: Iterable[range], rows: Rows = ALL
) -> Iterator[dict[str, np.ndarray]]:
    """Iterate over the training batches of spans of 0-based steps, of images that are on the devices.

    Each is {"position", of the images, and "label"}: int32 (batch, steps). The images are those of `train_batches`.
    """
    for span in spans:
        steps = [_train_positions(len(source), config.train.batch_size, seed, step)[rows] for step in span]
        arrays, positions = locate(source, np.stack(steps, axis=1))
        assert isinstance(arrays, Arrays)
        yield {"position": positions.astype(np.int32), "label": arrays.labels[positions].astype(np.int32)}


def _train_positions(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return which of `count` training examples a step sees, in order."""
    epochs, offsets = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    return np.concatenate([epoch_order(count, seed, epoch)[offsets[epochs == epoch]] for epoch in np.unique(epochs)])


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of the positions of `count` examples in an epoch (0-based)."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def all_batches(source: Source, config: ConfigDict, size: int, rows: Rows = ALL) -> Iterator[Batch]:
    """Iterate over every image once, in order, in batches of `size` with "mask": bool, False for padding.

    The "image" of a resident source is a `Selection`.

    Args:
      rows: which rows of each batch to read (`Executor.local_rows`).
    """
    arrays, data = origin(source), config.data
    positions = np.arange(-(-len(source) // size) * size).reshape(-1, size)[:, rows]
    masks = positions < len(source)
    chunks = [row[mask] for row, mask in zip(positions, masks, strict=True)]

    def pad(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, masks.shape[1] - len(array)), *[(0, 0)] * (array.ndim - 1)])

    if isinstance(arrays, Resident):
        for chunk, mask in zip(chunks, masks, strict=True):
            chosen = pad(locate(source, chunk)[1])
            labels = arrays.labels[chosen].astype(np.int32)
            yield {"image": Selection(arrays.on_devices, chosen), "label": labels, "mask": mask}
        return
    batches = _read_ahead(source, grain.MapDataset.source(chunks), data.image_size, data.threads, data.prefetch)
    for batch, mask in zip(batches, masks, strict=True):
        yield {name: pad(array) for name, array in batch.items()} | {"mask": mask}


def read(source: Source, positions: np.ndarray, size: int) -> Batch:
    """Read examples, resized and cropped to `size` x `size` pixels; raise ValueError if an image is damaged."""
    arrays, chosen = locate(source, positions)
    if isinstance(arrays, Arrays) and arrays.images.shape[1:3] == (size, size):
        return {"image": arrays.images[chosen], "label": arrays.labels[chosen].astype(np.int32)}
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


def _read_ahead(source: Source, positions: grain.MapDataset, size: int, threads: int, prefetch: int) -> Iterator[Batch]:
    """Read batches in threads, with at most `prefetch` of them in memory."""
    batches = positions.map(functools.partial(read, source, size=size))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))


def _chunks(count: int, size: int) -> list[np.ndarray]:
    """Return the positions of `count` examples in chunks of `size`, the last one shorter."""
    return np.split(np.arange(count), range(size, count, size))
