"""Executors: two towers on two devices are two towers on one device, and are the grouped network of one device."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from alexnet_jax import evaluate, model, optim, parallel, train
from alexnet_jax.parallel import DATA, TOWER, Executor, make_executor
from support import (
    TINY,
    assert_close,
    centre_crops,
    command,
    noise_batch,
    noise_setup,
    random_statistics,
    run_config,
    run_script,
)

# With the paper's initial values all feature maps are nearly constant: rounding decides which pixel wins a pooling.
FAN_IN = {"conv1": 363, "conv2": 1200, "conv3": 2304, "conv4": 1728, "conv5": 1728, "fc6": 9216, "fc7": 4096}
WELL_CONDITIONED = {
    "data.std": (70.0,),
    "model.lrn.alpha": 0.01,
    **{f"model.layers.{name}.bias": 0.0 for name in FAN_IN},
    **{f"model.layers.{name}.weight_std": (2 / fan_in) ** 0.5 for name, fan_in in FAN_IN.items()},
}
# Without regularisation: the velocity after one step is the gradient of the loss times the learning rate.
PLAIN = {
    "optim.weight_decay": 0.0,
    "model.dropout.rate": 0.0,
    "data.augment.random_crop": False,
    "data.augment.flip": False,
    "data.augment.colour.noise": 0.0,
}
ALL_AUGMENTATION = {"data.augment.flip": True, "data.augment.code2012.images_per_crop": 2}
POSITIVE_BIASES = {f"model.layers.{name}.bias": 0.1 for name in FAN_IN}  # units are active, so gradients are not 0
FEW_LAYERS = TINY | {"model.order": ("conv1", "conv2", "conv3", "fc6", "fc8")}
# A bias before a normalisation has rounding as its gradient, which the weight decay has to outweigh.
BATCH_NORM = {"model.layers.conv2.then": ("batch_norm", "activation", "max_pool"), "optim.weight_decay": 0.05}


def run_steps(executor: str, config: ConfigDict, steps: int) -> Iterator[train.State]:
    """Train on random batches, and yield the state after each step, on the host."""
    setup = noise_setup(config, executor)
    step, place = train.make_train_step(setup), setup.executor.place
    statistics = random_statistics(config, setup.dataset.channels)
    state = place(train.init_state(setup))
    for number in range(1, steps + 1):
        batch = noise_batch(config, config.train.batch_size, seed=number)
        state = step(
            state, batch, statistics, np.uint32(config.seed), np.int32(number), optim.peak_learning_rate(config.optim)
        )
        yield jax.device_get(state)


def velocity(state: train.State) -> Any:
    """Return the optimiser's velocity, as a tree of the parameters."""
    return optax.tree.get(state.opt_state, "trace")


def lower_step(setup: train.Setup) -> jax.stages.Lowered:
    """Lower the training step from the shapes of its arguments."""
    config, dataset = setup.config, setup.dataset
    variables = model.shapes(config.model, dataset.classes, (config.data.crop, config.data.crop, dataset.channels))
    state = jax.eval_shape(partial(train.new_state, config), variables)
    batch, statistics = noise_batch(config, config.train.batch_size), random_statistics(config, dataset.channels)
    step: Any = train.make_train_step(setup)
    return step.__wrapped__.lower(
        state, batch, statistics, np.uint32(0), np.int32(1), optim.peak_learning_rate(config.optim)
    )


def operations(operation: Any) -> Iterator[Any]:
    """Iterate over an operation of a StableHLO program and all operations within it, in program order."""
    yield operation
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from operations(inner.operation)


def sent_values(lowered: jax.stages.Lowered) -> dict[str, list[int]]:
    """Return, for each kind of collective in a program, the number of values that each call sends from a device."""
    kinds = ("all_gather", "all_reduce", "all_to_all", "collective_", "reduce_scatter", "send", "recv")
    sent: dict[str, list[int]] = {}
    program: Any = lowered.compiler_ir("stablehlo")
    for operation in operations(program.operation):
        name = operation.name.removeprefix("stablehlo.")
        if name.startswith(kinds):
            # An all_gather sends its operand; a reduce_scatter sends as much as it returns.
            sizes = [int(np.prod(value.type.shape)) for value in (operation.operands[0], operation.results[0])]
            sent.setdefault(name, []).append(min(sizes))
    return sent


