"""The update rules and schedules against transcriptions in NumPy and against PyTorch's optimizers."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from alexnet_jax import optim
from support import run_config

STEPS_PER_EPOCH = 2
STEPS = 16

# Every difference between parameters that a config can make.
EVERYTHING: dict[str, Any] = {
    "optim.decay_epochs": (3.0, 5.0),
    "optim.biases.learning_rate": 2.0,
    "optim.biases.weight_decay": 0.0,
    "optim.biases.decay_epochs": (4.0,),
    "optim.biases.decay_factor": 0.2,
    "model.layers.conv1.decay_epochs": (3.0, 5.0, 5.5),
    "model.layers.conv1.freeze_epoch": 6.0,
    "model.layers.conv2.weight_decay": 0.004,
}

Params = dict[str, dict[str, np.ndarray]]


def paper_learning_rate(layer: str, part: str, step: int) -> float:
    return 0.01 if step < 6 else 0.001 if step < 10 else 0.0001


def everything_learning_rate(layer: str, part: str, step: int) -> float:
    if layer == "conv1" and step >= 12:
        return 0.0
    if part != "kernel":
        return 0.02 if step < 8 else 0.004
    return 0.00001 if layer == "conv1" and step >= 11 else paper_learning_rate(layer, part, step)


def everything_weight_decay(layer: str, part: str) -> float:
    return 0.0 if part != "kernel" else 0.004 if layer == "conv2" else 0.0005


def random_params(generator: np.random.Generator) -> Params:
    parts = {"conv1": ("kernel", "bias"), "conv1_batch_norm": ("scale", "bias"), "conv2": ("kernel", "bias")}
    return {layer: {part: generator.normal(size=4) for part in parts[layer]} for layer in parts}


def make_optimizer(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    return optim.make_optimizer(config.optim, config.model.layers, STEPS_PER_EPOCH, STEPS)


def run(config: ConfigDict, params: Params, plateau_decays: int = 0) -> Iterator[tuple[int, Params, Any]]:
    """Yield each step, its gradients and the parameters after it."""
    generator = np.random.default_rng(1)
    optimizer = make_optimizer(config)
    update, peak = jax.jit(optimizer.update), optim.peak_learning_rate(config.optim, plateau_decays)
    current = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(current)
    for step in range(STEPS):
        gradients = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape), params)
        updates, state = update(gradients, state, current, peak=peak)
        current = optax.apply_updates(current, updates)
        yield step, gradients, current


@pytest.mark.parametrize(
    ("changes", "learning_rate", "weight_decay"),
    [
        ({"optim.decay_epochs": (3.0, 5.0)}, paper_learning_rate, lambda layer, part: 0.0005),
        (EVERYTHING, everything_learning_rate, everything_weight_decay),
    ],
    ids=["paper", "everything"],
)
def test_paper_rule_matches_numpy(
    changes: dict[str, Any], learning_rate: Callable[..., float], weight_decay: Callable[..., float]
) -> None:
    """Section 5: v <- 0.9 v - decay e w - e g; w <- w + v, with each parameter's learning rate e and decay."""
    w = random_params(np.random.default_rng(0))
    v = jax.tree.map(np.zeros_like, w)
    for step, g, params in run(run_config("imagenet2012", **changes), w):
        for layer, parts in w.items():
            for part in parts:
                rate, decay = learning_rate(layer, part, step), weight_decay(layer, part)
                v[layer][part] = 0.9 * v[layer][part] - decay * rate * w[layer][part] - rate * g[layer][part]
                w[layer][part] = w[layer][part] + v[layer][part]
                np.testing.assert_allclose(params[layer][part], w[layer][part], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_rule_matches_pytorch_through_decay_steps(name: str, torch: ModuleType) -> None:
    changes = {"optim.name": name, "optim.betas": (0.8, 0.99), "optim.weight_decay": 0.1, **EVERYTHING}
    config = run_config("imagenet2012", **changes)

    def weight_decay(layer: str, part: str) -> float:
        return 0.0 if part != "kernel" else 0.004 if layer == "conv2" else 0.1

    w = random_params(np.random.default_rng(0))
    tensors = {(layer, part): torch.tensor(values) for layer, parts in w.items() for part, values in parts.items()}
    groups = [{"params": tensor, "weight_decay": weight_decay(*path)} for path, tensor in tensors.items()]
    oracle = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.0, momentum=config.optim.momentum),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.0, betas=config.optim.betas),
    }[name]()
    for step, gradients, params in run(config, w):
        for (path, tensor), group in zip(tensors.items(), oracle.param_groups, strict=True):
            group["lr"] = everything_learning_rate(*path, step)
            tensor.grad = torch.tensor(gradients[path[0]][path[1]])
        oracle.step()
        for (layer, part), tensor in tensors.items():
            np.testing.assert_allclose(params[layer][part], tensor, rtol=1e-5, atol=1e-6)


