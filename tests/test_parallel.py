"""Two towers on two devices are two towers on one device, are the grouped net; and they never wait for ever."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import chex
import jax
import keras_alexnet
import numpy as np
import pytest
from conftest import any_pixels, centre_crops, command, run_config, run_script
from ml_collections import ConfigDict

from alexnet_jax import model, train
from alexnet_jax.data import DataSet
from alexnet_jax.towers import Executor, all_rows, own_rows, row_numbers

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SCALES = ["embedded", pytest.param("imagenet2012", marks=pytest.mark.slow)]


# With the paper's own initialisation all maps are nearly constant, and rounding decides which pixel wins a pooling.
FAN_IN = {"conv1": 363, "conv2": 1200, "conv3": 2304, "conv4": 1728, "conv5": 1728, "fc6": 9216, "fc7": 4096}
WELL_CONDITIONED = {
    "data.std": (70.0,),
    "model.lrn.alpha": 0.01,
    **{f"model.layers.{name}.bias": 0.0 for name in FAN_IN},
    **{f"model.layers.{name}.weight_std": (2 / fan_in) ** 0.5 for name, fan_in in FAN_IN.items()},
}
PLAIN = {
    "optim.weight_decay": 0.0,
    "model.dropout.rate": 0.0,
    "data.augment.random_crop": False,
    "data.augment.flip": False,
    "data.augment.colour.noise": 0.0,
}


def noise_dataset(scale: str) -> DataSet:
    """A stand-in for a data set where only sizes matter."""
    classes, channels = (1000, 3) if scale == "imagenet2012" else (10, 1)
    return DataSet([None] * 1000, None, [], range(classes), channels)


def noise_batch(config: ConfigDict, dataset: DataSet, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    size = config.data.image_size
    return {
        "image": generator.integers(0, 256, (count, size, size, dataset.channels)).astype(np.uint8),
        "label": generator.integers(0, dataset.classes, count).astype(np.int32),
    }


def run_steps(executor: str, config: ConfigDict, scale: str, steps: int, batch_size: int) -> Iterator[train.State]:
    """The state after each step, on the host."""
    dataset = noise_dataset(scale)
    towers = Executor(executor, config.model.towers)
    step = train.train_step(config, dataset, any_pixels(config, dataset.channels), towers)
    state = towers.place(train.init_state(config, dataset))
    for number in range(1, steps + 1):
        batch = noise_batch(config, dataset, batch_size, seed=number)
        state = step(state, batch, np.uint32(config.seed), np.int32(number), np.int32(0))
        yield jax.device_get(state)


def velocity(state: train.State) -> dict:
    return state.opt_state.trace


def assert_close(actual, expected, relative: float) -> None:
    """Arrays agree up to a share of the largest value in each."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


def test_the_tests_run_on_two_devices() -> None:
    assert len(jax.devices()) == 2
    assert Executor("auto", towers=2).name == "pmap"
    assert Executor("pmap", towers=2).devices == jax.devices()


@pytest.mark.parametrize("scale", SCALES)
def test_vmap_and_pmap_agree_in_loss_gradients_and_state_with_dropout_on(scale: str) -> None:
    full_size = scale == "imagenet2012"
    # Biases do not start at 0: the bound on parameters would be one on their first velocities.
    conditioned = WELL_CONDITIONED | {f"model.layers.{name}.bias": 0.1 for name in FAN_IN}
    config = run_config(scale, **conditioned if full_size else {}, **{"optim.learning_rate": 1e-3})
    assert config.model.dropout.rate == 0.5
    steps, batch_size = (2, 2) if full_size else (3, 4)
    pairs = zip(*(run_steps(executor, config, scale, steps, batch_size) for executor in ("vmap", "pmap")), strict=True)
    for number, (one_device, two_devices) in enumerate(pairs, 1):
        chex.assert_trees_all_equal_shapes(one_device, two_devices)
        np.testing.assert_allclose(one_device.sums["loss"], two_devices.sums["loss"], rtol=1e-5)
        # The first velocity is the gradient, times the rate. Later the weights differ by a rounding, and in large maps
        # a pooling may take the other one of two pixels that are nearly equal.
        tolerance = 1e-5 if number == 1 else 1e-2 if full_size else 1e-3
        agree = partial(assert_close, relative=tolerance)
        jax.tree.map(agree, velocity(one_device), velocity(two_devices))
        jax.tree.map(partial(assert_close, relative=1e-5), one_device.params, two_devices.params)


