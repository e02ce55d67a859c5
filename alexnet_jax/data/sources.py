"""Raw datasets, before preparation: image folders, archives of CIFAR and ImageNet, the TFDS catalogue.

All functions raise ValueError for raw data that are missing, incomplete or damaged.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import io
import itertools
import os
import re
import stat
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from alexnet_jax.data import datasets

SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
LAYOUT = "train/CLASS/IMAGE, and val/CLASS/IMAGE or test/CLASS/IMAGE"
SYSTEM_FILES = ("Thumbs.db", "desktop.ini", "__MACOSX")  # left aside, as are hidden files
_NOT_IN_NAMES = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, surrogates, line and paragraph separators
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
    source: str  # where the images are
    identity: dict[str, str]  # what differs between other images, or another choice of them; not where they are
    size: int | None = None  # side of the images in pixels if they are stored unchanged; None for photos of any size
    left_aside: Sequence[Path] = ()  # folders of the source that are not read


def folder(path: Path, hold_out: float = 0.0) -> RawDataset:
    """Return the images in `path/train/CLASS/` and `path/val/CLASS/` or `path/test/CLASS/`, but hidden files.

    A `test` folder without any of the classes is left aside if there are other held-out images: those of competitions
    have no labels.

    Args:
      hold_out: fraction of the training images of each class that become the validation split; `path` must then have
        no other held-out images, and need not have `train`: it may have the class folders itself. Held out are the
        images with the lowest SHA-256 of "CLASS/IMAGE", so that a class folder always loses the same ones.
    """
    folders, left_aside = _split_folders(path, hold_out)
    names = {split: _class_names(split_folder) for split, split_folder in sorted(folders.items())}
    class_names = names["train"]
    for split, of_split in names.items():
        if unmatched := sorted(set(class_names) ^ set(of_split)):
            lacking = folders[split if unmatched[0] in class_names else "train"]
            raise ValueError(
                f"{path}: every class must have a folder in every split, but {unmatched[0]!r} has none in {lacking} "
                f"({len(unmatched)} such classes); add or delete it"
            )
    if len(class_names) < 2:
        raise ValueError(
            f"{folders['train']}: must have the folders of two classes or more, but has {class_names[0]!r} only; is "
            f"this the wrong level of folders? The layout is {LAYOUT}"
        )
    fingerprint = hashlib.sha256()
    images: dict[str, list[tuple[int, Path]]] = {split: [] for split in names}
    for split, label in itertools.product(names, range(len(class_names))):
        for name, size in _image_sizes(folders[split] / class_names[label]):
            fingerprint.update(os.fsencode(f"{split}/{class_names[label]}/{name}\n{size}\n"))
            images[split].append((label, folders[split] / class_names[label] / name))
    identity = {"files": fingerprint.hexdigest(), "hold_out": ""}
    if hold_out:
        images |= _hold_out(images["train"], hold_out)
        identity["hold_out"] = f"{hold_out} of each class: the lowest SHA-256 of CLASS/IMAGE"

    def read(split: str) -> Iterator[RawImage]:
        for label, file in images[split]:
            yield RawImage(str(file.relative_to(path)), label, file)

    counts = {split: len(of_split) for split, of_split in images.items()}
    name = "".join(letter if letter.isalnum() else "_" for letter in path.resolve().name.lower())
    return RawDataset(name, class_names, counts, read, str(path.resolve()), identity, left_aside=left_aside)


def _split_folders(path: Path, hold_out: float) -> tuple[dict[str, Path], list[Path]]:
    """Return the folders of the splits of `folder`, and those left aside; raise ValueError without two splits."""
    folders: dict[str, Path] = {}
    for entry in _entries(path):
        if os.path.isdir(entry) and (split := SPLITS.get(entry.name.lower())):
            if split in folders:
                raise ValueError(f"{path}: must have one folder for {split}, but has {entry.name}, too; keep one")
            folders[split] = Path(entry.path)
    if hold_out and not folders:
        folders["train"] = path
    left_aside = []
    if {"train", "test"} <= folders.keys() and ("validation" in folders or hold_out):
        in_train, in_test = ({entry.name for entry in _entries(folders[split])} for split in ("train", "test"))
        if not in_train & in_test:
            left_aside.append(folders.pop("test"))
    if "train" not in folders or (len(folders) < 2 and not hold_out):
        raise ValueError(f"{path}: must have {LAYOUT}, but has {_listed(path)}; {_layout_remedy(path, folders)}")
    if hold_out and len(folders) > 1:
        raise ValueError(f"--hold_out={hold_out}: must be left out, as {path} has held-out images: {_listed(path)}")
    return folders, left_aside


def _class_names(split_folder: Path) -> list[str]:
    """Return the sorted names of the class folders of a split; raise ValueError if it has anything else."""
    if _is_flat(split_folder):
        raise ValueError(f"{split_folder}: must have a folder for each class, not images; move them to CLASS/IMAGE")
    for entry in _entries(split_folder):
        if not os.path.isdir(entry):
            raise ValueError(f"{entry.path}: must be a folder, of the images of a class; move or delete it")
        # TFDS stores the names in a text file, a line each.
        if entry.name != entry.name.strip() or any(unicodedata.category(x) in _NOT_IN_NAMES for x in entry.name):
            raise ValueError(
                f"{split_folder}{os.sep}{entry.name!a}: the name of a class must be UTF-8, without line breaks, "
                "control characters, and blanks at its ends; rename the folder in every split"
            )
    return [entry.name for entry in _entries(split_folder)]


def _image_sizes(class_folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the names of the images of a class, sorted, and their sizes in bytes; raise ValueError for a folder."""
    for entry in _entries(class_folder):
        try:
            status = entry.stat()
        except OSError:  # a link to nowhere: a bad image, as is found when it is read
            yield entry.name, -1
            continue
        if stat.S_ISDIR(status.st_mode):
            raise ValueError(
                f"{entry.path}: must be an image, but is a folder; the layout is {LAYOUT}: move its images up, or move "
                "it away"
            )
        yield entry.name, status.st_size


