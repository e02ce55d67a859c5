"""Prepare a dataset for training.

FOLDER holds your own images: train/CLASS/IMAGE, and held-out ones as val/CLASS/IMAGE or test/CLASS/IMAGE. Without
these, --hold_out=0.1 holds out a tenth of each class. NAME is cifar10, cifar100 or imagenet2012, prepared from their
archives in --manual_dir, or an image classification dataset of the TFDS catalogue, most of which TFDS prepares with
TensorFlow (pip install tensorflow-cpu).

Photos are stored as in the paper (section 2): shorter side scaled to 256 pixels, central square, in colour. If an image
cannot be read, the command names it and makes nothing, unless --skip_bad leaves such images out. A dataset that exists
stays as it is, and must be of the same images.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import itertools
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import filelock
import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet_jax.data import datasets, image_io, sources
from alexnet_jax.data.sources import RawDataset, RawImage


# Registered, it would replace TFDS's own dataset of the same name.
class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Square JPEGs of photos, or lossless PNGs of images of one small size."""

    VERSION = tfds.core.Version(datasets.PREPARED_VERSION)

    def __init__(self, raw: RawDataset, size: int, data_dir: str, skip_bad: bool, progress: Progress):
        self.name = raw.name
        self._raw, self._size, self._skip_bad, self._progress = raw, size, skip_bad, progress
        self._bad: list[str] = []
        config = tfds.core.BuilderConfig(name=datasets.prepared_folder(raw.name, size, data_dir).parent.name)
        super().__init__(data_dir=datasets.root(data_dir), config=config)

    def _info(self) -> tfds.core.DatasetInfo:
        encoding = "jpeg" if self._raw.size is None else "png"
        image = tfds.features.Image(shape=(self._size, self._size, 3), encoding_format=encoding)
        label = tfds.features.ClassLabel(names=self._raw.class_names)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(source=self._raw.source, **self._raw.identity),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[bytes, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in self._raw.counts}

    def _generate_examples(self, split: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
        missing = set(range(len(self._raw.class_names)))
        images = self._encode_ahead(split)
        for image, encoded in images:
            if error := encoded.exception():
                self._record(image, error)
                if not self._skip_bad:
                    splits = list(self._raw.counts)
                    later = map(self._encode_ahead, splits[splits.index(split) + 1 :])
                    self._refuse(itertools.chain(images, *later))
            else:
                missing.discard(image.label)
                yield os.fsencode(image.key), {"image": io.BytesIO(encoded.result()), "label": image.label}
        if missing:
            class_names = ", ".join(self._raw.class_names[label] for label in sorted(missing))
            raise ValueError(
                f"{self.name}: every class must have a readable image in every split, but {split} has none of "
                f"{class_names}; add images, or delete these classes in every split\n" + "\n".join(self._bad)
            )
        self.info.metadata["bad_images"] = len(self._bad)

    def _record(self, image: RawImage, error: BaseException) -> None:
        """Record a bad image; raise the error if it is not about the image."""
        if not isinstance(error, OSError):
            raise error
        self._bad.append(f"{image.content if isinstance(image.content, Path) else image.key}: {error}")

    def _refuse(self, rest: Iterable[tuple[RawImage, Future[bytes]]]) -> NoReturn:
        """Raise ValueError with all bad images: those of the rest, too."""
        for image, encoded in rest:
            if error := encoded.exception():
                self._record(image, error)
        raise ValueError(
            f"{self.name}: every file must be an image, but {len(self._bad)} cannot be read; repair or remove them, or "
            "give --skip_bad:\n" + "\n".join(self._bad)
        )

    def _encode_ahead(self, split: str) -> Iterator[tuple[RawImage, Future[bytes]]]:
        """Yield every image with its encoded bytes, in order, encoded ahead by one thread per core."""
        workers = os.cpu_count() or 1
        total = self._raw.counts[split]
        task = self._progress.add_task(split, total=total)
        waiting: collections.deque[tuple[RawImage, Future[bytes]]] = collections.deque()
        count = 0
        with ThreadPoolExecutor(workers) as pool:
            for count, image in enumerate(self._raw.read(split), 1):
                waiting.append((image, pool.submit(self._encode, image.content)))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft()
                self._progress.update(task, completed=count - len(waiting))
            yield from waiting
        self._progress.update(task, completed=count)
        if count != total:
            raise ValueError(f"{self.name}: must have {total} images for {split}, but has {count}; download it again")

    def _encode(self, content: Path | bytes | np.ndarray) -> bytes:
        if isinstance(content, np.ndarray):
            return image_io.encode_png(content)
        if isinstance(content, Path):
            if not content.is_file():  # a FIFO would be waited for
                raise OSError("neither a file nor a link to one")
            content = content.read_bytes()
        return image_io.encode_jpeg(content, self._size)


def prepare(
    raw: RawDataset,
    size: int,
    data_dir: str = "",
    *,
    skip_bad: bool = False,
    max_pixels: int = image_io.MAX_PIXELS,
) -> Path:
    """Prepare a dataset, completely or not at all, and return its folder; leave an existing one unchanged.

    Args:
      size: side of the stored images in pixels, unless `raw` has its own.
      data_dir: folder of all datasets; empty: TFDS's default.
      skip_bad: whether to leave out images that cannot be read, and count them in the dataset's metadata.
      max_pixels: images of more pixels are bad ones; their pixels are not read.

    Raises:
      ValueError: an image cannot be read, a class has no readable image, the raw dataset is incomplete, or the
        existing dataset is of other images.
      OSError: the folder cannot be written, or the disk is full.
    """
    size = raw.size or size
    target = datasets.prepared_folder(raw.name, size, data_dir)
    if target.is_dir():
        _check_same_images(target, raw)
        return target
    target.parents[1].mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.parents[1] / f".{target.parent.name}.lock", timeout=0)
    tfds.disable_progress_bar()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, hidden = Console(file=sys.stdout), not sys.stdout.isatty()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except filelock.Timeout:
            raise ValueError(f"{target}: is being prepared by another process; wait until that has ended") from None
        for incomplete in target.parent.glob("*incomplete*"):  # of a preparation that was killed
            shutil.rmtree(incomplete)
        progress = stack.enter_context(Progress(*columns, console=console, disable=hidden, redirect_stdout=False))
        builder = Prepared(raw, size, data_dir, skip_bad, progress)
        stack.enter_context(image_io.pixel_limit(max_pixels))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # TFDS prints that it downloads something
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # Pillow warns of metadata and pixels that it cannot read
        try:
            builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
        except RuntimeError as error:  # raised by ArrayRecord when the disk is full
            raise OSError(f"{target}: {error}") from error
    return target


