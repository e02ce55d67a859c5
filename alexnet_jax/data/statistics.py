"""What is subtracted from the pixels, and how their colours vary: measured on the training images, once."""

import contextlib
import sys
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict
from rich.progress import track

from alexnet_jax import batches, records
from alexnet_jax.data import DataSet

SUBTRACT = ("mean_image", "central_mean_image", "mean_pixel", "mean")
FILE = "pixels.npz"  # in a run's folder


class Pixels(NamedTuple):
    """What a net wants to know of the pixels of its training images, in grey levels of 0 to 255.

    Attributes:
      mean: (image_size, image_size, channels) of float32, which is subtracted.
      deviations: (channels,), the standard deviations along the principal axes of the colours, largest first.
      axes: (channels, channels), a row for each of them: a unit vector (red, green, blue).
    """

    mean: np.ndarray
    deviations: np.ndarray
    axes: np.ndarray


def read(path: Path) -> Pixels | None:
    """What ``write`` wrote; None where there is no such file."""
    held = _read(path)
    return None if held is None else Pixels(**held)


def write(path: Path, pixels: Pixels) -> None:
    """Keeps them in a file, such as in a run's folder, which then needs its training images no more."""
    _write(path, pixels._asdict())


def of_run(workdir: Path, dataset: DataSet, config: ConfigDict) -> Pixels:
    """What a run began with, and so goes on with; when it begins, what is ``measured``."""
    found = read(workdir / FILE)
    if found is None:
        found = measured(dataset, config)
        write(workdir / FILE, found)
    return found


def measured(dataset: DataSet, config: ConfigDict) -> Pixels:
    """Of the training images, for the ``data`` section of a config.

    All images are read, once: the result is stored beside the data set, and measured anew when that has changed.
    """
    given = config.subtract == "mean"
    if given and not config.augment.colour.noise:
        return uniform(config, dataset.channels)
    image, covariance = _stored_moments(dataset, config)
    if config.subtract == "mean_pixel":
        image = np.broadcast_to(image.mean((0, 1)), image.shape)
    variances, axes = np.linalg.eigh(covariance)
    axes = axes.T[::-1]
    axes *= np.where(axes.sum(axis=1, keepdims=True) < 0, -1, 1)  # their sign means nothing; this one is reproducible
    deviations = np.sqrt(variances[::-1].clip(0))
    mean = uniform(config, dataset.channels).mean if given else image.astype(np.float32)
    return Pixels(mean, deviations.astype(np.float32), axes.astype(np.float32))


def uniform(config: ConfigDict, channels: int) -> Pixels:
    """``data.mean`` everywhere, and colours that do not vary."""
    mean = np.broadcast_to(np.float32(config.mean), (config.image_size, config.image_size, channels))
    return Pixels(mean, np.zeros(channels, np.float32), np.eye(channels, dtype=np.float32))


def _stored_moments(dataset: DataSet, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Mean image and covariance of the colours, from beside the data set if they are there."""
    if dataset.folder is None:
        return moments(dataset, config)
    path = dataset.folder / f"pixels_{dataset.fingerprint}.npz"
    if held := _read(path):
        return held["image"], held["covariance"]
    image, covariance = moments(dataset, config)
    with contextlib.suppress(OSError):  # a folder that cannot be written to: they will be measured again
        _write(path, {"image": image, "covariance": covariance})
    return image, covariance


def moments(dataset: DataSet, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Mean image and covariance of the colours over all pixels of all training images, exact to the last digit.

    Returns:
      (image_size, image_size, channels) and (channels, channels), of float64.
    """

    def of_image(position: int) -> dict[str, np.ndarray]:
        (image,) = batches.read(dataset.train, np.array([position]), config.image_size)["image"]
        colours = image.reshape(-1, dataset.channels).astype(np.float64)
        return {"image": image, "products": colours.T @ colours}

    count = len(dataset.train)
    images = grain.MapDataset.range(count).map(of_image)
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=64)
    read = images.to_iter_dataset(options)
    total, products = np.zeros((config.image_size, config.image_size, dataset.channels), np.uint64), np.float64(0)
    for sums in track(read, f"mean and colours of {count:,} images", count, disable=not sys.stdout.isatty()):
        total += sums["image"]
        products = products + sums["products"]  # whole numbers below 2**53, even for ImageNet
    mean = total / count
    pixel = mean.mean((0, 1))
    return mean, products / (count * config.image_size**2) - np.outer(pixel, pixel)


def _read(path: Path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    with np.load(path) as held:
        return dict(held)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with records.whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