def test_auto_uses_the_devices_that_there_are() -> None:
    assert len(jax.devices()) == 2
    assert make_executor("auto", towers=2, batch_size=4) == Executor("pmap", 2)
    assert Executor("pmap", 2).devices == jax.devices()
    assert make_executor("auto", towers=1, batch_size=4) == Executor("shard_map", 1, shards=2)
    assert make_executor("auto", towers=4, batch_size=4) == Executor("vmap", 4)
    assert Executor("vmap", 4).devices == jax.devices()[:1]


def test_batch_that_no_number_of_devices_divides_is_not_sharded() -> None:
    assert make_executor("auto", towers=1, batch_size=5) == Executor("vmap", 1)
    assert make_executor("shard_map", towers=1, batch_size=5) == Executor("shard_map", 1, shards=1)


def test_vmap_and_pmap_agree_in_loss_gradients_and_state_with_dropout_on() -> None:
    # Biases do not start at 0: the bound on parameters would be one on their first velocities.
    config = run_config(**POSITIVE_BIASES, **{"optim.learning_rate": 1e-3, "train.batch_size": 4})
    assert config.model.dropout.rate == 0.5
    pairs = zip(*(run_steps(executor, config, 3) for executor in ("vmap", "pmap")), strict=True)
    for number, (one_device, two_devices) in enumerate(pairs, 1):
        chex.assert_trees_all_equal_shapes(one_device, two_devices)
        np.testing.assert_allclose(one_device.sums["loss"], two_devices.sums["loss"], rtol=1e-5)
        # The first velocity is the gradient times the learning rate. Later the weights differ by rounding, and pooling
        # may choose the other one of two nearly equal pixels.
        tolerance = 1e-5 if number == 1 else 1e-3
        jax.tree.map(partial(assert_close, relative=tolerance), velocity(one_device), velocity(two_devices))
        jax.tree.map(partial(assert_close, relative=1e-5), one_device.params, two_devices.params)


@pytest.mark.slow
def test_towers_on_two_devices_are_the_grouped_network_of_one() -> None:
    """Logits, loss and every gradient of the paper's network at full size, against Keras with the same weights."""
    import keras_alexnet  # importing Keras takes seconds

    config = run_config("imagenet2012", **WELL_CONDITIONED, **PLAIN, **{"train.batch_size": 2})
    setup, batch = noise_setup(config, "pmap"), noise_batch(config, 2, seed=1)
    images = np.asarray(centre_crops(batch["image"], config))
    params, statistics = train.init_state(setup).params, random_statistics(config, setup.dataset.channels)
    network = keras_alexnet.build(config, images.shape[1:], setup.dataset.classes)
    keras_alexnet.set_weights(network, params)
    logits, loss, gradients = keras_alexnet.logits_loss_and_gradients(network, images, batch["label"])

    predict = evaluate.make_predictor(config, setup.dataset.classes, setup.executor)
    assert_close(predict({"params": setup.executor.place(params)}, statistics, batch["image"]), logits, 1e-5)

    (state,) = run_steps("pmap", config, 1)
    np.testing.assert_allclose(state.sums["loss"] / 2, [loss, loss], rtol=1e-5)
    ours = {
        name: [keras_alexnet.untower(leaves[part]) / -config.optim.learning_rate for part in ("kernel", "bias")]
        for name, leaves in velocity(state).items()
    }
    assert ours.keys() == gradients.keys()
    for name, of_layer in ours.items():
        for actual, expected in zip(of_layer, gradients[name], strict=True):
            assert_close(actual, expected, 1e-5)


@pytest.mark.slow
def test_two_data_shards_are_one_device() -> None:
    """With dropout, crops and flips on, and with a normalisation over the whole batch."""
    config = run_config(**FEW_LAYERS, **ALL_AUGMENTATION, **POSITIVE_BIASES, **BATCH_NORM, **{"model.towers": 1})
    assert config.model.dropout.rate == 0.5
    assert noise_setup(config, "auto").executor == Executor("shard_map", 1, shards=2)
    for number, (one_device, two_devices) in enumerate(
        zip(*(run_steps(executor, config, 3) for executor in ("vmap", "shard_map")), strict=True), 1
    ):
        np.testing.assert_array_equal(two_devices.sums["images"], [number * config.train.batch_size])
        np.testing.assert_allclose(one_device.sums["loss"], two_devices.sums["loss"], rtol=1e-5)
        tolerance = 1e-5 if number == 1 else 1e-3
        agree = partial(assert_close, relative=tolerance)
        jax.tree.map(agree, velocity(one_device), velocity(two_devices))
        jax.tree.map(agree, one_device.batch_stats, two_devices.batch_stats)


