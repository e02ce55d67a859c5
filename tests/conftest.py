"""What the tests share. A CPU is two devices here, one for each tower."""

import importlib
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

if "PYTEST_XDIST_WORKER" not in os.environ:
    # What one test, or one of its commands, has compiled, the others need not; pytest-xdist's workers inherit it.
    _COMPILED = tempfile.TemporaryDirectory(prefix="alexnet_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**32)  # bytes; with a limit, JAX locks the folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import numpy as np
import pytest
from browser import EXECUTABLE, Browser
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax import augment
from alexnet_jax import config as config_lib
from alexnet_jax.pixels import Pixels
from configs import base

jax.config.update("jax_num_cpu_devices", 2)

REPOSITORY = Path(__file__).parents[1]
SHARED_IMAGES = REPOSITORY.parent / "shared" / "prepare_data.py"

# The small net with few features, on few images: for what does not depend on their number.
TINY = {
    **{f"model.layers.conv{i}.features": 8 for i in range(1, 6)},
    **{f"model.layers.fc{i}.features": 16 for i in (6, 7)},
    "train.batch_size": 4,
    "train.epochs": 0.012,  # 12 steps
    "train.log_every": 2,
    "train.checkpoint_every": 3,
    "eval.every_epochs": 0.006,  # 6 steps
    "eval.train_images": 20,
}


def run_config(scale: str = "embedded", seed: int = 0, **changes: Any) -> ConfigDict:
    """A run's config at a scale; changes have dotted keys."""
    study = base.get_config(scale)
    for key, value in changes.items():
        study.update_from_flattened_dict({key: value})
    return config_lib.run_config(study, "base", seed)


def any_pixels(config: ConfigDict, channels: int = 3) -> Pixels:
    """A mean image and colours that vary, as if they had been measured."""
    generator = np.random.default_rng(0)
    size = config.data.image_size
    mean = generator.uniform(90, 150, (size, size, channels)).astype(np.float32)
    axes = np.linalg.qr(generator.normal(size=(channels, channels)))[0].astype(np.float32)
    return Pixels(mean, np.float32([60, 30, 10][:channels]), axes)


def centre_crops(images: np.ndarray, config: ConfigDict) -> jax.Array:
    """What the net sees of images at test time, less ``any_pixels``' mean."""
    (centre,) = augment.evaluation_views(1, config.data.image_size, config.data.crop)
    return augment.inputs(images, centre, config.data, any_pixels(config, images.shape[-1]))


NETS = sorted(path.stem for path in (REPOSITORY / "configs" / "nets").glob("*.py"))
# Few features, and images just large enough, for a net of the ImageNet size.
REDUCED = {
    **{f"model.layers.conv{i}.features": features for i, features in zip(range(1, 6), (8, 16, 16, 12, 8), strict=True)},
    **{f"model.layers.fc{i}.features": 16 for i in (6, 7)},
    "data.crop": 99,
}


def net_config(name: str, **changes: Any) -> ConfigDict:
    """The config of a run of one of configs/nets/; changes have dotted keys."""
    net = importlib.import_module(f"configs.nets.{name}").get_config()
    net.update_from_flattened_dict(changes)
    return config_lib.reference_run(net)


def reduced(name: str, **changes: Any) -> ConfigDict:
    """One of configs/nets/ with few features and no dropout; weights and biases that let every image count."""
    small = {} if name.startswith("cifar") else REDUCED
    config = net_config(name, **small, **{"model.dropout.rate": 0.0})
    with config.unlocked():
        for layer in config.model.layers.values():
            layer.update(weight_std=0.2, bias=0.1)
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def tiny() -> ConfigDict:
    return run_config(**TINY)


@pytest.fixture(scope="module")
def quickly_compiled() -> Iterator[None]:
    """For functions that are called once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def command(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs python -m with the arguments, in the repository, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, which sees the tests' modules."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch, an oracle that not every machine has room for."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        absent = pytest.fail if "CI" in os.environ else pytest.skip
        absent("PyTorch is what this is held against: pip install --requirement requirements-torch.lock")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real one, which not every machine has."""
    if EXECUTABLE is None:
        absent = pytest.fail if "CI" in os.environ else pytest.skip
        absent("Chromium is what pages are looked at with: apt-get install chromium")
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[], subprocess.CompletedProcess[str]]]:
    """The folder of the README's main job, less an arm, a seed and most epochs, and its command to give again."""
    folder = tmp_path_factory.mktemp("runs") / "ablation_lrn"

    def run() -> subprocess.CompletedProcess[str]:
        less = ("--only=lrn,no_lrn", "--seeds=0:2", "--config.train.epochs=1")
        return command("alexnet_jax.main", "--config=configs/ablation_lrn.py", *less, f"--workdir={folder}")

    first = run()
    assert first.returncode == 0, first.stderr
    return folder, run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEGs of many sizes: train and val, cat (reddish) and dog (bluish), 20 and 5 of each."""
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 60, (8, 8, 3)) + np.array([[150, 60, 10], [10, 60, 150]])[label]
                size = tuple(generator.integers(50, 90, 2).tolist())
                picture = Image.fromarray(noise.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
                picture.save(folder / split / name / f"{number}.jpg")
    return folder


@pytest.fixture(scope="session")
def shared_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder with imagenette_224."""
    if not SHARED_IMAGES.exists():
        pytest.skip(f"real images are prepared by {SHARED_IMAGES.relative_to(REPOSITORY.parent)}, which is not here")
    folder = tmp_path_factory.mktemp("tfds")
    prepare = runpy.run_path(str(SHARED_IMAGES))
    prepare["Imagenette224"](data_dir=folder, file_format="array_record").download_and_prepare()
    return folder
