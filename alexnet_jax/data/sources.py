"""Pictures before they are prepared: in a folder, in the archives of CIFAR and ImageNet, in the TFDS catalogue."""

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

from alexnet_jax import data

HELD_OUT = {"val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
CIFAR_SIDE = 32
CIFAR_COUNTS = {"train": 50_000, "test": 10_000}
IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}


class Original(NamedTuple):
    """One picture before it is prepared.

    Attributes:
      key: names it, wherever the pictures are: the order in which they are stored follows from it.
      label: its class, from 0.
      content: a picture file, its bytes, or an image (height, width, 3) of uint8.
    """

    key: str
    label: int
    content: Path | bytes | np.ndarray


@dataclass(frozen=True)
class Originals:
    """Pictures to make a data set of.

    Attributes:
      name: of the data set.
      classes: their names, in the order of the labels.
      counts: how many there are, by split.
      read: gives the pictures of a split.
      size: side of the images in pixels, where they are stored as they are; None for photos of any size.
    """

    name: str
    classes: list[str]
    counts: dict[str, int]
    read: Callable[[str], Iterator[Original]]
    size: int | None = None


def folder(path: Path) -> Originals:
    """The pictures in ``path/train/CLASS/`` and ``path/val/CLASS/`` or ``path/test/CLASS/``; hidden files are none.

    Raises:
      ValueError: a folder is missing or empty, cannot be read, or a class is not in all splits.
    """
    found = {name: path / name for name in _names(path) if name == "train" or name in HELD_OUT}
    if "train" not in found or len(found) < 2:
        raise ValueError(
            f"{path}: has {', '.join(_names(path))}; pictures to train on go into {path / 'train'}/CLASS/, held-out "
            f"ones into {path / 'val'}/CLASS/ or {path / 'test'}/CLASS/"
        )
    classes = _names(found["train"])
    files: dict[str, list[tuple[int, Path]]] = {}
    for name, directory in found.items():
        split = HELD_OUT.get(name, name)
        if split in files:
            raise ValueError(f"{path}: {directory.name} is a second folder for {split}; keep one of them")
        if odd := sorted(set(classes) ^ set(_names(directory))):
            raise ValueError(
                f"{path}: every class needs a folder in every split, and {odd[0]!r} has none in "
                f"{directory if odd[0] in classes else found['train']} ({len(odd)} such in all); move or delete it"
            )
        files[split] = [
            (label, directory / class_name / file)
            for label, class_name in enumerate(classes)
            for file in _names(directory / class_name)
        ]

    def read(split: str) -> Iterator[Original]:
        for label, file in files[split]:
            yield Original(str(file.relative_to(path)), label, file)

    counts = {split: len(of_split) for split, of_split in files.items()}
    name = "".join(letter if letter.isalnum() else "_" for letter in path.resolve().name.lower())
    return Originals(name, classes, counts, read)


