"""Dataset statistics, measured once on the training images: the mean image and the principal axes of the colours."""

import contextlib
import hashlib
import sys
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict
from rich.progress import track

from alexnet_jax.data import loader
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.run_dir import DamagedFileError, atomic_write


class Statistics(NamedTuple):
    """Statistics of the training images, float32, in grey levels from 0 to 255."""

    mean: np.ndarray  # (image_size, image_size, channels), subtracted from each image
    deviations: np.ndarray  # (channels,), standard deviations along the principal axes of the colours, largest first
    axes: np.ndarray  # (channels, channels), the axes as rows: unit vectors (red, green, blue)


def read(path: Path) -> Statistics | None:
    """Read the statistics in a file; None if there is no such file; raise DamagedFileError if it cannot be read."""
    arrays = _read_arrays(path, Statistics._fields)
    return None if arrays is None else Statistics(**arrays)


def write(path: Path, statistics: Statistics) -> None:
    """Write statistics to a file, atomically."""
    _write_arrays(path, statistics._asdict())


def load_or_measure(path: Path, dataset: Dataset, data_config: ConfigDict) -> Statistics:
    """Return the statistics in a run's file, or measure and write them if there is none, or a damaged one."""
    statistics = None
    with contextlib.suppress(DamagedFileError):
        statistics = read(path)
    if statistics is None:
        statistics = measure(dataset, data_config)
        write(path, statistics)
    return statistics


def measure(dataset: Dataset, data_config: ConfigDict) -> Statistics:
    """Measure the statistics of the training images; their moments are kept beside the dataset for the next time."""
    constant_mean = data_config.subtract == "mean"
    if constant_mean and not data_config.augment.colour.noise:
        return uniform(data_config, dataset.channels)
    image, covariance = _stored_moments(dataset, data_config)
    if data_config.subtract == "mean_pixel":
        image = np.broadcast_to(image.mean((0, 1)), image.shape)
    variances, axes = np.linalg.eigh(covariance)
    axes = axes.T[::-1]
    axes *= np.where(axes.sum(axis=1, keepdims=True) < 0, -1, 1)  # the sign is arbitrary; make it reproducible
    deviations = np.sqrt(variances[::-1].clip(0))
    mean = uniform(data_config, dataset.channels).mean if constant_mean else image.astype(np.float32)
    return Statistics(mean, deviations.astype(np.float32), axes.astype(np.float32))


def uniform(data_config: ConfigDict, channels: int) -> Statistics:
    """Return `data.mean` for every pixel, and colours without variance."""
    mean = np.broadcast_to(np.float32(data_config.mean), (data_config.image_size, data_config.image_size, channels))
    return Statistics(mean, np.zeros(channels, np.float32), np.eye(channels, dtype=np.float32))


def _stored_moments(dataset: Dataset, data_config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Return `moments`, stored in a prepared dataset's folder under a hash of the training images."""
    if dataset.folder is None:
        return moments(dataset, data_config)
    held_out = data_config.validation_split if "/" in data_config.validation_split else ""
    training_images = (dataset.fingerprint, data_config.train_split, data_config.image_size, held_out)
    path = dataset.folder / f"statistics_{hashlib.sha256(repr(training_images).encode()).hexdigest()[:16]}.npz"
    with contextlib.suppress(DamagedFileError):
        if arrays := _read_arrays(path, ("image", "covariance")):
            return arrays["image"], arrays["covariance"]
    image, covariance = moments(dataset, data_config)
    with contextlib.suppress(OSError):  # a read-only folder only means that they are measured again
        _write_arrays(path, {"image": image, "covariance": covariance})
    return image, covariance


def moments(dataset: Dataset, data_config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact mean image, and the covariance of the colours over all pixels of all training images."""

    def image_sums(position: int) -> dict[str, np.ndarray]:
        (image,) = loader.read(dataset.train, np.array([position]), data_config.image_size)["image"]
        colours = image.reshape(-1, dataset.channels).astype(np.float64)
        return {"image": image, "products": colours.T @ colours}

    count = len(dataset.train)
    options = grain.ReadOptions(num_threads=data_config.threads, prefetch_buffer_size=64)
    sums = grain.MapDataset.range(count).map(image_sums).to_iter_dataset(options)
    shape = (data_config.image_size, data_config.image_size, dataset.channels)
    total, products = np.zeros(shape, np.uint64), np.float64(0)
    for of_image in track(sums, f"measuring {count:,} images", count, disable=not sys.stdout.isatty()):
        total += of_image["image"]
        products = products + of_image["products"]  # exact: integers below 2**53, even for ImageNet
    mean = total / count
    mean_colour = mean.mean((0, 1))
    return mean, products / (count * data_config.image_size**2) - np.outer(mean_colour, mean_colour)


def _read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in names}
    except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFileError(f"{path}: cannot be read ({error}); must have the arrays {', '.join(names)}") from error


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