def _hold_out(train: list[tuple[int, Path]], fraction: float) -> dict[str, list[tuple[int, Path]]]:
    """Return the training images, label and file, but a fraction of each class, and this fraction, by split."""
    splits: dict[str, list[tuple[int, Path]]] = {"train": [], "validation": []}
    for label, of_class in itertools.groupby(train, key=lambda image: image[0]):
        files = [file for _, file in of_class]
        count = max(1, round(fraction * len(files)))
        if count >= len(files):
            raise ValueError(
                f"--hold_out={fraction}: must leave images to train on, but {files[0].parent} has {len(files)} only; "
                "add some, or lower it"
            )
        hashes = {file: hashlib.sha256(os.fsencode(f"{file.parent.name}/{file.name}")).digest() for file in files}
        held_out = set(sorted(files, key=hashes.__getitem__)[:count])
        for file in files:
            splits["validation" if file in held_out else "train"].append((label, file))
    return splits


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """Return what a folder has, sorted by name, without hidden and system files; raise ValueError if it has nothing."""
    try:
        with os.scandir(directory) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in SYSTEM_FILES]
    except OSError as error:
        raise ValueError(f"{directory}: must be a readable folder ({error.strerror}); move or delete it") from error
    if not visible:
        raise ValueError(f"{directory}: must not be empty; add images, or delete this folder in every split")
    return sorted(visible, key=lambda entry: entry.name)


def _is_flat(directory: Path) -> bool:
    """Return True if a folder has files only."""
    return not any(map(os.path.isdir, _entries(directory)))


def _listed(directory: Path) -> str:
    """Return the names in a folder for a message, at most ten."""
    names = [entry.name for entry in _entries(directory)]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _layout_remedy(path: Path, folders: dict[str, Path]) -> str:
    """Return what to do about a folder without training or held-out images."""
    if "train" in folders:
        return "move some images there, or give --hold_out=0.1 to hold out a tenth of each class"
    above_and_below = (path.resolve().parent, *map(Path, _entries(path)))
    if nearby := [str(directory) for directory in above_and_below if (directory / "train").is_dir()]:
        return f"give {nearby[0]}"
    return "move the images there, or give --hold_out=0.1 if these are the classes, to hold out a tenth of each"


