"""The first steps of training give the numbers in golden.json, on any CPU and with any supported version of JAX.

A difference means that the network, its initial values, the augmentation or the update has changed. If that is
intended, `python tests/test_golden.py` writes golden.json again; the commit says what has changed and why.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from alexnet_jax import optim, train
from alexnet_jax.data.datasets import Arrays, Dataset
from alexnet_jax.parallel import Executor
from support import network_config, random_statistics, reduced, run_config

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 3  # the first has no momentum yet; before the third, the learning rate of the paper's network decays
# Three steps do not amplify rounding much: JAX 0.10 and 0.12, vmap and pmap, and instructions from SSE4 to AVX-512
# differ by less than 1e-5.
RELATIVE = 1e-4
RENEW = (
    f"if this change of the numbers is intended, run `python tests/{Path(__file__).name}`, and say why in the commit"
)

CONFIGS = {
    "embedded": run_config("embedded", **{"data.subtract": "mean_image"}),
    "cifar_80sec": network_config("cifar_80sec", **{"train.batch_size": 8}),
    "paper": reduced(
        "paper", **{"train.batch_size": 8, "optim.learning_rate": 0.001, "optim.decay_epochs": (2 / 125,)}
    ),
    "batch_norm": run_config(
        "cifar10",
        **{
            "model.order": ("conv1", "conv3", "fc6", "fc8"),
            "model.layers.conv1.then": ("activation", "batch_norm", "max_pool"),
            "model.layers.conv3.then": ("activation", "batch_norm"),
            "optim.name": "sgd",
            "train.batch_size": 8,
            "train.label_smoothing": 0.1,
        },
    ),
    # Without batch normalisation, some of whose gradients are 0 but for rounding: AdamW would amplify that.
    "adamw": run_config(
        "cifar10",
        **{
            "model.order": ("conv1", "fc8"),
            "optim.name": "adamw",
            "optim.schedule": "cosine",
            "optim.learning_rate": 0.001,
            "train.batch_size": 8,
        },
    ),
}
SLOW = ("cifar_80sec", "batch_norm")


def first_steps(config: ConfigDict) -> dict[str, float]:
    """Return the loss of each step, and by how much all steps change each parameter of each tower (L2 norm)."""
    channels = 1 if config.data.name == "mnist5k" else 3
    size, count = config.data.image_size, config.train.batch_size
    # Only the sizes matter: the images are noise.
    source = Arrays(np.broadcast_to(np.uint8(0), (1000, size, size, channels)), np.zeros(1000, int))
    dataset = Dataset(source, None, source, [str(label) for label in range(10)], channels)
    setup = train.Setup(config, dataset, Executor("vmap", config.model.towers))
    train_step, stats = train.make_train_step(setup), random_statistics(config, channels)
    initial = train.init_state(setup)
    state, generator, total, numbers = setup.executor.place(initial), np.random.default_rng(0), 0.0, {}
    for step in range(1, STEPS + 1):
        images = generator.integers(0, 256, (count, size, size, channels)).astype(np.uint8)
        batch = {"image": images, "label": generator.integers(0, 10, count).astype(np.int32)}
        state = train_step(state, batch, stats, np.uint32(0), np.int32(step), optim.peak_learning_rate(config.optim))
        before, total = total, float(state.sums["loss"][0])
        numbers[f"loss of step {step}"] = (total - before) / count
    changes = jax.tree.map(lambda after, before: np.asarray(after) - before, state.params, initial.params)
    for path, change in jax.tree_util.tree_leaves_with_path(changes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for tower, values in enumerate(change):
            numbers[f"change of {name} in tower {tower}"] = float(np.linalg.norm(values))
    return numbers


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CONFIGS]
)
def test_first_steps_give_the_golden_numbers(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    assert first_steps(CONFIGS[name]) == pytest.approx(golden, rel=RELATIVE, abs=0), RENEW


if __name__ == "__main__":
    numbers = {name: first_steps(config) for name, config in CONFIGS.items()}
    GOLDEN.write_text(json.dumps(numbers, indent=2) + "\n")