@pytest.mark.parametrize("executor", ["vmap", "pmap"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_towers_are_the_grouped_net_of_one_device(scale: str, executor: str) -> None:
    """Logits, loss and every gradient, against Keras with the same weights."""
    config = run_config(scale, **WELL_CONDITIONED, **PLAIN)
    dataset = noise_dataset(scale)
    params = train.init_state(config, dataset).params
    batch = noise_batch(config, dataset, 2, seed=1)
    images = centre_crops(batch["image"], config)

    net = keras_alexnet.build(config, images.shape[1:], dataset.classes)
    keras_alexnet.set_weights(net, params)
    logits, loss, gradients = keras_alexnet.logits_loss_and_gradients(net, images, batch["label"])

    towers = Executor(executor, 2)
    apply = model.AlexNet(config.model, dataset.classes).apply
    forward = towers.map(lambda p, x: apply({"params": p}, x, train=False), in_axes=(0, None), out_axes=None)
    assert_close(forward(towers.place(params), images), logits, 1e-5)

    (state,) = run_steps(executor, config, scale, 1, 2)
    np.testing.assert_allclose(state.sums["loss"] / 2, [loss, loss], rtol=1e-5)
    ours = {
        name: [keras_alexnet.untower(leaves[part]) / -config.optim.learning_rate for part in ("kernel", "bias")]
        for name, leaves in velocity(state).items()
    }
    jax.tree.map(lambda one, other: assert_close(one, other, 1e-5), ours, gradients)


NOISY_ONE_TOWER = {
    "model.towers": 1,
    "data.augment.flip": True,
    "data.augment.chunk": 2,
    **{f"model.layers.{name}.bias": 0.1 for name in FAN_IN},
}


@pytest.mark.parametrize("batch_size", [4, 5])
def test_two_devices_that_share_the_batch_train_the_net_of_one_device(batch_size: int) -> None:
    """With dropout, crops and flips on, and when the batch cannot be halved."""
    config = run_config(**NOISY_ONE_TOWER)
    assert Executor("auto", towers=1).name == "shard_map"
    assert config.model.dropout.rate == 0.5
    pairs = zip(
        *(run_steps(executor, config, "embedded", 3, batch_size) for executor in ("vmap", "shard_map")), strict=True
    )
    for number, (one_device, two_devices) in enumerate(pairs, 1):
        np.testing.assert_array_equal(two_devices.sums["images"], [number * batch_size])
        np.testing.assert_allclose(one_device.sums["loss"], two_devices.sums["loss"], rtol=1e-5)
        tolerance = 1e-5 if number == 1 else 1e-3
        jax.tree.map(partial(assert_close, relative=tolerance), velocity(one_device), velocity(two_devices))


FOUR_DEVICES = """
import jax
from alexnet_jax import towers
from conftest import TINY, run_config
from test_towers import run_steps, velocity, assert_close
jax.config.update("jax_num_cpu_devices", 4)
config = run_config(**TINY)
(one,), (four,) = (list(run_steps(name, config, "embedded", 1, 6)) for name in ("vmap", "auto"))
executor = towers.Executor("auto", 2)
print(executor.name, len(executor.devices))
jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), velocity(one), velocity(four))
"""


def test_two_towers_on_four_devices_share_the_batch() -> None:
    done = run_script(FOUR_DEVICES)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "shard_map 4\n"


@pytest.mark.parametrize("count", [3, 4])
def test_shares_are_all_rows_of_a_batch_once(count: int) -> None:
    executor = Executor("shard_map", 1)
    rows = np.arange(1, count + 1)

    def shares(params: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = own_rows(rows)
        return all_rows(own * 2, len(rows)), all_rows(row_numbers(len(own)), len(rows))

    doubled, numbers = executor.map(shares, in_axes=(0, None), out_axes=None)(np.zeros(1), rows)
    np.testing.assert_array_equal(doubled, 2 * rows)
    np.testing.assert_array_equal(numbers, np.arange(count))


def test_towers_drop_different_units_and_the_same_ones_on_any_executor() -> None:
    """With one image, a bias has no gradient just where its unit was dropped."""
    changes = {"model.order": ("fc6", "fc8"), "model.layers.fc6.then": ("dropout",), "optim.weight_decay": 0.0}
    config = run_config(**changes)
    masks = []
    for executor in ("vmap", "pmap"):
        states = list(run_steps(executor, config, "embedded", 2, batch_size=1))
        biases = [velocity(state)["fc6"]["bias"] for state in states]
        masks.append([biases[0] != 0, biases[1] != np.float32(config.optim.momentum) * biases[0]])
    np.testing.assert_array_equal(*masks)
    (first, second), _ = masks
    assert first.shape == (2, 128)
    for one, other in ((first[0], first[1]), (first, second)):  # between towers, between steps
        assert 0.35 < one.mean() < 0.65
        assert 0.35 < (one != other).mean() < 0.65


def test_only_the_crossings_and_the_logits_exchange_anything() -> None:
    """Paper.md's table, read off the compiled step: forward gathers, and backward scatters of the same size."""
    batch_size = 2
    config, dataset = run_config("imagenet2012"), noise_dataset("imagenet2012")
    towers = Executor("pmap", 2)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=towers.sharding),
        jax.eval_shape(partial(train.start, config), model.shapes(config.model, dataset.classes, (224, 224, 3))),
    )
    step = train.train_step(config, dataset, any_pixels(config), towers).__wrapped__
    batch = noise_batch(config, dataset, batch_size)
    program = step.lower(state, batch, np.uint32(0), np.int32(1), np.int32(0)).compile().as_text()

    collective = r"= f32\[([\d,]+)\]\S* (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)[\w-]*\("
    found: dict[str, list[int]] = {}
    for shape, kind in re.findall(collective, program):
        found.setdefault(kind, []).append(int(np.prod([int(side) for side in shape.split(",")])) // batch_size)
    mine_per_image = [13 * 13 * 128, 6 * 6 * 128, 2048, 2048, 500]
    assert mine_per_image[:4] == [21_632, 4_608, 2_048, 2_048]
    assert found == {
        "all-gather": [2 * mine for mine in mine_per_image],
        "reduce-scatter": mine_per_image[::-1],
    }
    others = set(re.findall(r"[\w-]*(?:all|reduce|collective|permute|send|recv)[\w-]*\(", program))
    allowed = {"all-gather(", "reduce-scatter(", "reduce(", "reduce-window(", "call(", "custom-call("}
    assert not {name for name in others if not name.startswith("wrapped")} - allowed


def test_more_towers_than_devices_is_answered_with_what_to_do() -> None:
    assert Executor("auto", towers=4).name == "vmap"
    with pytest.raises(ValueError, match=r"each of 4 towers .* found 2 CPU device") as error:
        Executor("pmap", towers=4)
    assert "--config.train.executor=vmap" in str(error.value)
    assert "JAX_NUM_CPU_DEVICES=4" in str(error.value)


def test_forced_pmap_on_one_device_is_refused_before_anything_runs(tmp_path) -> None:
    done = command(
        "alexnet_jax.main",
        "--config=configs/ablation_lrn.py",
        "--config.train.executor=pmap",
        f"--workdir={tmp_path}",
        environment={"JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == 1
    assert "found 1 CPU device(s)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


SOAK = """
from alexnet_jax import towers
towers.ensure_host_devices(2)
import numpy as np
from conftest import TINY, any_pixels, run_config
from alexnet_jax import batches, train
config = run_config(**TINY)
dataset, executor = train.prepare(config)
assert executor.name == "pmap"
step = train.train_step(config, dataset, any_pixels(config, 1), executor)
state = executor.place(train.init_state(config, dataset))
for number, batch in enumerate(batches.train_batches(dataset.train, config, seed=0, start=0, stop=400), 1):
    state = step(state, batch, np.uint32(0), np.int32(number), np.int32(0))
print("steps", int(state.sums["images"][0]) // config.train.batch_size)
"""


@pytest.mark.slow
def test_four_hundred_steps_on_a_busy_machine_never_stop() -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        done = run_script(SOAK)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "steps 400\n"


LOST = """
from alexnet_jax import towers
towers.ensure_host_devices(2)
import jax, jax.numpy as jnp
from jax import lax

def meet_late(x):
    count = x.astype(int)
    x = lax.fori_loop(0, count, lambda i, y: lax.fori_loop(0, count, lambda j, z: z + 1e-9, y), x)
    return lax.psum(x, towers.TOWER)

executor = towers.Executor("pmap", 2)
executor.map(meet_late, in_axes=(0,), out_axes=None)(jnp.array([0.0, 1e7]))
"""


def test_towers_that_lose_each_other_do_not_end_without_a_word() -> None:
    timeout = "--xla_cpu_collective_call_{}_timeout_seconds={}"
    done = run_script(LOST, XLA_FLAGS=f"{timeout.format('warn_stuck', 3)} {timeout.format('terminate', 6)}")
    assert done.returncode == -6, done.stderr
    assert "The towers lost each other" in done.stderr
    assert "--config.train.executor=vmap" in done.stderr
