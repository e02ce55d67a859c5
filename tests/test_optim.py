"""The update rule and its schedules against transcriptions in NumPy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run_config

from alexnet_jax import optim

STEPS_PER_EPOCH = 2

# Everything that can differ between parameters does: of the paper's net, three layers are enough.
EVERYTHING = {
    "optim.cut_epochs": (3.0, 5.0),
    "optim.biases.rate": 2.0,
    "optim.biases.decay": 0.0,
    "optim.biases.cut_epochs": (4.0,),
    "optim.biases.cut_divisor": 5.0,
    "model.layers.conv1.cut_epochs": (3.0, 5.0, 5.5),
    "model.layers.conv1.freeze_epoch": 6.0,
    "model.layers.conv2.weight_decay": 0.004,
}


def papers_rate(layer: str, kind: str, step: int) -> float:
    return 0.01 if step < 6 else 0.001 if step < 10 else 0.0001


def everythings_rate(layer: str, kind: str, step: int) -> float:
    if layer == "conv1" and step >= 12:
        return 0.0
    if kind == "bias":
        return 0.02 if step < 8 else 0.004
    if layer == "conv1" and step >= 11:
        return 0.00001
    return papers_rate(layer, kind, step)


def everythings_decay(layer: str, kind: str) -> float:
    return 0.0 if kind == "bias" else 0.004 if layer == "conv2" else 0.0005


@pytest.mark.parametrize(
    ("changes", "rate_of", "decay_of"),
    [
        ({"optim.cut_epochs": (3.0, 5.0)}, papers_rate, lambda layer, kind: 0.0005),
        (EVERYTHING, everythings_rate, everythings_decay),
    ],
    ids=["text", "everything"],
)
def test_update_rule_is_the_papers_through_rate_cuts(changes: dict, rate_of: Callable, decay_of: Callable) -> None:
    """Section 5: v <- 0.9 v - decay e w - e g; w <- w + v, with each parameter's own rate e and decay."""
    config = run_config("imagenet2012", **changes)
    layers = config.model.layers
    rule = optim.sgd(config.optim, layers)
    generator = np.random.default_rng(0)
    w = {name: {kind: generator.normal(size=4) for kind in ("kernel", "bias")} for name in ("conv1", "conv2", "fc8")}
    v = jax.tree.map(np.zeros_like, w)
    params = jax.tree.map(jnp.array, w)
    state = rule.init(params)
    for step in range(16):
        g = jax.tree.map(lambda x: generator.normal(size=x.shape), w)
        rates = optim.learning_rates(config.optim, layers, step, STEPS_PER_EPOCH)
        updates, state = rule.update(jax.tree.map(jnp.array, g), state, params, rates=rates)
        params = optax.apply_updates(params, updates)
        for name, kinds in w.items():
            for kind in kinds:
                rate, decay = rate_of(name, kind, step), decay_of(name, kind)
                v[name][kind] = 0.9 * v[name][kind] - decay * rate * w[name][kind] - rate * g[name][kind]
                w[name][kind] = w[name][kind] + v[name][kind]
                np.testing.assert_allclose(params[name][kind], w[name][kind], rtol=1e-5, atol=1e-7)


def test_the_paper_cuts_the_rate_three_times_by_ten() -> None:
    config = run_config("imagenet2012").optim
    steps = [0, 229, 230, 509, 510, 779, 780, 899]
    np.testing.assert_allclose(
        [optim.learning_rate(config, step, steps_per_epoch=10) for step in steps],
        [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5],
        rtol=1e-5,
    )


def test_a_stall_divides_every_rate() -> None:
    config = run_config("imagenet2012", **EVERYTHING)
    once, twice = (
        optim.learning_rates(config.optim, config.model.layers, 7, STEPS_PER_EPOCH, stalls) for stalls in (0, 2)
    )
    jax.tree.map(lambda one, two: np.testing.assert_allclose(two, one / 100, rtol=1e-6), once, twice)


def test_the_rate_is_cut_when_the_error_stalls_and_no_more_than_three_times() -> None:
    """After two evaluations in a row without a lower error; a lower one, or a cut, begins anew."""
    config = run_config(**{"optim.stall.evaluations": 2}).optim.stall
    errors = [0.9, 0.8, 0.8, 0.7, 0.7, 0.75, 0.6, 0.6, 0.61, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    cuts = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    stall, seen = optim.Stall(), []
    for error in errors:
        stall = stall.after(error, config)
        seen.append(stall.cuts)
    assert seen == cuts
    assert stall.best == 0.6


def test_without_a_patience_nothing_stalls() -> None:
    config = run_config().optim.stall
    stall = optim.Stall()
    for _ in range(20):
        stall = stall.after(0.5, config)
    assert stall.cuts == 0
