"""Makes a data set that training reads: python -m alexnet_jax.prepare NAME|FOLDER [--data_dir=DIR]

FOLDER holds pictures of your own: train/CLASS/PICTURE, and those held out as val/CLASS/PICTURE or test/CLASS/PICTURE.
NAME is cifar10, cifar100 or imagenet2012, which are made of their archives in --manual_dir, or a classification set of
the TFDS catalogue, most of which TFDS makes with TensorFlow: pip install tensorflow-cpu, the extra [tf].

Photos are stored as the paper has them (section 2): shorter side scaled to 256 pixels, then the central square, in
colour. A picture that cannot be read is named, and then nothing is made, unless --skip_bad leaves such pictures out.
"""

import argparse
import collections
import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet_jax import data, logs, originals, pictures
from alexnet_jax.originals import Original, Originals

with tfds.core.registered.skip_registration():  # or it would take the place of TFDS's own sets

    class Prepared(tfds.core.GeneratorBasedBuilder):
        """Pictures as JPEG squares, or, where they are of one small size, as PNG, which keeps every pixel."""

        VERSION = tfds.core.Version(data.PREPARED_VERSION)

        def __init__(self, source: Originals, size: int, data_dir: str, skip_bad: bool, bar: Progress):
            """Arguments as for ``prepare``; the bar shows how many pictures are read."""
            self.name = source.name
            self._source, self._size, self._skip_bad, self._bar = source, size, skip_bad, bar
            self._bad: list[str] = []
            config = tfds.core.BuilderConfig(name=data.prepared_config(size))
            super().__init__(data_dir=data.root(data_dir), config=config)

        def _info(self) -> tfds.core.DatasetInfo:
            encoding = "jpeg" if self._source.size is None else "png"
            shape = (self._size, self._size, 3)
            features = {
                "image": tfds.features.Image(shape=shape, encoding_format=encoding),
                "label": tfds.features.ClassLabel(names=self._source.classes),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                metadata=tfds.core.MetadataDict(),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
            return {split: self._generate_examples(split) for split in self._source.counts}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            task = self._bar.add_task(split, total=self._source.counts[split])
            missing = set(range(len(self._source.classes)))
            for original, encoded in _ahead(self._encode, self._source.read(split)):
                self._bar.advance(task)
                try:
                    content = encoded.result()
                except OSError as error:
                    file = original.content if isinstance(original.content, Path) else original.key
                    self._bad.append(f"{file}: {error}")
                else:
                    missing.discard(original.label)
                    yield original.key, {"image": io.BytesIO(content), "label": original.label}
            if missing and (self._skip_bad or not self._bad):
                classes = ", ".join(self._source.classes[label] for label in sorted(missing))
                raise ValueError(f"{self.name}: {split} has no picture that can be read of {classes}")
            if split == list(self._source.counts)[-1]:
                if self._bad and not self._skip_bad:
                    raise BadPicturesError(self._bad)
                self.info.metadata["bad_pictures"] = len(self._bad)

        def _encode(self, original: Original) -> bytes:
            content = original.content
            if isinstance(content, np.ndarray):
                return pictures.png(content)
            return pictures.square_jpeg(content.read_bytes() if isinstance(content, Path) else content, self._size)


def _ahead(encode: Callable[[Original], bytes], source: Iterator[Original]) -> Iterator[tuple[Original, Future[bytes]]]:
    """Every picture with what it is encoded to, in order; as many threads as there are cores work some ahead."""
    workers = os.cpu_count() or 1
    waiting: collections.deque[tuple[Original, Future[bytes]]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for original in source:
            waiting.append((original, pool.submit(encode, original)))
            if len(waiting) > 4 * workers:
                yield waiting.popleft()
        yield from waiting


class BadPicturesError(ValueError):
    """Some pictures cannot be read.

    Attributes:
      bad: which and why.
    """

    def __init__(self, bad: list[str]):
        self.bad = bad
        lines = "\n".join(bad)
        super().__init__(f"these {len(bad)} cannot be read:\n{lines}\nRepair or remove them, or give --skip_bad")


def prepare(source: Originals, size: int, data_dir: str = "", *, skip_bad: bool = False) -> Path:
    """Makes a data set, whole or not at all; one that is there already is left alone.

    Args:
      source: the pictures.
      size: side of the stored squares in pixels; a source of small images has its own.
      data_dir: where data sets are; empty for TFDS's default.
      skip_bad: whether pictures that cannot be read are left out, and counted in the set's metadata.

    Returns:
      The folder of the data set.

    Raises:
      BadPicturesError: some cannot be read.
      ValueError: the source is not whole, or a class has no picture left.
      OSError: the folder cannot be written, or the disk is full.
    """
    target = data.prepared_folder(source.name, source.size or size, data_dir)
    if target.is_dir():
        return target
    for unfinished in target.parent.glob("*incomplete*"):  # of one that was killed
        shutil.rmtree(unfinished)
    tfds.disable_progress_bar()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stdout)
    with Progress(*columns, console=console, disable=not sys.stdout.isatty(), redirect_stdout=False) as bar:
        builder = Prepared(source, source.size or size, data_dir, skip_bad, bar)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS says that it downloads something
                builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
        except RuntimeError as error:  # ArrayRecord's own for a disk that is full
            raise OSError(f"{target}: {error}") from error
    return target


def main(argv: list[str] | None = None) -> None:
    """Prepares the data set that the arguments name, and says how to train on it."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="NAME|FOLDER")
    parser.add_argument("--data_dir", default="", help="where data sets go; by default where TFDS has them")
    parser.add_argument(
        "--manual_dir", default="", help="where archives are; by default downloads/manual in --data_dir"
    )
    parser.add_argument("--size", type=int, default=256, help="side of the stored squares in pixels (default: 256)")
    parser.add_argument("--skip_bad", action="store_true", help="leave out pictures that cannot be read")
    arguments = parser.parse_args(argv)
    logs.quiet_libraries()
    if arguments.size < 1:
        parser.error(f"--size={arguments.size}: must be 1 pixel or more")
    manual = Path(arguments.manual_dir or data.root(arguments.data_dir) / "downloads" / "manual")
    try:
        source = _originals(arguments.source, arguments.data_dir, manual)
        if source is None:
            print(f"{arguments.source}: is prepared; its images are small and stay as they are")
            return
        target = prepare(source, arguments.size, arguments.data_dir, skip_bad=arguments.skip_bad)
    except (ValueError, OSError) as error:
        remedy = ""
        if isinstance(error, OSError):
            remedy = f"\nIs there room in {data.root(arguments.data_dir)}? Make some, or name another --data_dir"
        sys.exit(f"prepare: {error}{remedy}\nNothing was made")
    info = tfds.builder_from_directory(target).info
    counts = ", ".join(f"{split} {of_split.num_examples:,}" for split, of_split in info.splits.items())
    bad = (info.metadata or {}).get("bad_pictures", 0)
    held_out = [f" --config.data.eval_split={split}" for split in info.splits if split != "train"][:1]
    print(
        f"{target}: {counts} images of {len(source.classes)} classes"
        + (f"; {bad} pictures could not be read and are left out" if bad else "")
        + f"\ntrain on it with --config.data.name={source.name}{''.join(held_out)}"
        + (f" --config.data.data_dir={arguments.data_dir}" if arguments.data_dir else "")
    )


def _originals(name: str, data_dir: str, manual: Path) -> Originals | None:
    if Path(name).is_dir():
        return originals.folder(Path(name))
    if name == "imagenet2012":
        return originals.imagenet2012(manual)
    if name in ("cifar10", "cifar100"):
        return originals.cifar(int(name.removeprefix("cifar")), manual)
    return originals.catalogue(name, data_dir)


if __name__ == "__main__":
    main()