def test_batch_is_sharded_over_as_many_devices_as_divide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [SimpleNamespace(platform="cpu")] * 4
    monkeypatch.setattr(parallel.jax, "devices", lambda: devices)
    assert make_executor("auto", 2, batch_size=6) == Executor("shard_map", 2, shards=2)
    assert make_executor("auto", 1, batch_size=6) == Executor("shard_map", 1, shards=3)
    assert make_executor("auto", 2, batch_size=6, parts=2) == Executor("pmap", 2)
    assert make_executor("auto", 4, batch_size=6) == Executor("pmap", 4)
    assert make_executor("auto", 5, batch_size=6) == Executor("vmap", 5)


@pytest.mark.parametrize(
    "executor",
    [Executor("shard_map", 1, shards=2), Executor("shard_map", 2), Executor("vmap", 2), Executor("pmap", 2)],
    ids=lambda executor: f"{executor.name}-{executor.towers}-{executor.shards}",
)
def test_each_shard_sees_its_slice_of_data_axes(executor: Executor) -> None:
    def of_one_tower(tower: jax.Array, values: jax.Array, factor: jax.Array) -> tuple[jax.Array, ...]:
        count = len(values)
        positions = parallel.global_positions(count)
        return values * factor, positions, jnp.full(count, count), tower + 1, lax.psum(values.sum(), DATA)

    mapped: Any = executor.map(of_one_tower, in_axes=(TOWER, DATA, None), out_axes=(DATA, DATA, DATA, TOWER, None))
    arguments = (np.arange(executor.towers), np.array([5, 6, 7, 8]), np.int32(2))
    values, positions, count, towers, total = mapped(*arguments)
    np.testing.assert_array_equal(values, [10, 12, 14, 16])
    np.testing.assert_array_equal(positions, np.arange(4))
    np.testing.assert_array_equal(count, [4 // executor.shards] * 4)
    np.testing.assert_array_equal(towers, np.arange(executor.towers) + 1)
    assert total == 26
    if executor.name == "shard_map":
        shardings, _ = mapped.__wrapped__.lower(*arguments).compile().input_shardings
        assert [sharding.spec for sharding in shardings] == [PartitionSpec(TOWER), PartitionSpec(DATA), PartitionSpec()]


def test_random_numbers_of_an_example_depend_on_its_position_only() -> None:
    key = jax.random.key(0)

    def sample(positions: Any) -> jax.Array:
        return parallel.per_example(lambda key: jax.random.normal(key, (3,)), key, jnp.array(positions))

    whole = sample([0, 1, 2, 3])
    assert len(np.unique(whole)) == whole.size
    np.testing.assert_array_equal(sample([2, 3]), whole[2:])


@pytest.mark.slow
def test_towers_drop_different_units_and_the_same_ones_on_any_executor() -> None:
    """With one image, a bias has no gradient exactly where its unit was dropped."""
    changes = {"model.order": ("fc6", "fc8"), "model.layers.fc6.then": ("dropout",), "optim.weight_decay": 0.0}
    config = run_config(**changes, **{"train.batch_size": 1})
    masks: list[list[np.ndarray]] = []
    for executor in ("vmap", "pmap"):
        biases = [velocity(state)["fc6"]["bias"] for state in run_steps(executor, config, 2)]
        masks.append([biases[0] != 0, biases[1] != np.float32(config.optim.momentum) * biases[0]])
    (first, second), of_pmap = masks
    np.testing.assert_array_equal([first, second], of_pmap)
    assert first.shape == (2, 128)
    for one, other in ((first[0], first[1]), (first, second)):  # between towers, between steps
        assert 0.35 < one.mean() < 0.65
        assert 0.35 < (one != other).mean() < 0.65


def test_only_the_crossings_and_the_logits_communicate() -> None:
    """The paper's network sends what figure 2 says, forward and, in reverse order, as much backward."""
    batch_size = 2
    sent_per_image = [13 * 13 * 128, 6 * 6 * 128, 2048, 2048, 500]
    assert sent_per_image == [21_632, 4_608, 2_048, 2_048, 500]
    config = run_config("imagenet2012", **{"train.batch_size": batch_size})
    forward = [values * batch_size for values in sent_per_image]
    communicated = {"all_gather": forward, "reduce_scatter": forward[::-1]}
    assert sent_values(lower_step(noise_setup(config, "pmap"))) == communicated

    # Data shards add one sum of each gradient (kernel and bias of eight layers) and each of the four metrics.
    sharded = noise_setup(config, "shard_map")
    sums = sent_values(lower_step(sharded)).pop("all_reduce")
    assert len(sums) == 2 * 8 + 4
    assert sum(sums) == 60_965_224 // 2 + 4


def test_too_few_devices_raises_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"each of 4 towers, and there are 2 CPU device") as error:
        make_executor("pmap", towers=4, batch_size=4)
    assert str(error.value).startswith("train.executor=pmap: must have")
    assert "--config.train.executor=vmap" in str(error.value)
    assert "JAX_NUM_CPU_DEVICES=4" in str(error.value)


@pytest.mark.slow
def test_pmap_on_one_device_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = command(
        "alexnet_jax.main",
        "--config=configs/ablation_lrn.py",
        "--config.train.executor=pmap",
        f"--workdir={tmp_path}",
        environment={"JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == 1
    assert "there are 1 CPU device(s)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"{TIMEOUT}=3600"),
        ("--xla_dump_to=there", f"--xla_dump_to=there {TIMEOUT}=3600"),
        (f"{TIMEOUT}=5 --xla_dump_to=there", f"{TIMEOUT}=5 --xla_dump_to=there"),
    ],
)
def test_xla_flags_of_the_user_are_kept(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", before)
    parallel.ensure_host_devices(2)
    assert os.environ["XLA_FLAGS"] == after


HOST_DEVICES = """
from alexnet_jax import parallel
parallel.ensure_host_devices(3)
import jax
print(len(jax.devices()))
"""


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
        ({"JAX_NUM_CPU_DEVICES": "1"}, 1),
    ],
    ids=["default", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"],
)
def test_cpu_is_a_device_per_tower_unless_the_environment_decides(environment: dict[str, str], devices: int) -> None:
    """XLA accepts the flags, too: it ends the process at one that it does not know."""
    done = run_script(HOST_DEVICES, **environment)
    assert done.stdout == f"{devices}\n", done.stderr


INITIALIZE = """
import jax
from alexnet_jax import parallel
parallel.initialize(2)
print(jax.config.jax_compilation_cache_dir)
"""


def test_cache_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for environment in ({"HOME": str(tmp_path / "file")}, {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file")}):
        done = run_script(INITIALIZE, **environment)
        assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
        assert re.fullmatch(r"compiled programs are not kept \(.*file.*\): set JAX_COMPILATION_.*\n", done.stderr)
    done = run_script(INITIALIZE, HOME=str(tmp_path))
    assert (done.stdout, done.stderr) == (f"{tmp_path}/.cache/alexnet_jax\n", "")


def test_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(parallel, "_config", SimpleNamespace(jax_compilation_cache_dir=None))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert parallel._cache_folder() is None
    assert "compiled programs are not kept (Could not determine home" in capsys.readouterr().err


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_platform_that_is_not_here_names_the_variable(platform: str, tmp_path: Path) -> None:
    done = run_script(INITIALIZE, HOME=str(tmp_path), JAX_PLATFORMS=platform)
    assert f"ValueError: JAX_PLATFORMS={platform}: must name platforms that JAX has here; unset it or" in done.stderr


SOAK = """
import os, pathlib
from alexnet_jax import parallel
parallel.ensure_host_devices(2)
import jax
import numpy as np
from alexnet_jax import optim, train
from alexnet_jax.data.loader import train_batches
from support import TINY, random_statistics, run_config
config = run_config(**TINY)
setup = train.open_run(config)
assert setup.executor.name == "pmap"
step, statistics = train.make_train_step(setup), random_statistics(config, 1)
state = setup.executor.place(train.init_state(setup))
for number, batch in enumerate(train_batches(setup.dataset.train, config, seed=0, start=0, stop=200), 1):
    state = step(state, batch, statistics, np.uint32(0), np.int32(number), optim.peak_learning_rate(config.optim))
    if number == 1:
        jax.block_until_ready(state)
        pathlib.Path(os.environ["COMPILED"]).touch()
print("steps", int(state.sums["images"][0]) // config.train.batch_size)
"""


BUSY = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.1)
while True:
    pass
"""


@pytest.mark.slow
def test_200_steps_on_a_busy_machine_never_stop(tmp_path: Path) -> None:
    """It is busy once the step is compiled."""
    compiled = str(tmp_path / "compiled")
    busy = [subprocess.Popen([sys.executable, "-c", BUSY, compiled]) for _ in range(2)]
    try:
        done = run_script(SOAK, COMPILED=compiled)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "steps 200\n"
