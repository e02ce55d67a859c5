"""The executors: how the function of one tower becomes the net of all towers. Only this file names devices.

A per-tower function sees its own parameters without the tower axis, its neighbours through collectives over ``TOWER``,
and the devices that train the same tower on other images through collectives over ``DATA``. Three executors run it:

- ``vmap``: all towers on one device.
- ``pmap``: one tower on each device, as the paper had one on each of two GPUs.
- ``shard_map``: each tower on several devices, which share the batch. So a net of one tower has two devices to do, too.
"""

import contextlib
import ctypes
import functools
import math
import os
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOWER, DATA = "tower", "data"
EXECUTORS = ("auto", "vmap", "pmap", "shard_map")

# XLA for CPUs runs several operations of a device at a time. Where each device has a tower of its own, one after the
# other takes less memory and no more time; where devices share a batch, more time (``experiments/speed``).
_CPU_COMPILER_OPTIONS = {"pmap": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}


def ensure_host_devices(towers: int) -> None:
    """Makes a CPU look like a device for each tower, and two if there is one. Call it before using JAX.

    Does nothing where JAX was already used, or where the environment has already said how many devices a CPU is.
    """
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if said or jax.config.jax_num_cpu_devices > 0:  # type: ignore[attr-defined]
        return
    with contextlib.suppress(RuntimeError):  # JAX is in use: `Executor` tells whoever then lacks a device
        jax.config.update("jax_num_cpu_devices", max(towers, 2))


class Executor:
    """Runs per-tower functions over ``TOWER`` and ``DATA``.

    Attributes:
      name: "vmap", "pmap" or "shard_map".
      sharding: where an array with a leading tower axis lives.
    """

    def __init__(self, name: str, towers: int):
        """
        Args:
          name: "vmap", "pmap", "shard_map", or "auto": the last of them that has devices enough, and uses several.

        Raises:
          ValueError: pmap or shard_map is asked for and there are fewer devices than towers.
        """
        devices = jax.local_devices()
        shares = len(devices) // towers
        if name == "auto":
            name = "shard_map" if shares > 1 else "pmap" if 1 < towers <= len(devices) else "vmap"
        if name != "vmap" and not shares:
            kind = devices[0].platform.upper()
            raise ValueError(
                f"train.executor={name} puts each of {towers} towers on a device of its own, and found {len(devices)} "
                f"{kind} device(s). Use --config.train.executor=vmap to run all towers on one device, "
                f"or, to make a CPU {towers} devices, set JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={towers} "
                "in the environment (in a notebook: before JAX is first used)."
            )
        self.name = name
        self.towers = towers
        mesh_shape = {"vmap": (1, 1), "pmap": (1, towers), "shard_map": (shares, towers)}[name]
        self.devices = devices[: math.prod(mesh_shape)]
        self._mesh = Mesh(np.array(self.devices).reshape(mesh_shape), (DATA, TOWER))
        # As pmap itself says it: it would compile a second time for its own results.
        placed = Mesh(np.array(self.devices), (TOWER,)) if name == "pmap" else self._mesh
        self.sharding = NamedSharding(placed, PartitionSpec(TOWER))
        # Host devices share one thread pool. A step dispatched while another is in flight can take the threads on
        # which the first one's other tower would answer: both wait for ever, and XLA aborts the process.
        self._waits = len(self.devices) > 1 and devices[0].platform == "cpu"
        if self._waits:
            _explain_abort()

    def map(self, function: Callable, *, in_axes: Any, out_axes: Any, donate_argnums: tuple[int, ...] = ()) -> Callable:
        """The compiled function of all towers; axes as for ``jax.vmap``: 0 is the tower axis, None is shared.

        An output with axis None must be the same on every tower, and all outputs on all devices that share the
        batch. Where calls wait for their result, the function that does not is ``__wrapped__``.
        It is the outermost: JAX refuses to trace one with compiler options, as CPUs' pmap has, within another ``jit``.
        """
        if self.name == "shard_map":
            over_devices = self._over_mesh(function, in_axes, out_axes)
        else:
            undivided = jax.vmap(function, axis_name=DATA, axis_size=1, in_axes=None, out_axes=None)
            over_towers: dict[str, Any] = {"axis_name": TOWER, "in_axes": in_axes, "out_axes": out_axes}
            if self.name == "pmap":
                over_devices = jax.pmap(undivided, **over_towers, devices=self.devices)
            else:
                over_devices = jax.vmap(undivided, **over_towers, axis_size=self.towers)
        options = _CPU_COMPILER_OPTIONS.get(self.name) if self.devices[0].platform == "cpu" else None
        mapped = jax.jit(over_devices, donate_argnums=donate_argnums, compiler_options=options)
        if not self._waits:
            return mapped

        @functools.wraps(mapped)
        def call(*args: Any) -> Any:
            return jax.block_until_ready(mapped(*args))

        return call

    def _over_mesh(self, function: Callable, in_axes: Any, out_axes: Any) -> Callable:
        """The function of one tower and one share of the batch on each device of the mesh."""
        specs = {0: PartitionSpec(TOWER), None: PartitionSpec()}

        def on_device(*arguments: Any) -> Any:
            axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(arguments)
            own = [
                jax.tree.map(lambda leaf: leaf[0], argument) if axis == 0 else argument
                for argument, axis in zip(arguments, axes, strict=True)
            ]
            result = function(*own)
            return jax.tree.map(lambda leaf: leaf[None], result) if out_axes == 0 else result

        return jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=jax.tree.map(specs.get, in_axes, is_leaf=lambda axis: axis is None),
            out_specs=specs[out_axes],
            check_vma=False,  # gradients are those of pmap
        )

    def place(self, tree: Any) -> Any:
        """Puts arrays with a leading tower axis where ``map`` wants them, so that they can be donated."""
        return jax.device_put(tree, self.sharding)


