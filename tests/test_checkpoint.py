"""What was saved comes back bit for bit, or not at all."""

from collections.abc import Callable
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import run_script

from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.towers import Executor


def state(seed: int = 0) -> dict:
    return {"params": {"conv1": jax.random.normal(jax.random.key(seed), (2, 300, 50))}, "step": jnp.ones(2, int)}


def saved(folder: Path, steps: tuple[int, ...] = (5,)) -> Path:
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"step": step, "loss": 0.1 + 0.2})
    return folder


@pytest.mark.parametrize("executor", ["vmap", "pmap"])
def test_a_checkpoint_comes_back_bit_for_bit_onto_any_devices(tmp_path: Path, executor: str) -> None:
    saved(tmp_path)
    target = Executor(executor, 2).place(jax.tree.map(jnp.zeros_like, state()))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored, progress = checkpoints.restore(target)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state(5)))
    assert restored["step"].sharding == target["step"].sharding
    assert progress == {"step": 5, "loss": 0.1 + 0.2}


def test_a_state_may_be_donated_as_soon_as_it_is_saved(tmp_path: Path) -> None:
    executor = Executor("pmap", 2)
    overwrite = executor.map(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), in_axes=0, out_axes=0,
                             donate_argnums=(0,))  # fmt: skip
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            placed = executor.place(state(step))
            checkpoints.save(step, placed, {})
            overwrite(placed)
        restored, _ = checkpoints.restore(state())
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state(2)))


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, (1, 2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_there_may_be_nothing_yet(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(state()) is None


def damage(folder: Path) -> None:
    """Changes a byte in the middle of the largest file: the arrays."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def cut(folder: Path) -> None:
    """Cuts the largest file short."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def leave(folder: Path) -> None:
    """Does no harm."""


def another_net() -> dict:
    return state() | {"params": {"conv1": jnp.zeros((2, 300, 49))}}


@pytest.mark.parametrize(("harm", "target"), [(damage, state), (cut, state), (leave, another_net)])
def test_a_checkpoint_that_is_damaged_or_of_another_net_is_refused_with_the_way_out(
    tmp_path: Path, harm: Callable, target: Callable
) -> None:
    """In a process of its own: Orbax drops its other reads, and Python warns of that whenever it notices."""
    saved(tmp_path, (4, 5))
    harm(tmp_path / "5")
    done = run_script(f"""
from collections.abc import Callable
from pathlib import Path
import test_checkpoint
with test_checkpoint.Checkpoints(Path({str(tmp_path)!r}), keep=2) as checkpoints:
    try:
        checkpoints.restore(test_checkpoint.{target.__name__}())
    except ValueError as error:
        print(error)
""")
    assert "the checkpoint of step 5 " in done.stdout
    assert f"delete {tmp_path / '5'} to go on from the checkpoint before it" in done.stdout
