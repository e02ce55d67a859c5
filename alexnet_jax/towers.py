"""The executors: how the function of one tower becomes the net of all towers. Only this file names devices.

A per-tower function sees its own parameters without the tower axis, and its neighbours through collectives over
``AXIS``. Two executors run the same function:

- ``vmap``: all towers on one device.
- ``pmap``: one tower on each device, as the paper had one on each of two GPUs.
"""

import contextlib
import ctypes
import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

AXIS = "tower"
EXECUTORS = ("auto", "vmap", "pmap")


def ensure_host_devices(count: int) -> None:
    """Makes a CPU look like ``count`` devices, so that it can hold one tower each. Call it before using JAX.

    Does nothing where JAX was already used, or where the environment has already said how many devices a CPU is.
    """
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if said or jax.config.jax_num_cpu_devices > 0:  # type: ignore[attr-defined]
        return
    with contextlib.suppress(RuntimeError):  # JAX is in use: `Executor` tells whoever then lacks a device
        jax.config.update("jax_num_cpu_devices", count)


class Executor:
    """Runs per-tower functions over ``AXIS``.

    Attributes:
      name: "vmap" or "pmap".
      sharding: where an array with a leading tower axis lives.
    """

    def __init__(self, name: str, towers: int):
        """
        Args:
          name: "vmap", "pmap", or "auto": pmap where there are as many devices as towers, else vmap.

        Raises:
          ValueError: pmap is asked for and there are fewer devices than towers.
        """
        devices = jax.local_devices()
        if name == "auto":
            name = "pmap" if 1 < towers <= len(devices) else "vmap"
        if name == "pmap" and len(devices) < towers:
            kind = devices[0].platform.upper()
            raise ValueError(
                f"train.executor=pmap puts each of {towers} towers on a device of its own, and found {len(devices)} "
                f"{kind} device(s). Use --config.train.executor=vmap to run all towers on one device, "
                f"or, to make a CPU {towers} devices, set JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={towers} "
                "in the environment (in a notebook: before JAX is first used)."
            )
        self.name = name
        self.towers = towers
        self.devices = devices[:towers] if name == "pmap" else devices[:1]
        self.sharding: jax.sharding.Sharding = SingleDeviceSharding(devices[0])
        if name == "pmap":
            self.sharding = NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec(AXIS))
        # Host devices share one thread pool. A step dispatched while another is in flight can take the threads on
        # which the first one's other tower would answer: both wait for ever, and XLA aborts the process.
        self._waits = name == "pmap" and devices[0].platform == "cpu"
        if self._waits:
            _explain_abort()

    def map(self, function: Callable, *, in_axes: Any, out_axes: Any, donate_argnums: tuple[int, ...] = ()) -> Callable:
        """The compiled function of all towers; axes as for ``jax.vmap``: 0 is the tower axis, None is shared.

        An output with axis None must be the same on every tower. Where calls wait for their
        result, the function that does not is ``__wrapped__``.
        """
        if self.name == "pmap":
            mapped = jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=in_axes,
                out_axes=out_axes,
                donate_argnums=donate_argnums,
                devices=self.devices,
            )
        else:
            over_towers = jax.vmap(function, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, axis_size=self.towers)
            mapped = jax.jit(over_towers, donate_argnums=donate_argnums)
        if not self._waits:
            return mapped

        @functools.wraps(mapped)
        def call(*args: Any) -> Any:
            return jax.block_until_ready(mapped(*args))

        return call

    def place(self, tree: Any) -> Any:
        """Puts arrays with a leading tower axis where ``map`` wants them, so that they can be donated."""
        return jax.device_put(tree, self.sharding)


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
