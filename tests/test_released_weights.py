"""The released networks have the errors on their card, and recognise its examples."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from alexnet_jax import weights
from alexnet_jax.config import load_study, reference_run
from alexnet_jax.data import datasets, image_io
from alexnet_jax.data.datasets import Arrays
from alexnet_jax.evaluate import Outcomes, evaluate, make_predictor
from alexnet_jax.model import count_parameters
from alexnet_jax.parallel import Executor
from alexnet_jax.tools import predict
from support import REPOSITORY

FOLDER = REPOSITORY / "experiments" / "weights"
CARD = (FOLDER / "README.md").read_text()
DATA = REPOSITORY.parent / "shared" / "data"
CONFIGS = {
    "digits": "configs/ablation_lrn.py",
    "cifar10": "configs/ablation_lrn.py:cifar10",
    "imagenette": "configs/ablation_lrn.py:imagenette_small",
}


def config_of(name: str) -> ConfigDict:
    return reference_run(load_study(CONFIGS[name]))


def outcomes_on(name: str, config: ConfigDict, held_out: datasets.Source) -> Outcomes:
    """Evaluate a released network."""
    network, executor = weights.load_network(FOLDER / f"{name}.safetensors", config), Executor("vmap", 2)
    variables, statistics = executor.place(network.variables), executor.replicate(network.known_statistics())
    predictor = make_predictor(config, network.classes, executor)
    assert f" {count_parameters(network.variables['params']):,} float32 " in CARD
    assert sum(path.stat().st_size for path in FOLDER.glob(f"{name}.safetensors*")) < 2e6
    return evaluate([lambda images: predictor(variables, statistics, images)], held_out, config)


def error_on_card(wrong: int, count: int, what: str) -> str:
    """Return how the card states an error, with its exact binomial interval."""
    low, high = stats.binomtest(wrong, count).proportion_ci(method="exact")
    percent = f"{100 * wrong / count:.1f} % of {count:,} {what} ({wrong:,} of them)"
    return f"{percent}, 95 % CI {100 * low:.1f} to {100 * high:.1f} %"


@pytest.mark.slow
def test_card_is_of_the_digits_network() -> None:
    config = config_of("digits")
    outcomes = outcomes_on("digits", config, datasets.load(config.data).evaluation)
    assert error_on_card(int(outcomes.metrics["top1_error"].sum()), 1000, "held-out digits") in CARD


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "archive", "split", "wrong", "count", "what"),
    [
        ("cifar10", "cifar10_jpeg_q75.tar.xz", "test/", 2363, 10_000, "held-out images"),
        ("imagenette", "imagenette_160.tar.xz", "val/", 1023, 3925, "held-out photographs"),
    ],
)
def test_card_is_of_the_networks_of_photographs(
    name: str, archive: str, split: str, wrong: int, count: int, what: str
) -> None:
    """Their error on every tenth held-out image is what the card says, within its binomial error."""
    assert error_on_card(wrong, count, what) in CARD
    if not (DATA / archive).exists():
        pytest.skip(f"needs {archive}, which is not here")
    config = config_of(name)
    with tarfile.open(DATA / archive) as tar:
        held_out = sorted((file for file in tar if file.isfile() and split in file.name), key=lambda file: file.name)
        assert len(held_out) == count
        files = {file.name: tar.extractfile(file) for file in held_out[::10]}
        contents = {path: file.read() for path, file in files.items() if file is not None}
    # As in preparation: photographs are resized, small images kept.
    images = [
        image_io.decode(image_io.encode_jpeg(content, config.data.image_size), 3) for content in contents.values()
    ]
    names = sorted({Path(file.name).parent.name for file in held_out})  # in the order of the labels
    labels = np.array([names.index(Path(path).parent.name) for path in contents])
    outcomes = outcomes_on(name, config, Arrays(np.stack(images), labels))
    assert stats.binomtest(int(outcomes.metrics["top1_error"].sum()), len(labels), wrong / count).pvalue > 0.001


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [("digits", "7.png", "7"), ("cifar10", "horse.jpg", "horse"), ("imagenette", "parachute.jpg", "parachute")],
)
def test_released_network_recognises_its_example(name: str, image: str, expected: str) -> None:
    (prediction,) = predict.predict(FOLDER / f"{name}.safetensors", [FOLDER / image], config=config_of(name))
    assert prediction.classes[0] == expected
    assert prediction.probabilities[0] > 0.9
