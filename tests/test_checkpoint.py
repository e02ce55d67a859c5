"""Checkpoints are restored bit for bit, or not at all."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from alexnet_jax import checkpoint, model
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


def largest(folder: Path) -> Path:
    """Return the largest file: the arrays."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def change_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_progress(folder: Path) -> None:
    """Change a number, so that the run would end early or late."""
    file = folder / "progress" / "metadata"
    text = file.read_text()
    assert '"step": 5' in text
    file.write_text(text.replace('"step": 5', '"step": 9'))


def move(folder: Path) -> None:
    """Give the checkpoint to another step."""
    folder.rename(folder.with_name("9"))


@pytest.mark.parametrize(("harm", "step"), [(change_progress, 5), (move, 9)])
def test_progress_and_step_are_verified(tmp_path: Path, harm: Callable[[Path], None], step: int) -> None:
    save(tmp_path, (4, 5))
    harm(tmp_path / "5")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(state())
        assert restored is not None
        assert restored[1]["step"] == 4
        assert checkpoints.damaged == [
            f"{tmp_path / str(step)}: is damaged, first in progress: set aside as damaged_{step}; resumes from step 4"
        ]
        checkpoints.save(step, state(step), {"step": step})
        checkpoints.save(step + 1, state(step + 1), {"step": step + 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([str(step), str(step + 1), f"damaged_{step}"])


HARMS = """
import shutil
from pathlib import Path
import chex, jax
from test_checkpoint import Checkpoints, change_a_byte, largest, save, state
harms = {{
    "change": change_a_byte,
    "truncate": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "delete": Path.unlink,
    "empty": lambda file: [shutil.rmtree(file.parent), file.parent.mkdir()],
}}
for name, harm in harms.items():
    folder = Path({folder!r}, name)
    save(folder, (4, 5))
    harm(largest(folder / "5"))
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore(state())
    chex.assert_trees_all_equal(jax.device_get(restored[0]), jax.device_get(state(4)))
    assert sorted(path.name for path in folder.iterdir()) == ["4", "damaged_5"]
    assert f"{{folder / '5'}}: is damaged" in checkpoints.damaged[0]
print("done")
"""


@pytest.mark.slow
def test_damaged_arrays_are_set_aside_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    """In a process of its own: Orbax drops its other reads, of which Python warns at any later time."""
    done = run_script(HARMS.format(folder=str(tmp_path)))
    assert done.stdout == "done\n", done.stderr


def test_damaged_checkpoints_stay_in_place_if_none_is_left_or_they_are_only_read(tmp_path: Path) -> None:
    save(tmp_path)
    change_progress(tmp_path / "5")
    for _ in range(2):
        with (
            Checkpoints(tmp_path, keep=2) as checkpoints,
            pytest.raises(
                ValueError, match=f"5: is damaged, first in progress: delete {tmp_path} to train from the sta"
            ),
        ):
            checkpoints.restore(state())
    save(tmp_path, (6, 7))
    (tmp_path / "6").rename(tmp_path / "8")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"8: is damaged, first in progress; delete the run's result.json and re-run"),
    ):
        checkpoints.restore()
    assert {path.name for path in tmp_path.iterdir()} == {"7", "8"}


@pytest.mark.parametrize(("key", "shape"), [("conv1", (2, 300, 49)), ("conv2", (2, 300, 50))])
def test_checkpoint_of_another_network_is_refused_and_stays(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    save(tmp_path, (4, 5))
    with (
        Checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(
            ValueError, match=r"5: must be a checkpoint of this network, and has .* for params/conv. instead of"
        ),
    ):
        checkpoints.restore(state() | {"params": {key: jnp.zeros(shape)}})
    assert {path.name for path in tmp_path.iterdir()} == {"4", "5"}


@pytest.mark.parametrize(
    ("of_orbax", "of_file"),
    [(MemoryError(), None), (Exception("tensorstore"), OSError(errno.EIO, "Input/output error"))],
)
def test_lack_of_memory_and_failing_disks_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_orbax: Exception, of_file: Exception | None
) -> None:
    save(tmp_path, (4, 5))

    def fail(error: Exception) -> Callable[..., None]:
        def raise_error(*_: Any, **__: Any) -> None:
            raise error

        return raise_error

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail(of_orbax))
        if of_file:
            monkeypatch.setattr(Path, "read_bytes", fail(of_file))
        with pytest.raises(type(of_file or of_orbax)):
            checkpoints.restore(state())
    assert {path.name for path in tmp_path.iterdir()} == {"4", "5"}


def test_unfinished_folders_of_killed_saves_are_removed_unless_the_run_is_only_read(tmp_path: Path) -> None:
    save(tmp_path)
    unfinished = tmp_path / "6.orbax-checkpoint-tmp"
    (unfinished / "state").mkdir(parents=True)
    with Checkpoints(tmp_path):
        assert unfinished.exists()
    with Checkpoints(tmp_path, keep=2):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_checkpoint_of_version_0_2_0_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_checksums_without_arrays", lambda *_: {})
        save(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore()
    assert restored is not None
    assert restored[1]["step"] == 5


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
    with pytest.raises(ValueError, match="run: must have a checkpoint; train the run first"):
        load_run(run.path)
