"""Executors: how the function of one tower becomes the network of all towers. The only file that names devices.

A per-tower function sees its own parameters without the tower axis, the other towers through collectives over `TOWER`,
and the other shards of the batch through collectives over `DATA`. Three executors run it:

- `vmap`: all towers on one device.
- `pmap`: one tower on each device, as the paper had one on each of two GPUs.
- `shard_map`: model parallel and data parallel on a mesh: each tower on several devices, which shard the batch. The
  devices may belong to several processes of one job (`processes.py`), each of which has some rows of the batch.
"""

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax import processes

TOWER, DATA = "tower", "data"

# Compiler options of CPUs, by executor. XLA runs several operations of a device at a time: with a tower on each device
# running them in turn takes less memory and no more time; where devices shard a batch, more time (experiments/speed).
CPU_COMPILER_OPTIONS = {"pmap": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}
# Of GPUs: XLA may not choose algorithms whose results differ from run to run, so that resumed runs are bit-identical.
GPU_COMPILER_OPTIONS = {"xla_gpu_exclude_nondeterministic_ops": True}

_config: Any = jax.config  # not all versions of its types name every option
_TIMEOUT_FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds"

Axes = tuple[str | None, ...]  # `TOWER`, `DATA` or None, for each argument
OutAxes = str | None | Axes


def initialize(towers: int) -> None:
    """Prepare JAX for a command: CPU devices for the towers, and the persistent compilation cache.

    The cache is in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another; where it cannot be written,
    there is none. On GPUs it keeps XLA's choice of algorithms, too, on which the last bits of a result depend.

    Raises:
      ValueError: JAX_PLATFORMS names a platform that is not here.
    """
    ensure_host_devices(towers)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        _config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs, too: a run has a dozen
    _config.update("jax_compilation_cache_dir", _cache_folder())
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where the plugin of a known platform is missing
        platforms = os.environ.get("JAX_PLATFORMS")
        if not platforms:
            raise
        raise ValueError(
            f"JAX_PLATFORMS={platforms}: must name platforms that JAX has here; unset it or set JAX_PLATFORMS=cpu, or "
            "install JAX for the platform, as with pip install 'jax[cuda13]'"
        ) from error


def _cache_folder() -> str | None:
    """Return the folder of the compilation cache, or None, with a line on standard error, if it cannot be written."""
    folder = _config.jax_compilation_cache_dir
    if "://" in (folder or ""):
        return folder
    try:
        path = Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet_jax")
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (RuntimeError, OSError) as error:  # RuntimeError: no home
        remedy = "set JAX_COMPILATION_CACHE_DIR to keep them"
        print(f"compiled programs are not kept ({error}): {remedy}", file=sys.stderr)
        return None
    return str(path)


def ensure_host_devices(towers: int) -> None:
    """Make a CPU appear as a device per tower, at least two; call it before JAX is used.

    Do nothing where JAX is in use already or the environment sets the number of CPU devices.
    """
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if _TIMEOUT_FLAG not in xla_flags:
        # XLA aborts the process when one tower waits too long for the other, as on an overloaded CPU.
        os.environ["XLA_FLAGS"] = f"{xla_flags} {_TIMEOUT_FLAG}=3600".strip()
    if "xla_force_host_platform_device_count" in xla_flags or _config.jax_num_cpu_devices > 0:
        return
    with contextlib.suppress(RuntimeError):  # JAX is in use: `make_executor` reports missing devices
        _config.update("jax_num_cpu_devices", max(towers, 2))


