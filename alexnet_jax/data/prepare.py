"""Prepare a dataset for training.

FOLDER holds your own images: train/CLASS/IMAGE, and held-out ones as val/CLASS/IMAGE or test/CLASS/IMAGE.
NAME is cifar10, cifar100 or imagenet2012, prepared from their archives in --manual_dir, or an image classification
dataset of the TFDS catalogue, most of which TFDS prepares with TensorFlow (pip install tensorflow-cpu).

Photos are stored as in the paper (section 2): shorter side scaled to 256 pixels, central square, in colour. If an image
cannot be read, the command names it and makes nothing, unless --skip_bad leaves such images out.
"""

import argparse
import collections
import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in self._raw.counts}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        count, total = 0, self._raw.counts[split]
        task = self._progress.add_task(split, total=total)
        missing = set(range(len(self._raw.class_names)))
        for image, encoded in self._encode_ahead(split):
            count += 1
            self._progress.advance(task)
            try:
                content = encoded.result()
            except OSError as error:
                name = image.content if isinstance(image.content, Path) else image.key
                self._bad.append(f"{name}: {error}")
            else:
                missing.discard(image.label)
                yield image.key, {"image": io.BytesIO(content), "label": image.label}
        if count != total:
            raise ValueError(f"{self.name}: must have {total} images for {split}, but has {count}; download it again")
        refused = self._bad and not self._skip_bad
        if missing and not refused:
            class_names = ", ".join(self._raw.class_names[label] for label in sorted(missing))
            raise ValueError(
                f"{self.name}: every class must have a readable image in every split, but {split} has none of "
                f"{class_names}; add images, or delete these classes in every split"
            )
        if refused and split == list(self._raw.counts)[-1]:  # all bad images are named at once
            raise ValueError(
                f"{self.name}: every file must be an image, but {len(self._bad)} cannot be read; repair or remove "
                "them, or give --skip_bad:\n" + "\n".join(self._bad)
            )
        self.info.metadata["bad_images"] = len(self._bad)

    def _encode_ahead(self, split: str) -> Iterator[tuple[RawImage, Future[bytes]]]:
        """Yield every image with its encoded bytes, in order, encoded ahead by one thread per core."""
        workers = os.cpu_count() or 1
        waiting: collections.deque[tuple[RawImage, Future[bytes]]] = collections.deque()
        with ThreadPoolExecutor(workers) as pool:
            for image in self._raw.read(split):
                waiting.append((image, pool.submit(self._encode, image.content)))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft()
            yield from waiting

    def _encode(self, content: Path | bytes | np.ndarray) -> bytes:
        if isinstance(content, np.ndarray):
            return image_io.encode_png(content)
        return image_io.encode_jpeg(content.read_bytes() if isinstance(content, Path) else content, self._size)


def prepare(raw: RawDataset, size: int, data_dir: str = "", *, skip_bad: bool = False) -> Path:
    """Prepare a dataset, completely or not at all, and return its folder; leave an existing one unchanged.

    Args:
      size: side of the stored images in pixels, unless `raw` has its own.
      data_dir: folder of all datasets; empty: TFDS's default.
      skip_bad: whether to leave out images that cannot be read, and count them in the dataset's metadata.

    Raises:
      ValueError: an image cannot be read, a class has no readable image, or the raw dataset is incomplete.
      OSError: the folder cannot be written, or the disk is full.
    """
    size = raw.size or size
    target = datasets.prepared_folder(raw.name, size, data_dir)
    if target.is_dir():
        return target
    for incomplete in target.parent.glob("*incomplete*"):  # of a preparation that was killed
        shutil.rmtree(incomplete)
    tfds.disable_progress_bar()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, hidden = Console(file=sys.stdout), not sys.stdout.isatty()
    with Progress(*columns, console=console, disable=hidden, redirect_stdout=False) as progress:
        builder = Prepared(raw, size, data_dir, skip_bad, progress)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads something
                builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
        except RuntimeError as error:  # raised by ArrayRecord when the disk is full
            raise OSError(f"{target}: {error}") from error
    return target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command line."""
    parser.add_argument("source", metavar="NAME|FOLDER")
    parser.add_argument("--data_dir", default="", help="folder of all datasets (default: TFDS's default)")
    parser.add_argument("--manual_dir", type=Path, help="folder of archives (default: downloads/manual in --data_dir)")
    parser.add_argument("--size", type=int, default=256, help="side of the stored images in pixels (default: 256)")
    parser.add_argument("--skip_bad", action="store_true", help="leave out images that cannot be read")


def main(arguments: argparse.Namespace) -> None:
    """Prepare the dataset that the arguments name, and print how to train on it."""
    if arguments.size < 1:
        raise ValueError(f"--size={arguments.size}: must be at least 1; the paper has 256")
    root = datasets.root(arguments.data_dir)
    try:
        raw = _raw_dataset(arguments.source, arguments.data_dir, arguments.manual_dir or root / "downloads/manual")
        if raw is None:
            print(f"{arguments.source}: prepared by TFDS; its images are of one size and stay unchanged")
            return
        target = prepare(raw, arguments.size, arguments.data_dir, skip_bad=arguments.skip_bad)
    except OSError as error:
        remedy = f"If the disk is full, free some space in {root}, or give another --data_dir"
        raise OSError(f"{error}\n{remedy}\nNothing was made") from error
    except ValueError as error:
        raise ValueError(f"{error}\nNothing was made") from error
    info = tfds.builder_from_directory(target).info
    counts = ", ".join(f"{split} {split_info.num_examples:,}" for split, split_info in info.splits.items())
    bad = (info.metadata or {}).get("bad_images", 0)
    eval_split = next((split for split in info.splits if split != "train"), "")
    overrides = {"name": raw.name, "eval_split": eval_split, "data_dir": arguments.data_dir}
    flags = " ".join(f"--config.data.{key}={value}" for key, value in overrides.items() if value)
    skipped = f"; {bad} images cannot be read and are left out" if bad else ""
    print(f"{target}: {counts} images of {len(raw.class_names)} classes{skipped}\ntrain on it with {flags}")


def _raw_dataset(name: str, data_dir: str, manual_dir: Path) -> RawDataset | None:
    if Path(name).is_dir():
        return sources.folder(Path(name))
    if name == "imagenet2012":
        return sources.imagenet2012(manual_dir)
    if name in ("cifar10", "cifar100"):
        return sources.cifar(int(name.removeprefix("cifar")), manual_dir)
    return sources.catalogue(name, data_dir)