def cifar(classes: int, manual_dir: Path) -> RawDataset:
    """Return CIFAR-10 or CIFAR-100, read from the archive of its binary version in `manual_dir`."""
    if classes == 10:
        inner_folder, names_file, label_bytes = "cifar-10-batches-bin", "batches.meta.txt", 1
        files = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    else:  # CIFAR-100 has a coarse label before the fine one
        inner_folder, names_file, label_bytes = "cifar-100-binary", "fine_label_names.txt", 2
        files = {"train": ["train.bin"], "test": ["test.bin"]}
    archive = _archive(manual_dir / f"cifar-{classes}-binary.tar.gz", "from www.cs.toronto.edu/~kriz/cifar.html")

    with _open_archive(archive) as tar:
        class_names = _extract(tar, tar.getmember(f"{inner_folder}/{names_file}")).decode().split()

    def read(split: str) -> Iterator[RawImage]:
        with _open_archive(archive) as tar:
            content = b"".join(_extract(tar, tar.getmember(f"{inner_folder}/{name}")) for name in files[split])
            examples = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3 * CIFAR_SIZE**2)
        for number, example in enumerate(examples):
            image = example[label_bytes:].reshape(3, CIFAR_SIZE, CIFAR_SIZE).transpose(1, 2, 0)
            yield RawImage(f"{split}_{number}", int(example[label_bytes - 1]), image)

    return RawDataset(f"cifar{classes}", class_names, CIFAR_COUNTS, read, *_identity(archive), CIFAR_SIZE)


def imagenet2012(manual_dir: Path) -> RawDataset:
    """Return ImageNet 2012, read from the two archives of image-net.org in `manual_dir`."""
    archives = {
        split: _archive(manual_dir / f"ILSVRC2012_img_{name}.tar", "after registration, from image-net.org")
        for split, name in (("train", "train"), ("validation", "val"))
    }
    # TFDS's lists: classes in the order of its labels, and the classes of the validation images in the order of names.
    lists = tfds.core.tfds_path("datasets/imagenet2012")
    class_names = datasets.imagenet_class_names()
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

    return RawDataset("imagenet2012", class_names, IMAGENET_COUNTS, read, *_identity(*archives.values()))


def _archive(path: Path, origin: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: must be the archive {path.name}; download it ({origin}) or give --manual_dir")
    return path


def _identity(*archives: Path) -> tuple[str, dict[str, str]]:
    """Return `source` and `identity` of a dataset of archives."""
    sizes = ", ".join(f"{archive.name}: {archive.stat().st_size} bytes" for archive in archives)
    return str(archives[0].parent.resolve()), {"files": sizes}


@contextlib.contextmanager
def _open_archive(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive, and turn errors of a damaged one into a ValueError that names it."""
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, KeyError, ValueError) as error:
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
    root = datasets.root(data_dir)
    form = re.fullmatch(r"(\w+)(/[^/]+)?(:[^/]+)?", name)
    known = form and (form[1] in tfds.core.registered.list_imported_builders() or (root / form[1]).is_dir())
    if not known:
        raise ValueError(
            f"{name}: must be a folder of images, cifar10, cifar100, imagenet2012 or a dataset of the TFDS catalogue, "
            "but there is no such folder or dataset; correct it"
        )
    builder = datasets.tfds_builder(name, data_dir)
    if not datasets.is_prepared(builder):
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                f"{name}: TFDS must have TensorFlow to prepare it (training does not); install it with\n"
                "    pip install tensorflow-cpu"
            )
        try:
            builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
        except Exception as error:  # each dataset has its own code, and its own files to be downloaded by hand
            raise ValueError(f"{name}: TFDS cannot prepare it ({type(error).__name__}: {error})") from error
    image, label = datasets.example_keys(builder)
    if None not in builder.info.features[image].shape:
        return None

    def read(split: str) -> Iterator[RawImage]:
        decoders = {image: tfds.decode.SkipDecoding()}
        for number, example in enumerate(builder.as_data_source(split=split, decoders=decoders)):
            yield RawImage(f"{split}_{number}", int(example[label]), example[image])

    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    class_names = builder.info.features[label].names
    identity = {"files": builder.info.full_name}
    name = name.replace("/", "_").replace("-", "_")
    return RawDataset(name, class_names, counts, read, str(builder.data_dir), identity)
