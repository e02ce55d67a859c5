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
from support import network_config, random_statistics, reduced, run_config

from alexnet_jax import train
from alexnet_jax.data.datasets import Arrays, Dataset
from alexnet_jax.parallel import Executor

GOLDEN = Path(__file__).with_suffix(".json").with_name("golden.json")
STEPS = 3  # the first has no momentum; in the third, two learning rates and two velocities have been in use
# Sums in another order change the last digits, which three steps do not amplify much: ten times the largest
# difference between JAX 0.10 and 0.12 and between executors.
RELATIVE = 1e-4

THEN = {
    "model.layers.conv1.then": ("batch_norm", "activation", "max_pool"),
    "model.layers.conv2.then": ("batch_norm", "activation", "max_pool"),
}
CONFIGS = {
    "embedded": run_config("embedded", **{"data.subtract": "mean_image"}),
    "cifar_80sec": network_config("cifar_80sec", **{"train.batch_size": 8}),
    "paper": reduced("paper", **{"train.batch_size": 8}),
    "modern": run_config("cifar10", **THEN | {"optim.name": "adamw", "train.batch_size": 8}),
}


def first_steps(config: ConfigDict, executor: str = "vmap") -> dict[str, list[float]]:
    """Return the loss of each step, and the norm of the change of each parameter after the last one."""
    channels = 1 if config.data.name == "mnist5k" else 3
    size, count = config.data.image_size, config.train.batch_size
    source = Arrays(np.broadcast_to(np.uint8(0), (count, size, size, channels)), np.zeros(count, int))
    dataset = Dataset(source, None, source, [str(label) for label in range(10)], channels)
    setup = train.Setup(config, dataset, Executor(executor, config.model.towers))
    train_step, stats = train.make_train_step(setup), random_statistics(config, channels)
    initial = train.init_state(setup)
    state, generator, losses = setup.executor.place(initial), np.random.default_rng(0), []
    for step in range(1, STEPS + 1):
        images = generator.integers(0, 256, (count, size, size, channels)).astype(np.uint8)
        batch = {"image": images, "label": generator.integers(0, 10, count).astype(np.int32)}
        state = train_step(state, batch, stats, np.uint32(0), np.int32(step), np.int32(0))
        losses.append(float(state.sums["loss"][0]) / count)
    numbers = {"losses": np.diff(losses, prepend=0.0).tolist()}  # `sums` adds up
    changes = jax.tree.map(lambda after, before: np.asarray(after) - before, state.params, initial.params)
    for path, change in jax.tree_util.tree_leaves_with_path(changes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        numbers[name] = [float(np.linalg.norm(tower)) for tower in change]
    return numbers
