"""Configs, data and commands that several test modules share."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import config as config_lib
from alexnet_jax import train
from alexnet_jax.configs import base
from alexnet_jax.data import augment
from alexnet_jax.data.datasets import Arrays, Dataset
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.parallel import make_executor

REPOSITORY = Path(__file__).parents[1]
TESTS = REPOSITORY / "tests"

# The small network with few features, for 12 steps: for tests that do not depend on the sizes.
TINY: dict[str, Any] = {
    **{f"model.layers.conv{i}.features": 8 for i in range(1, 6)},
    **{f"model.layers.fc{i}.features": 16 for i in (6, 7)},
    "train.batch_size": 4,
    "train.epochs": 0.012,  # 12 steps
    "train.log_every": 2,
    "train.checkpoint_every": 3,
    "eval.every_epochs": 0.006,  # 6 steps
    "eval.train_images": 20,
}

# The first layers of a network are enough where only the loop matters, and compile faster.
SHALLOW = TINY | {"model.order": ("conv1", "conv3", "fc8")}

# Another value for each field that may change when a run is resumed.
FREELY_CHANGED: dict[str, Any] = {
    "data.data_dir": "elsewhere",
    "data.resident_bytes": 0,
    "data.host_bytes": 0,
    "data.threads": 1,
    "data.prefetch": 2,
    "train.executor": "vmap",
    "train.layout": "one_weird_trick",
    "train.steps_per_dispatch": 2,
    "train.profile": 1,
    "train.checkpoint_every": 4,
    "train.keep_checkpoints": 1,
    "eval.batch_size": 100,
}

NETWORKS = sorted(path.stem for path in (REPOSITORY / "configs" / "networks").glob("*.py"))
# Few features, and images just large enough, for a network of the ImageNet size.
REDUCED: dict[str, Any] = {
    **{f"model.layers.conv{i}.features": features for i, features in zip(range(1, 6), (8, 16, 16, 12, 8), strict=True)},
    **{f"model.layers.fc{i}.features": 16 for i in (6, 7)},
    "data.crop": 99,
}


def run_config(scale: str = "embedded", /, **changes: Any) -> ConfigDict:
    """Return a run's config at a scale; changes have dotted keys, or are its seed."""
    seed = changes.pop("seed", 0)
    return config_lib.run_config(base.get_config(scale, changes), "base", seed)


def network_config(name: str, **changes: Any) -> ConfigDict:
    """Return the config of a run of one of configs/networks/; changes have dotted keys."""
    study = importlib.import_module(f"alexnet_jax.configs.networks.{name}").get_config()
    study.update_from_flattened_dict(changes)
    return config_lib.reference_run(study)


def reduced(name: str, **changes: Any) -> ConfigDict:
    """Return one of configs/networks/ with few features, no dropout, and initial values that let every image count."""
    small = {} if name.startswith("cifar") else REDUCED
    config = network_config(name, **small, **{"model.dropout.rate": 0.0})
    with config.unlocked():
        for layer in config.model.layers.values():
            layer.update(weight_std=0.2, bias=0.1)
        config.update_from_flattened_dict(changes)
    return config


def random_statistics(config: ConfigDict, channels: int = 3) -> Statistics:
    """Return a mean image and colour axes as if they had been measured."""
    generator = np.random.default_rng(0)
    size = config.data.image_size
    mean = generator.uniform(90, 150, (size, size, channels)).astype(np.float32)
    axes = np.linalg.qr(generator.normal(size=(channels, channels)))[0].astype(np.float32)
    return Statistics(mean, np.array([60, 30, 10][:channels], np.float32), axes)


def centre_crops(images: np.ndarray, config: ConfigDict) -> jax.Array:
    """Return what the network sees of images at test time, with `random_statistics`."""
    (centre,) = augment.evaluation_views(1, config.data.image_size, config.data.crop)
    return augment.inputs(images, centre, config.data, random_statistics(config, images.shape[-1]))


def noise_dataset(config: ConfigDict, count: int = 1000) -> Dataset:
    """Return a dataset of black images for tests in which only its sizes matter: 1,000 classes at ImageNet's crop."""
    classes, channels = (1000, 3) if config.data.crop > 200 else (10, 1)
    size = config.data.image_size
    images = np.broadcast_to(np.uint8(0), (count, size, size, channels))
    source = Arrays(images, np.zeros(count, int))
    return Dataset(source, None, source, [str(label) for label in range(classes)], channels)


def noise_batch(config: ConfigDict, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a random batch that fits `noise_dataset`."""
    generator = np.random.default_rng(seed)
    dataset, size = noise_dataset(config), config.data.image_size
    return {
        "image": generator.integers(0, 256, (count, size, size, dataset.channels)).astype(np.uint8),
        "label": generator.integers(0, dataset.classes, count).astype(np.int32),
    }


def noise_setup(config: ConfigDict, executor: str = "auto") -> train.Setup:
    """Return the setup of a run on `noise_dataset`."""
    devices = make_executor(executor, config.model.towers, config.train.batch_size)
    return train.Setup(config, noise_dataset(config), devices)


OPTIMISED = {"XLA_FLAGS": ""}  # of commands that train for long: conftest.py has code optimised less


def command(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m` with the arguments in the repository, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, from the folder of the tests, with the code of this repository."""
    variables = {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run(
        [sys.executable, "-c", script], cwd=TESTS, env=variables, capture_output=True, text=True, check=False
    )


def assert_close(actual: Any, expected: Any, relative: float) -> None:
    """Assert that arrays agree up to a fraction of the largest absolute value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())
