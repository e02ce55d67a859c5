"""The released network has the error on its card, and the card's command predicts."""

import pytest
from scipy import stats

from alexnet_jax import weights
from alexnet_jax.config import load_study, reference_run
from alexnet_jax.data import datasets
from alexnet_jax.evaluate import evaluate, make_predictor
from alexnet_jax.model import count_parameters
from alexnet_jax.parallel import Executor
from alexnet_jax.tools import predict
from support import REPOSITORY

FOLDER = REPOSITORY / "experiments" / "weights"
DIGITS = FOLDER / "digits.safetensors"


@pytest.mark.slow
def test_card_is_of_the_released_network() -> None:
    config = reference_run(load_study("configs/ablation_lrn.py"))
    network, executor = weights.load_network(DIGITS, config), Executor("vmap", 2)
    variables, statistics = executor.place(network.variables), network.known_statistics()
    predictor = make_predictor(config, network.classes, executor)
    outcomes = evaluate(
        [lambda images: predictor(variables, statistics, images)], datasets.load(config.data).evaluation, config
    )
    wrong = int(outcomes.metrics["top1_error"].sum())
    low, high = stats.binomtest(wrong, len(outcomes.labels)).proportion_ci(method="exact")
    card = (FOLDER / "README.md").read_text()
    assert (
        f"{wrong / 10:.1f} % of 1,000 held-out digits ({wrong} of them), 95 % CI {100 * low:.1f} to {100 * high:.1f} %"
        in card
    )
    assert f"| parameters | {count_parameters(network.variables['params']):,} " in card
    assert DIGITS.stat().st_size < 2e6


@pytest.mark.slow
def test_released_network_recognises_its_example() -> None:
    config = reference_run(load_study("configs/ablation_lrn.py"))
    (prediction,) = predict.predict(DIGITS, [FOLDER / "7.png"], config=config)
    assert prediction.classes[0] == "7"
    assert prediction.probabilities[0] > 0.9