@functools.cache
def instruction_set() -> str:
    """Return the widest vector instructions of the CPU: "amx", "avx512", "avx2", or "unknown" (not an x86 Linux)."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.exists() else []
    names = {"amx_tile": "amx", "avx512f": "avx512", "avx2": "avx2"}
    return next((name for flag, name in names.items() if flag in flags), "unknown")


@dataclass(frozen=True)
class Executor:
    """A way to run per-tower functions over the axes `TOWER` and `DATA`; equal executors run equal programs."""

    name: str  # "vmap", "pmap" or "shard_map"
    towers: int  # size of the tower axis
    shards: int = 1  # size of the data axis; 1 unless the name is "shard_map"

    @functools.cached_property
    def devices(self) -> list[jax.Device]:
        """The devices in use, of all processes: one, one per tower, or one per tower and shard."""
        count = 1 if self.name == "vmap" else self.shards * self.towers
        # In the order of processes: those of a pair of towers belong to one process, if it has a multiple of them.
        return jax.devices()[:count]

    @property
    def platform(self) -> str:
        """The kind of the devices: "cpu", "gpu" or "tpu"."""
        return self.devices[0].platform

    @functools.cached_property
    def _mesh(self) -> Mesh:
        if self.name == "pmap":  # the mesh that pmap itself names: it would compile again for results of another one
            return Mesh(np.array(self.devices), (TOWER,))
        return Mesh(np.array(self.devices).reshape(self.shards, -1), (DATA, TOWER))

    @property
    def sharding(self) -> NamedSharding:
        """The sharding of arrays with a leading tower axis."""
        return NamedSharding(self._mesh, PartitionSpec(TOWER))

    @property
    def copies(self) -> int:
        """The number of copies of a replicated array in this process."""
        return sum(device.process_index == jax.process_index() for device in self.devices)

    def place(self, tree: Any) -> Any:
        """Put arrays with a leading tower axis where `map` expects them, so that they can be donated.

        All processes give the same arrays.
        """
        return processes.put(tree, self.sharding)

    def replicate(self, tree: Any) -> Any:
        """Put arrays on every device, for arguments of `map` with axis None that do not change."""
        return processes.put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def local_rows(self, count: int) -> np.ndarray:
        """Return which of `count` rows, a multiple of `shards`, this process holds: all, if it is no part of a job."""
        if processes.count() == 1:
            return np.arange(count)
        slices = self._rows.addressable_devices_indices_map((count,)).values()
        return np.unique(np.concatenate([np.arange(count)[index] for index in slices]))

    def gather_rows(self, local: np.ndarray) -> np.ndarray:
        """Return the whole of an array of which each process has its `local_rows`; all processes call it together."""
        return processes.fetch(self._from_local_rows(local))

    @property
    def _rows(self) -> NamedSharding:
        """The sharding of the rows of a batch."""
        return NamedSharding(self._mesh, PartitionSpec(DATA))

    def _from_local_rows(self, rows: Any) -> Any:
        if processes.count() == 1 or isinstance(rows, jax.Array):
            return rows
        return jax.make_array_from_process_local_data(self._rows, rows)

    def map(
        self, function: Callable, *, in_axes: Axes, out_axes: OutAxes, donate_argnums: tuple[int, ...] = ()
    ) -> Callable:
        """Return the compiled function of all towers and shards.

        On several CPU devices it waits for its result; without the wait it is `__wrapped__`. JAX refuses to trace it
        inside another `jit` where it has compiler options (pmap on CPUs).

        Args:
          function: what one tower computes of one shard of the batch.
          in_axes: leading axis of each argument: `TOWER`, which the function does not see; `DATA`, which is sharded
            (its length must be a multiple of `shards`, and each process gives its `local_rows`); or None, the same
            everywhere.
          out_axes: the same of the result, or of each element of a tuple. With `DATA` or None it must be equal on all
            towers; with `TOWER` or None on all shards.
          donate_argnums: arguments whose memory the result may reuse.
        """
        by_platform: dict[str, Any] = {"cpu": CPU_COMPILER_OPTIONS.get(self.name), "gpu": GPU_COMPILER_OPTIONS}
        options: dict[str, Any] = {"compiler_options": by_platform.get(self.platform)}
        if self.name == "shard_map":
            mapped, options["in_shardings"] = self._over_mesh(function, in_axes, out_axes)
        else:
            one_shard = jax.vmap(function, axis_name=DATA, axis_size=1, in_axes=None, out_axes=None)
            tower_axes = {TOWER: 0, DATA: None, None: None}
            ins, outs = (_for_each(tower_axes.get, axes) for axes in (in_axes, out_axes))
            if self.name == "pmap":
                mapped = jax.pmap(one_shard, TOWER, in_axes=ins, out_axes=outs, devices=self.devices)
            else:
                mapped = jax.vmap(one_shard, ins, outs, axis_name=TOWER, axis_size=self.towers)
        compiled = jax.jit(mapped, donate_argnums=donate_argnums, **options)
        if len(self.devices) == 1 or (self.platform != "cpu" and processes.count() == 1):
            return compiled

        @functools.wraps(compiled)
        def call(*arguments: Any) -> Any:
            if processes.count() > 1:
                axes = zip(in_axes, arguments, strict=True)
                arguments = tuple(jax.tree.map(self._from_local_rows, a) if axis == DATA else a for axis, a in axes)
            result = compiled(*arguments)
            # CPU devices share one thread pool. A step dispatched while another is in flight can take the threads on
            # which the other tower of the first one would answer: both would wait for ever.
            return jax.block_until_ready(result) if self.platform == "cpu" else result

        return call

    def _over_mesh(
        self, function: Callable, in_axes: Axes, out_axes: OutAxes
    ) -> tuple[Callable, tuple[NamedSharding, ...]]:
        """Return the function over the mesh of shards and towers, and the shardings of its arguments."""
        specs = {axis: PartitionSpec(axis) if axis else PartitionSpec() for axis in (TOWER, DATA, None)}
        in_specs, out_specs = (_for_each(specs.get, axes) for axes in (in_axes, out_axes))

        def squeeze(axis: str | None, argument: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[0], argument) if axis == TOWER else argument

        def expand(axis: str | None, result: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[None], result) if axis == TOWER else result

        def on_device(*arguments: Any) -> Any:
            result = function(*_for_each(squeeze, in_axes, arguments))
            return _for_each(expand, out_axes, result)

        # Without check_vma, gradients follow pmap's rule.
        mapped = jax.shard_map(on_device, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped, tuple(NamedSharding(self._mesh, spec) for spec in in_specs)


def _for_each(function: Callable, axes: OutAxes, *values: Any) -> Any:
    """Apply a function to an axis and values, or to each of a tuple of axes and the elements of the values."""
    return tuple(map(function, axes, *values)) if isinstance(axes, tuple) else function(axes, *values)


def make_executor(name: str, towers: int, batch_size: int, parts: int = 1) -> Executor:
    """Choose the executor of a run.

    Args:
      name: "vmap", "pmap", "shard_map", or "auto": the last of them that has enough devices and uses several.
      batch_size: the batch is sharded over as many devices as divide it; in a job of several processes over all.
      parts: into which each shard must divide: the towers, if they share its images (one_weird_trick), else 1.

    Raises:
      ValueError: pmap or shard_map has fewer devices than towers, or a job of several processes cannot use all of its
        devices with shard_map.
    """
    devices = jax.devices()
    if processes.count() > 1:
        return _make_job_executor(name, towers, batch_size, parts)
    per_tower = len(devices) // towers
    shards = max((count for count in range(1, per_tower + 1) if batch_size % (count * parts) == 0), default=0)
    if name == "auto":
        name = "shard_map" if shards > 1 else "pmap" if 1 < towers <= len(devices) else "vmap"
    if name != "vmap" and not shards:
        kind = devices[0].platform.upper()
        raise ValueError(
            f"train.executor={name}: must have a device for each of {towers} towers, and there are {len(devices)} "
            f"{kind} device(s); use --config.train.executor=vmap to run all towers on one device, or, to make a CPU "
            f"{towers} devices, set JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={towers} in the environment (in a notebook: "
            "before JAX is first used)"
        )
    return Executor(name, towers, shards if name == "shard_map" else 1)


def _make_job_executor(name: str, towers: int, batch_size: int, parts: int) -> Executor:
    """Choose the executor of a run of several processes: shard_map over all devices of all processes."""
    if name not in ("auto", "shard_map"):
        raise ValueError(
            f"train.executor={name}: must be shard_map for a job of {processes.count()} processes, as {name} would "
            "train each by itself; use --config.train.executor=shard_map, or start one process"
        )
    devices = len(jax.devices())
    if devices % towers:
        raise ValueError(
            f"model.towers={towers}: must divide the {devices} devices of the job's {processes.count()} processes; "
            "start another number of processes"
        )
    shards = devices // towers
    divisor = shards * parts
    if batch_size % divisor:
        raise ValueError(
            f"train.batch_size={batch_size}: must be a multiple of {divisor}, for {devices} devices and {towers} "
            f"tower(s); use --config.train.batch_size={-(-batch_size // divisor) * divisor}, or fewer processes"
        )
    return Executor("shard_map", towers, shards)


def global_positions(count: int, axes: tuple[str, ...] = (DATA,)) -> jax.Array:
    """Return the positions in the whole batch, sharded over `axes`, of the `count` examples of this shard."""
    sharded = tuple(axis for axis in axes if lax.axis_size(axis) > 1)  # vmap maps the index of the others, too
    first = lax.axis_index(sharded) * count if sharded else 0
    return first + jnp.arange(count)


def per_example(draw: Callable[[jax.Array], jax.Array], key: jax.Array, positions: jax.Array) -> jax.Array:
    """Sample for each example with a key of its position in the whole batch, so that sharding changes nothing."""
    return jax.vmap(lambda position: draw(jax.random.fold_in(key, position)))(positions)