def _check_same_images(target: Path, raw: RawDataset) -> None:
    """Raise ValueError if a prepared dataset was made of other images; older ones recorded less."""
    try:
        info = tfds.builder_from_directory(target).info
    except Exception as error:  # of any kind: TFDS's files are damaged or missing
        raise ValueError(f"{target}: must be a complete dataset, but cannot be read ({error}); delete it") from error
    metadata = info.metadata or {}
    class_names = info.features["label"].names
    images = sum(split.num_examples for split in info.splits.values()) + metadata.get("bad_images", 0)
    identity = {key: metadata.get(key, value) for key, value in raw.identity.items()}
    if (class_names, images, identity) != (raw.class_names, sum(raw.counts.values()), raw.identity):
        raise ValueError(
            f"{target}: must be of the images of {raw.source} ({sum(raw.counts.values())} of {len(raw.class_names)} "
            f"classes), but was made of others ({images} of {len(class_names)} classes, of "
            f"{metadata.get('source', 'an unknown folder')}); delete it, or give --name=ANOTHER"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command line."""
    parser.add_argument("source", metavar="NAME|FOLDER")
    parser.add_argument("--data_dir", default="", help="folder of all datasets (default: TFDS's default)")
    parser.add_argument("--manual_dir", type=Path, help="folder of archives (default: downloads/manual in --data_dir)")
    parser.add_argument("--size", type=int, default=256, help="side of the stored images in pixels (default: 256)")
    parser.add_argument("--name", help="name of the dataset (default: that of the folder or NAME)")
    parser.add_argument("--hold_out", type=float, help="hold out this fraction of each class of a folder, such as 0.1")
    parser.add_argument("--skip_bad", action="store_true", help="leave out images that cannot be read")
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=image_io.MAX_PIXELS,
        help="images of more pixels are not read (default: %(default)s)",
    )


def main(arguments: argparse.Namespace) -> None:
    """Prepare the dataset that the arguments name, and print how to train on it."""
    for flag in ("size", "max_pixels"):
        if getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag}={getattr(arguments, flag)}: must be at least 1")
    if arguments.hold_out is not None and not 0 < arguments.hold_out < 1:
        raise ValueError(f"--hold_out={arguments.hold_out}: must be between 0 and 1, as 0.1 for a tenth of each class")
    root = datasets.root(arguments.data_dir)
    try:
        raw = _raw_dataset(arguments, arguments.manual_dir or root / "downloads/manual")
        if raw is None:
            print(f"{arguments.source}: prepared by TFDS; its images are of one size and stay unchanged")
            return
        for folder in raw.left_aside:
            print(f"{folder}: left aside, as it has no folders of the classes")
        skip_bad, max_pixels = arguments.skip_bad, arguments.max_pixels
        target = prepare(raw, arguments.size, arguments.data_dir, skip_bad=skip_bad, max_pixels=max_pixels)
    except OSError as error:
        remedy = f"If the disk is full, free some space in {root}, or give another --data_dir"
        raise OSError(f"{error}\n{remedy}\nNothing was made") from error
    except ValueError as error:
        raise ValueError(f"{error}\nNothing was made") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing was made") from None
    info = tfds.builder_from_directory(target).info
    counts = ", ".join(f"{split} {split_info.num_examples:,}" for split, split_info in info.splits.items())
    bad = (info.metadata or {}).get("bad_images", 0)
    eval_split = next((split for split in info.splits if split != "train"), "")
    overrides = {"name": raw.name, "eval_split": eval_split, "data_dir": arguments.data_dir}
    flags = " ".join(f"--config.data.{key}={value}" for key, value in overrides.items() if value)
    skipped = f"; {bad} images cannot be read and are left out" if bad else ""
    print(f"{target}: {counts} images of {len(raw.class_names)} classes{skipped}\ntrain on it with {flags}")


def _raw_dataset(arguments: argparse.Namespace, manual_dir: Path) -> RawDataset | None:
    """Return the dataset that the arguments name, under the name that they give; None if TFDS's files are used."""
    source, path = arguments.source, Path(arguments.source).expanduser()
    raw: RawDataset | None
    if path.is_dir():
        raw = sources.folder(path, arguments.hold_out or 0.0)
    elif path.exists():
        raise ValueError(f"{source}: must be a folder of images, not a file; unpack an archive first")
    elif arguments.hold_out:
        raise ValueError(f"--hold_out={arguments.hold_out}: must be given with a folder of images; {source} is none")
    elif source == "imagenet2012":
        raw = sources.imagenet2012(manual_dir)
    elif source in ("cifar10", "cifar100"):
        raw = sources.cifar(int(source.removeprefix("cifar")), manual_dir)
    else:
        raw = sources.catalogue(source, arguments.data_dir)
    if raw is None:
        return None
    name = raw.name if arguments.name is None else arguments.name
    if not re.fullmatch(r"\w+", name) or name == datasets.EMBEDDED:
        raise ValueError(f"--name={name}: must be letters, digits and _, and not {datasets.EMBEDDED}; give another")
    return dataclasses.replace(raw, name=name)
