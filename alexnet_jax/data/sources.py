"""Raw datasets, before preparation: image folders, archives of CIFAR and ImageNet, the TFDS catalogue.

All functions raise ValueError for raw data that are missing, incomplete or damaged.
"""

import contextlib
import importlib.util
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from alexnet_jax.data import datasets

HELD_OUT_SPLITS = {"val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
CIFAR_SIZE = 32
CIFAR_COUNTS = {"train": 50_000, "test": 10_000}
IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}


class RawImage(NamedTuple):
    """One image before preparation."""

    key: str  # unique and independent of where the images are; it determines the stored order
    label: int
    content: Path | bytes | np.ndarray  # path or bytes of an image file, or a uint8 (height, width, 3) image


@dataclass(frozen=True)
class RawDataset:
    """Images to prepare a dataset from."""

    name: str
    class_names: list[str]  # in the order of the labels
    counts: dict[str, int]  # images by split
    read: Callable[[str], Iterator[RawImage]]  # iterates over the images of a split
    size: int | None = None  # side of the images in pixels if they are stored unchanged; None for photos of any size


def folder(path: Path) -> RawDataset:
    """Return the images in `path/train/CLASS/` and `path/val/CLASS/` or `path/test/CLASS/`, but hidden files."""
    folders = {name: path / name for name in _list_names(path) if name == "train" or name in HELD_OUT_SPLITS}
    if "train" not in folders or len(folders) < 2:
        raise ValueError(
            f"{path}: must have train/CLASS/IMAGE and val/CLASS/IMAGE or test/CLASS/IMAGE, but has "
            f"{', '.join(_list_names(path))}; move the images there"
        )
    class_names = _list_names(folders["train"])
    files: dict[str, list[tuple[int, Path]]] = {}
    for name, split_folder in folders.items():
        split = HELD_OUT_SPLITS.get(name, name)
        if split in files:
            raise ValueError(f"{path}: must have one folder for {split}, but has {name}, too; keep one of them")
        if unmatched := sorted(set(class_names) ^ set(_list_names(split_folder))):
            lacking = split_folder if unmatched[0] in class_names else folders["train"]
            raise ValueError(
                f"{path}: every class must have a folder in every split, but {unmatched[0]!r} has none in {lacking} "
                f"({len(unmatched)} such classes); add or delete it"
            )
        files[split] = [
            (label, split_folder / class_name / file)
            for label, class_name in enumerate(class_names)
            for file in _list_names(split_folder / class_name)
        ]

    def read(split: str) -> Iterator[RawImage]:
        for label, file in files[split]:
            yield RawImage(str(file.relative_to(path)), label, file)

    counts = {split: len(split_files) for split, split_files in files.items()}
    name = "".join(letter if letter.isalnum() else "_" for letter in path.resolve().name.lower())
    return RawDataset(name, class_names, counts, read)


def _list_names(directory: Path) -> list[str]:
    """Return the sorted names in a folder, without hidden files; raise ValueError if it is unreadable or empty."""
    try:
        names = sorted(child.name for child in directory.iterdir() if not child.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{directory}: must be a readable folder ({error.strerror}); move or delete it") from error
    if not names:
        raise ValueError(f"{directory}: must not be empty; add images, or delete this folder in every split")
    return names


def cifar(classes: int, manual_dir: Path) -> RawDataset:
    """Return CIFAR-10 or CIFAR-100, read from the archive of its binary version in `manual_dir`."""
    if classes == 10:
        inner_folder, names_file, label_bytes = "cifar-10-batches-bin", "batches.meta.txt", 1
        files = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    else:  # CIFAR-100 has a coarse label before the fine one
        inner_folder, names_file, label_bytes = "cifar-100-binary", "fine_label_names.txt", 2
        files = {"train": ["train.bin"], "test": ["test.bin"]}
    archive = _archive(manual_dir / f"cifar-{classes}-binary.tar.gz", "from www.cs.toronto.edu/~kriz/cifar.html")

    def read_members(*names: str) -> bytes:
        with _open_archive(archive) as tar:
            return b"".join(_extract(tar, tar.getmember(f"{inner_folder}/{name}")) for name in names)

    def read(split: str) -> Iterator[RawImage]:
        examples = np.frombuffer(read_members(*files[split]), np.uint8).reshape(-1, label_bytes + 3 * CIFAR_SIZE**2)
        for number, example in enumerate(examples):
            image = example[label_bytes:].reshape(3, CIFAR_SIZE, CIFAR_SIZE).transpose(1, 2, 0)
            yield RawImage(f"{split}_{number}", int(example[label_bytes - 1]), image)

    class_names = read_members(names_file).decode().split()
    return RawDataset(f"cifar{classes}", class_names, CIFAR_COUNTS, read, CIFAR_SIZE)


def imagenet2012(manual_dir: Path) -> RawDataset:
    """Return ImageNet 2012, read from the two archives of image-net.org in `manual_dir`."""
    archives = {
        split: _archive(manual_dir / f"ILSVRC2012_img_{name}.tar", "after registration, from image-net.org")
        for split, name in (("train", "train"), ("validation", "val"))
    }
    # TFDS's lists: classes in the order of its labels, and the classes of the validation images in the order of names.
    lists = tfds.core.tfds_path("datasets/imagenet2012")
    class_names = (lists / "labels.txt").read_text().split()
    validation_classes = (lists / "validation_labels.txt").read_text().split()

    def read(split: str) -> Iterator[RawImage]:
        with _open_archive(archives[split]) as tar:
            if split == "train":
                for class_archive in tar:
                    label = class_names.index(class_archive.name.removesuffix(".tar"))
                    with tarfile.open(fileobj=io.BytesIO(_extract(tar, class_archive))) as inner:
                        for member in inner:
                            yield RawImage(member.name, label, _extract(inner, member))
            else:
                labels = dict(zip(sorted(tar.getnames()), map(class_names.index, validation_classes), strict=False))
                for member in tar:
                    yield RawImage(member.name, labels[member.name], _extract(tar, member))

    return RawDataset("imagenet2012", class_names, IMAGENET_COUNTS, read)


def _archive(path: Path, origin: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: must be the archive {path.name}; download it ({origin}) or give --manual_dir")
    return path


@contextlib.contextmanager
def _open_archive(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive, and turn errors of a damaged one into a ValueError that names it."""
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, EOFError, KeyError) as error:
        raise ValueError(f"{archive}: must be complete, but is damaged ({error}); download it again") from error


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name} is truncated")
    return content


def catalogue(name: str, data_dir: str) -> RawDataset | None:
    """Return a dataset of the TFDS catalogue, downloaded and prepared by TFDS if necessary.

    Returns:
      None if its images are all of one size: TFDS's files are then used unchanged.
    """
    builder = datasets.tfds_builder(name, data_dir)
    if not datasets.is_prepared(builder):
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                f"{name}: TFDS must have TensorFlow to prepare it (training does not); install it with\n"
                "    pip install tensorflow-cpu"
            )
        builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
    image, label = datasets.example_keys(builder)
    if None not in builder.info.features[image].shape:
        return None

    def read(split: str) -> Iterator[RawImage]:
        decoders = {image: tfds.decode.SkipDecoding()}
        for number, example in enumerate(builder.as_data_source(split=split, decoders=decoders)):
            yield RawImage(f"{split}_{number}", int(example[label]), example[image])

    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    return RawDataset(name.replace("/", "_").replace("-", "_"), builder.info.features[label].names, counts, read)