def learning_rates(config: ConfigDict, steps: list[int], plateau_decays: int = 0) -> list[float]:
    return [float(optim.learning_rate(config.optim, 10, 900, step, plateau_decays)) for step in steps]


def test_learning_rate_decays_at_the_papers_epochs() -> None:
    config = run_config("imagenet2012")
    steps = [0, 229, 230, 509, 510, 779, 780, 899]
    expected = [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]
    np.testing.assert_allclose(learning_rates(config, steps), expected, rtol=1e-5)
    np.testing.assert_allclose(learning_rates(config, steps, plateau_decays=2), np.array(expected) / 100, rtol=1e-5)


def test_decay_epochs_in_the_same_step_both_decay() -> None:
    config = run_config("imagenet2012", **{"optim.decay_epochs": (1.0, 1.01)})
    np.testing.assert_allclose(learning_rates(config, [9, 10]), [1e-2, 1e-4], rtol=1e-5)


def test_decay_beyond_the_largest_step_is_never_reached() -> None:
    """Steps are counted in int32."""
    config = run_config("imagenet2012", **{"optim.decay_epochs": (1.0, 100_000.0)}).optim
    rate = optim.learning_rate(config, 50_000.0, 10, np.int32(2**31 - 2))
    assert rate == pytest.approx(1e-3)


def test_learning_rate_beyond_float32_is_infinite() -> None:
    """Training then ends as diverged."""
    huge = run_config("imagenet2012", **{"optim.decay_factor": 1e15}).optim
    assert optim.peak_learning_rate(huge, plateau_decays=30) == np.inf


def test_step_schedule_warms_up_linearly_from_zero() -> None:
    config = run_config("imagenet2012", **{"optim.warmup_epochs": 2.0, "optim.decay_epochs": (1.0, 3.0)})
    rates = learning_rates(config, [0, 1, 10, 19, 20, 29, 30])
    np.testing.assert_allclose(rates, [0, 5e-4, 5e-4, 9.5e-4, 1e-3, 1e-3, 1e-4], rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 50])
def test_cosine_schedule_is_its_formula(warmup: int) -> None:
    """0.5 * (1 + cos(pi * progress)) from the end of the linear warm-up to 0 at the end of training."""
    config = run_config("imagenet2012", **{"optim.schedule": "cosine", "optim.warmup_epochs": warmup / 10})
    steps = [0, 1, 49, 50, 51, 475, 899, 900]
    expected = [
        0.01 * (step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (900 - warmup))))
        for step in steps
    ]
    np.testing.assert_allclose(learning_rates(config, steps), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["paper", "sgd", "adamw"])
def test_plateau_decays_multiply_every_learning_rate(name: str) -> None:
    config = run_config("imagenet2012", **EVERYTHING, **{"optim.name": name, "optim.decay_factor": 0.5})
    w = random_params(np.random.default_rng(0))
    (_, _, once), (_, _, twice) = (next(run(config, w, plateau_decays)) for plateau_decays in (0, 2))

    def check(start: np.ndarray, one: jax.Array, two: jax.Array) -> None:
        np.testing.assert_allclose(two - start, (one - start) / 4, rtol=1e-2, atol=1e-7)
        assert np.abs(one - start).max() > 1e-5

    jax.tree.map(check, w, once, twice)


@pytest.mark.parametrize("changes", [{}, EVERYTHING, EVERYTHING | {"optim.name": "adamw"}], ids=["", "rules", "adamw"])
def test_state_of_two_towers_survives_a_checkpoint(changes: dict[str, Any], tmp_path: Path) -> None:
    optimizer = make_optimizer(run_config("imagenet2012", **changes))
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), random_params(np.random.default_rng(0)))
    fresh = jax.vmap(optimizer.init)(params)
    _, state = jax.vmap(lambda p, s: optimizer.update(p, s, p, peak=0.01))(params, fresh)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
        manager.wait_until_finished()
        restored = manager.restore(1, args=ocp.args.Composite(state=ocp.args.StandardRestore(fresh)))["state"]
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_plateau_decays_after_patience_and_at_most_max_decays_times() -> None:
    """After two evaluations in a row without a lower error; a lower error, or a decay, starts the count again."""
    config = run_config(**{"optim.plateau.patience": 2}).optim.plateau
    assert config.max_decays == 3
    errors = [0.9, 0.8, 0.8, 0.7, 0.7, 0.75, 0.6, 0.6, 0.61, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    expected = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    plateau, decays = optim.Plateau(), []
    for error in errors:
        plateau = plateau.after(error, config)
        decays.append(plateau.decays)
    assert decays == expected
    assert plateau.best == 0.6


def test_plateau_without_patience_never_decays() -> None:
    plateau = optim.Plateau()
    for _ in range(20):
        plateau = plateau.after(0.5, run_config().optim.plateau)
    assert plateau.decays == 0
