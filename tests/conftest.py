"""Fixtures. In the tests a CPU is two devices, one for each tower."""

import gc
import importlib
import importlib.metadata
import os
import runpy
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ["KERAS_BACKEND"] = "jax"
if "PYTEST_XDIST_WORKER" not in os.environ:
    # All tests and the commands they run share one compilation cache; pytest-xdist's workers inherit it.
    _COMPILED = tempfile.TemporaryDirectory(prefix="alexnet_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**32)  # bytes; with a limit, JAX locks the folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    # Most programs take longer to compile than to run. With XLA_FLAGS= the code is as optimised as a user's.
    _FLAGS = "--xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # others end the process: they have no such flag
        _FLAGS += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", _FLAGS)

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax import stop
from support import OPTIMISED, REPOSITORY, TESTS, TINY, command, run_config

jax.config.update("jax_num_cpu_devices", 2)
gc.set_threshold(50_000)  # tracing allocates much, and little of it is garbage

# The files that take longest, longest first.
LONG_FILES = (
    *("processes", "train", "main_job", "notebooks", "parallel", "networks", "runner", "soak", "submit", "gpu_scripts"),
    *("one_weird_trick", "model", "lowering", "convert", "evaluate", "config", "packaging", "report", "layers"),
    *("golden", "released_weights", "predict"),
)

SHARED_IMAGES = REPOSITORY.parent / "shared" / "prepare_data.py"


def pytest_configure(config: pytest.Config) -> None:
    """Keep pytest-xdist from ordering files by the number of their tests, instead of by their length."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests against PyTorch as slow, and sort long files first, so that no worker is left alone with one.

    The fast tests run on every Python, and PyTorch is not installed on all.
    """
    order = {f"test_{name}.py": number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        if "torch" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def commands_without_torch() -> None:
    """Hide PyTorch from the commands that the tests run: tensorboardX would import it, which takes seconds."""
    path = [str(TESTS / "without_torch"), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))


@pytest.fixture
def tiny() -> ConfigDict:
    """Return the config of a run of 12 steps."""
    return run_config(**TINY)


@pytest.fixture
def default_handlers() -> Iterator[None]:
    """Install Python's handlers of stop signals: a shell's background jobs ignore SIGINT, and so would the test's."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    for number in stop.SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """Import PyTorch, an oracle that not every machine has room for."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        absent = pytest.fail if "CI" in os.environ else pytest.skip
        absent("PyTorch is this test's oracle: pip install --requirement requirements-torch.lock")


@pytest.fixture(scope="session")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[], subprocess.CompletedProcess[str]]]:
    """Run the README's main job with fewer arms, seeds and epochs; return its folder and the function that runs it."""
    folder = tmp_path_factory.mktemp("runs") / "ablation_lrn"

    def run() -> subprocess.CompletedProcess[str]:
        less = ("--only=lrn,no_lrn", "--seeds=0:2", "--config.train.epochs=0.2")  # 100 steps
        arguments = ("--config=configs/ablation_lrn.py", *less, f"--workdir={folder}")
        return command("alexnet_jax.main", *arguments, environment=OPTIMISED)

    first = run()
    assert first.returncode == 0, first.stderr
    return folder, run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of JPEGs of many sizes: train and val, cat (reddish) and dog (bluish), 20 and 5 of each."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 60, (8, 8, 3)) + np.array([[150, 60, 10], [10, 60, 150]])[label]
                size = tuple(generator.integers(50, 90, 2).tolist())
                image = Image.fromarray(noise.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
                image.save(folder / split / name / f"{number}.jpg")
    return folder


@pytest.fixture(scope="session")
def shared_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare imagenette_224, and return its TFDS folder."""
    if not SHARED_IMAGES.exists():
        pytest.skip(f"real images are prepared by {SHARED_IMAGES.relative_to(REPOSITORY.parent)}, which is not here")
    folder = tmp_path_factory.mktemp("tfds")
    prepare = runpy.run_path(str(SHARED_IMAGES))
    prepare["Imagenette224"](data_dir=folder, file_format="array_record").download_and_prepare()
    return folder