def own_rows(rows: jax.Array) -> jax.Array:
    """A device's share of the rows of a batch, of which a per-tower function is given all.

    Where shares are not equal, the last ones end in rows of zeros.
    """
    shares = lax.axis_size(DATA)
    if shares == 1:
        return rows
    size = -(-len(rows) // shares)
    padded = jnp.pad(rows, [(0, shares * size - len(rows)), *[(0, 0)] * (rows.ndim - 1)])
    return lax.dynamic_slice_in_dim(padded, lax.axis_index(DATA) * size, size)


def row_numbers(count: int) -> jax.Array:
    """The positions in the batch of the ``count`` rows of this device's share."""
    first = 0 if lax.axis_size(DATA) == 1 else lax.axis_index(DATA) * count
    return first + jnp.arange(count)


def drawn(draw: Callable[[jax.Array], jax.Array], key: jax.Array, positions: jax.Array) -> jax.Array:
    """What is drawn for each row: a function of the key and its position in the batch, wherever that is divided.

    Args:
      draw: from a key of its own to what one row has.
      positions: int (rows,), as of ``row_numbers``.
    """
    return jax.vmap(lambda position: draw(jax.random.fold_in(key, position)))(positions)


def all_rows(rows: jax.Array, count: int) -> jax.Array:
    """All ``count`` rows of a batch, from the devices that share it."""
    return lax.all_gather(rows, DATA, tiled=True)[:count]


_ABORTED = b"""
The towers lost each other: one waited too long for the other's half of a layer, and XLA stopped the program.
A CPU that stands in for two devices can be too busy for that. Nothing that was checkpointed is lost: the same
command again goes on from there. With --config.train.executor=vmap both towers run on one device and never wait.
"""


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _write_aborted(signum: int) -> None:
    os.write(2, _ABORTED)


@functools.cache
def _explain_abort() -> None:
    """Has the process say a word before XLA's abort ends it: C's handler runs where Python's own would not."""
    ctypes.CDLL(None).signal(signal.SIGABRT, _write_aborted)
