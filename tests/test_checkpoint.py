"""Checkpoints are restored bit for bit, or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from alexnet_jax import model
from alexnet_jax.checkpoint import Checkpoints, TrainedNetwork, load_run, save_run
from alexnet_jax.data.statistics import uniform
from alexnet_jax.parallel import TOWER, Executor
from alexnet_jax.run_dir import RunDir
from alexnet_jax.train import new_state
from support import TINY, random_statistics, run_config, run_script


def state(seed: int = 0) -> dict[str, Any]:
    return {"params": {"conv1": jax.random.normal(jax.random.key(seed), (2, 300, 50))}, "step": jnp.ones(2, int)}


def save(folder: Path, steps: tuple[int, ...] = (5,)) -> None:
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"step": step, "loss": 0.1 + 0.2})


@pytest.mark.parametrize("name", ["vmap", "pmap"])
def test_restore_is_bit_identical_on_any_devices(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    target = Executor(name, 2).place(jax.tree.map(jnp.zeros_like, state()))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(target)
    assert restored is not None
    chex.assert_trees_all_equal(jax.device_get(restored[0]), jax.device_get(state(5)))
    assert restored[0]["step"].sharding == target["step"].sharding
    assert restored[1] == {"step": 5, "loss": 0.1 + 0.2}


def test_restore_needs_no_shapes(tmp_path: Path) -> None:
    save(tmp_path)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore()
    assert restored is not None
    chex.assert_trees_all_equal(jax.device_get(restored[0]), jax.device_get(state(5)))


def test_state_may_be_donated_as_soon_as_it_is_saved(tmp_path: Path) -> None:
    executor = Executor("pmap", 2)
    overwrite = executor.map(
        lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), in_axes=(TOWER,), out_axes=TOWER, donate_argnums=(0,)
    )
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            placed = executor.place(state(step))
            checkpoints.save(step, placed, {})
            overwrite(placed)
            assert placed["params"]["conv1"].is_deleted()
        restored = checkpoints.restore(state())
    assert restored is not None
    chex.assert_trees_all_equal(jax.device_get(restored[0]), jax.device_get(state(2)))


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    save(tmp_path, (1, 2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_restore_without_checkpoints_returns_none(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(state()) is None


def test_step_that_was_saved_before_raises(tmp_path: Path) -> None:
    """Orbax declines to save, and returns False."""
    save(tmp_path)
    with pytest.raises(RuntimeError, match=f"the checkpoint of step 4 was not saved in {tmp_path}"):
        save(tmp_path, (4,))


def change_a_byte(folder: Path) -> None:
    """Change a byte in the middle of the largest file: the arrays."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def truncate(folder: Path) -> None:
    """Truncate the largest file."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def leave_unchanged(folder: Path) -> None:
    """Do no harm."""


def another_network() -> dict[str, Any]:
    return state() | {"params": {"conv1": jnp.zeros((2, 300, 49))}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "target"), [(change_a_byte, state), (truncate, state), (leave_unchanged, another_network)]
)
def test_checkpoint_that_is_damaged_or_of_another_network_is_refused(
    tmp_path: Path, harm: Callable[[Path], None], target: Callable[[], dict[str, Any]]
) -> None:
    """In a process of its own: Orbax drops its other reads, of which Python warns at any later time."""
    save(tmp_path, (4, 5))
    harm(tmp_path / "5")
    done = run_script(f"""
from pathlib import Path
import test_checkpoint
with test_checkpoint.Checkpoints(Path({str(tmp_path)!r}), keep=2) as checkpoints:
    try:
        checkpoints.restore(test_checkpoint.{target.__name__}())
    except ValueError as error:
        print(error)
""")
    assert "the checkpoint of step 5 " in done.stdout, done.stderr
    assert f"delete {tmp_path / '5'} to resume from the checkpoint before it" in done.stdout


@pytest.fixture
def network() -> TrainedNetwork:
    """Return an untrained network with batch normalisation, whose averages and statistics are like measured ones."""
    then = ("batch_norm", "activation", "max_pool")
    config = run_config(**TINY | {"data.subtract": "mean_image", "model.layers.conv1.then": then})
    variables = model.init(config.model, 10, (23, 23, 1), seed=3)
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.25, variables["batch_stats"])
    return TrainedNetwork(config, 10, variables, random_statistics(config, 1))


def test_saved_run_is_loaded_bit_identical(tmp_path: Path, network: TrainedNetwork) -> None:
    run = RunDir(tmp_path / "run")
    save_run(run, network, new_state(network.config, network.variables), {"step": 0})
    loaded = load_run(run.path)
    assert loaded.config == network.config
    assert (loaded.classes, loaded.channels) == (10, 1)
    chex.assert_trees_all_equal(loaded.variables, network.variables)
    chex.assert_trees_all_equal(loaded.known_statistics(), network.statistics)
    with pytest.raises(ValueError, match="run: must be a new folder, and exists; name another one, or delete it"):
        save_run(run, network, {}, {})


def test_statistics_that_were_not_measured_are_those_of_the_config(network: TrainedNetwork) -> None:
    with pytest.raises(ValueError, match=r"data.subtract=mean_image: must be 'mean' for weights from elsewhere"):
        network._replace(statistics=None).known_statistics()
    config = run_config(**TINY)  # subtracts data.mean
    known = network._replace(statistics=None, config=config).known_statistics()
    chex.assert_trees_all_equal(known, uniform(config.data, channels=1))


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path, network: TrainedNetwork) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"run: must be a run's folder, with config.json, dataset.json and checkpoints"
    ):
        load_run(run.path)
    save_run(run, network, new_state(network.config, network.variables), {})
    for folder in run.checkpoints.iterdir():
        folder.rename(tmp_path / folder.name)
    with pytest.raises(ValueError, match="run: has no checkpoint yet; train the run first"):
        load_run(run.path)
