"""The layout of "One weird trick": of the same value as the paper's, with other collectives."""

import functools
import os
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from alexnet_jax import evaluate, model, train
from alexnet_jax.config import LAYOUTS, validate
from alexnet_jax.parallel import DATA, TOWER, Executor
from alexnet_jax.tools import summary
from support import (
    TINY,
    assert_close,
    network_config,
    noise_batch,
    noise_setup,
    random_statistics,
    reduced,
    run_config,
    run_script,
)
from test_parallel import ALL_AUGMENTATION, lower_step, run_steps, sent_values, velocity

PLAIN: dict[str, Any] = {
    **TINY,
    **ALL_AUGMENTATION,
    **{
        f"model.layers.{name}.{field}": value
        for name in ("conv1", "conv3", "fc6", "fc8")
        for field, value in (("weight_std", 0.2), ("bias", 0.1))
    },
    "model.order": ("conv1", "conv3", "fc6", "fc8"),
    "optim.learning_rate": 1e-3,
    "train.batch_size": 8,
}
# Whatever depends on the towers or on the position in the batch, in both parts of the network.
EVERYTHING: dict[str, Any] = {
    **PLAIN,
    "model.batch_norm.epsilon": 0.1,  # a unit of little variance would amplify rounding
    "model.lrn.sees": "all",
    "model.layers.conv1.then": ("activation", "batch_norm", "lrn", "max_pool"),
    "model.layers.conv3.then": ("activation", "max_pool", "dropout"),
    "model.layers.fc6.then": ("activation", "batch_norm", "dropout"),
    "model.layers.fc6.sees": "own",
}
NETWORKS = {"plain": PLAIN, "everything": EVERYTHING}


def weird(network: str) -> ConfigDict:
    """Return the config of a small network in the layout of "One weird trick"."""
    return run_config(**NETWORKS[network], **{"train.layout": "one_weird_trick"})


@functools.cache
def reference(network: str) -> list[train.State]:
    """Return the states after each of three steps of the paper's layout on one device."""
    return list(run_steps("vmap", run_config(**NETWORKS[network]), 3))


def assert_equals_reference(executor: str, network: str) -> None:
    """Assert that three steps on the devices there are, with dropout on, agree in loss, gradients and state."""
    for number, (expected, actual) in enumerate(
        zip(reference(network), run_steps(executor, weird(network), 3), strict=True)
    ):
        np.testing.assert_allclose(actual.sums["loss"], expected.sums["loss"], rtol=1e-5)
        np.testing.assert_array_equal(actual.sums["images"], expected.sums["images"])
        # The first velocity is the gradient times the learning rate. Later the weights differ by rounding.
        tolerance = 1e-3 if number else 1e-5
        jax.tree.map(partial(assert_close, relative=tolerance), velocity(actual), velocity(expected))
        agree = partial(assert_close, relative=1e-5)
        jax.tree.map(agree, (actual.params, actual.batch_stats), (expected.params, expected.batch_stats))


@pytest.mark.slow
@pytest.mark.parametrize(("executor", "network"), [("pmap", "everything"), ("shard_map", "plain")])
def test_three_steps_equal_those_of_the_papers_layout(executor: str, network: str) -> None:
    assert_equals_reference(executor, network)


FOUR_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from alexnet_jax import train
from support import noise_setup
from test_one_weird_trick import assert_equals_reference, weird
assert len(noise_setup(weird("everything")).executor.devices) == 4
assert_equals_reference("shard_map", "everything")
for batch_size in (8, 6):
    config = weird("plain")
    config.train.batch_size = batch_size
    print(train.open_run(config).executor.shards)