def _names(directory: Path) -> list[str]:
    """What is in a folder, sorted, without hidden files.

    Raises:
      ValueError: it cannot be read, or is empty.
    """
    try:
        names = sorted(child.name for child in directory.iterdir() if not child.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{directory}: cannot be read ({error.strerror}); it should be a folder") from error
    if not names:
        raise ValueError(f"{directory}: is empty; put pictures there, or delete that folder in every split")
    return names


def cifar(classes: int, manual: Path) -> Originals:
    """CIFAR-10 or CIFAR-100, from the archive of its binary version.

    Args:
      classes: 10 or 100.
      manual: the folder of the archive.

    Raises:
      ValueError: the archive is not there, or is not whole.
    """
    inside, names_file, files = {
        10: (
            "cifar-10-batches-bin",
            "batches.meta.txt",
            {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
        ),
        100: ("cifar-100-binary", "fine_label_names.txt", {"train": ["train.bin"], "test": ["test.bin"]}),
    }[classes]
    labels = {10: 1, 100: 2}[classes]  # bytes; CIFAR-100 has a coarse one before the fine one
    archive = _archive(manual / f"cifar-{classes}-binary.tar.gz", "its web page is www.cs.toronto.edu/~kriz/cifar.html")

    def members(*names: str) -> bytes:
        with _opened(archive) as tar:
            return b"".join(_extract(tar, tar.getmember(f"{inside}/{name}")) for name in names)

    def read(split: str) -> Iterator[Original]:
        rows = np.frombuffer(members(*files[split]), np.uint8)
        examples = rows.reshape(-1, labels + 3 * CIFAR_SIDE**2)
        _check_count(archive, split, len(examples), CIFAR_COUNTS[split])
        for number, example in enumerate(examples):
            image = example[labels:].reshape(3, CIFAR_SIDE, CIFAR_SIDE).transpose(1, 2, 0)
            yield Original(f"{split}_{number}", int(example[labels - 1]), image)

    return Originals(f"cifar{classes}", members(names_file).decode().split(), CIFAR_COUNTS, read, CIFAR_SIDE)


def imagenet2012(manual: Path) -> Originals:
    """ImageNet 2012, from the two archives that image-net.org gives to those who register.

    Args:
      manual: the folder of the archives.

    Raises:
      ValueError: an archive is not there, or is not whole.
    """
    where = "register on image-net.org to get it"
    archives = {
        split: _archive(manual / f"ILSVRC2012_img_{name}.tar", where)
        for split, name in (("train", "train"), ("validation", "val"))
    }
    # The lists are TFDS's: classes in the order of its labels; for the pictures of val, in the order of their names.
    lists = tfds.core.tfds_path("datasets/imagenet2012")
    classes = (lists / "labels.txt").read_text().split()
    held_out = (lists / "validation_labels.txt").read_text().split()

    def train() -> Iterator[Original]:
        with _opened(archives["train"]) as outer:
            for of_class in outer:
                label = classes.index(of_class.name.removesuffix(".tar"))
                with tarfile.open(fileobj=io.BytesIO(_extract(outer, of_class))) as inner:
                    for picture in inner:
                        yield Original(picture.name, label, _extract(inner, picture))

    def validation() -> Iterator[Original]:
        with _opened(archives["validation"]) as tar:
            label_of = dict(zip(sorted(tar.getnames()), map(classes.index, held_out), strict=False))
            for picture in tar:
                yield Original(picture.name, label_of[picture.name], _extract(tar, picture))

    def read(split: str) -> Iterator[Original]:
        count = 0
        for original in train() if split == "train" else validation():
            count += 1
            yield original
        _check_count(archives[split], split, count, IMAGENET_COUNTS[split])

    return Originals("imagenet2012", classes, IMAGENET_COUNTS, read)


def _archive(path: Path, where: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: is not there; put the archive {path.name} into that folder ({where})")
    return path


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """An archive that says so if it is damaged."""
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, EOFError, KeyError) as error:
        raise ValueError(f"{archive}: is damaged or not whole ({error}); download it again") from error


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name} ends early")
    return content


def _check_count(archive: Path, split: str, count: int, expected: int) -> None:
    if count != expected:
        raise ValueError(f"{archive}: has {count} pictures for {split}, and should have {expected}; download it again")


def catalogue(name: str, data_dir: str) -> Originals | None:
    """A set that TFDS prepares, which is done here where it was not yet.

    Returns:
      None where its images are all of one size: they stay as they are.

    Raises:
      ValueError: TFDS has no such set, or it needs TensorFlow.
    """
    builder = data.catalogue_builder(name, data_dir)
    if not data.is_prepared(builder):
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                f"{name}: TFDS prepares it with TensorFlow, which is not installed: pip install tensorflow-cpu (the "
                "extra [tf]). Training reads it without."
            )
        builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
    image, label = data.example_keys(builder)
    if None not in builder.info.features[image].shape:
        return None

    def read(split: str) -> Iterator[Original]:
        decoders = {image: tfds.decode.SkipDecoding()}
        for number, example in enumerate(builder.as_data_source(split=split, decoders=decoders)):
            yield Original(f"{split}_{number}", int(example[label]), example[image])

    classes = builder.info.features[label].names
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    return Originals(name.replace("/", "_").replace("-", "_"), classes, counts, read)