"""


@pytest.mark.slow
def test_two_towers_on_four_devices_equal_the_papers_layout_on_one() -> None:
    """Each shard of the batch is a multiple of the number of towers."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
    done = run_script(FOUR_DEVICES, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n1\n"


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["pmap", "shard_map"])
def test_logits_in_evaluation_equal_those_of_the_papers_layout(executor: str) -> None:
    """The number of images need not be a multiple of the towers."""
    logits = []
    state = reference("everything")[-1]
    for config, name in ((run_config(**EVERYTHING), "vmap"), (weird("everything"), executor)):
        setup = noise_setup(config, name)
        predict = evaluate.make_predictor(config, setup.dataset.classes, setup.executor)
        images = noise_batch(config, 5)["image"]
        logits.append(predict(setup.executor.place(state.variables), random_statistics(config, 1), images))
    assert_close(logits[1], logits[0], 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_papers_network_sends_what_the_summary_says(layout: str) -> None:
    batch_size = 2
    dense = 2048 + 2048 + 500  # what a tower sends of an image before fc7, before fc8 and of the logits
    shared_parameters = 2_334_080 // 2  # of a tower's convolutions
    activations = {"towers": 21_632 + 4_608 + dense, "one_weird_trick": 9_216 // 2 + dense}[layout]
    parameters = {"towers": 0, "one_weird_trick": shared_parameters}[layout]
    config = run_config("imagenet2012", **{"train.batch_size": batch_size, "train.layout": layout})
    sent = summary.bytes_sent(config.model, 1000, (224, 224, 3), batch_size, layout)
    assert sent == (2 * 4 * batch_size * activations, 2 * 4 * parameters)

    collectives = sent_values(lower_step(noise_setup(config, "pmap")))
    assert collectives.keys() == {"all_gather", "reduce_scatter"}
    for values in collectives.values():
        assert 4 * sum(values) == sum(sent) / 2


def test_networks_of_one_tower_or_of_dense_layers_only_have_one_layout() -> None:
    def program(layout: str, **changes: Any) -> str:
        config = run_config(**PLAIN | changes).model
        network, towers = model.AlexNet(config, 10), config.towers
        variables = jax.tree.map(lambda leaf: leaf[0], model.init(config, 10, (23, 23, 1), seed=0))
        images = np.zeros((4, 23, 23, 1), np.float32)
        function = partial(model.forward, network, layout)
        return str(jax.make_jaxpr(function, axis_env=[(TOWER, towers), (DATA, 1)])(variables, images))

    for changes in ({"model.towers": 1}, {"model.order": ("fc6", "fc8")}):
        assert program("towers", **changes) == program("one_weird_trick", **changes)
    assert program("towers") != program("one_weird_trick")


def test_shard_that_the_towers_cannot_divide_is_refused() -> None:
    config = weird("plain")
    config.train.batch_size = 5
    with pytest.raises(ValueError, match=r"train.batch_size=5: must be a multiple of model.towers=2 with train.layout"):
        validate(config)
    with pytest.raises(
        ValueError, match=r"a multiple of model.towers=2 images in each shard, not 5; change train.batch_size"
    ):
        next(run_steps("vmap", config, 1))


@pytest.mark.slow
def test_network_of_2014_on_two_devices_is_its_one_tower() -> None:
    """The changes are those of the docstring of configs/networks/one_weird_trick.py."""
    changes = {
        "model.towers": 2,
        "model.lrn.sees": "all",
        **{f"model.layers.conv{number}.sees": "all" for number in (2, 3, 4, 5)},
    }
    one, two = network_config("one_weird_trick"), network_config("one_weird_trick", **changes)
    parameters = [model.count_parameters(model.shapes(config.model, 1000, (224, 224, 3))) for config in (one, two)]
    assert parameters == [61_100_840, 61_100_840]

    one, two = reduced("one_weird_trick"), reduced("one_weird_trick", **changes)
    two.train.layout = "one_weird_trick"
    variables = model.init(one.model, 10, (99, 99, 3), seed=0)
    split = jax.tree.map(lambda leaf: np.stack(np.split(leaf[0], 2, axis=-1)), variables)
    images = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3)).astype(np.uint8)
    logits = []
    for config, values, executor in ((one, variables, Executor("vmap", 1)), (two, split, Executor("pmap", 2))):
        predict = evaluate.make_predictor(config, 10, executor)
        logits.append(predict(executor.place(values), random_statistics(config), images))
    assert_close(logits[1], logits[0], 1e-5)
