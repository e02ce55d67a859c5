"""Several processes of one job, on one machine or many, each with devices of its own: JAX's distributed runtime.

All processes train the same run at the same time. Process 0 alone decides what to train, and writes records and
reports; the others follow it. A job that loses a process ends: JAX terminates the other processes (exit status 134)
within about `HEARTBEAT_SECONDS`, and the next start resumes.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from alexnet_jax.stop import Stopped

HEARTBEAT_SECONDS = 10  # without a sign of life, after which a process counts as lost
BARRIER_SECONDS = 2 * 60 * 60  # of the longest work that process 0 does alone: to measure a dataset
POLL_MILLISECONDS = 60_000
CLUSTERS = ("auto", "slurm", "ompi", "mpi4py", "k8s", "gcetpu", "gketpu")  # of `jax.distributed.initialize`

_job: Any = distributed.global_state  # JAX's key-value store and barriers have no public name; Orbax uses these, too
_numbers = itertools.count()  # of orders and barriers, the same on all processes
_asked = 0  # how often the processes have asked whether to stop, the same on all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that several processes run together."""
    group = parser.add_argument_group("several processes of one job (the same command on each)")
    group.add_argument("--cluster", choices=CLUSTERS, help="take the three flags below from this kind of cluster")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, which it listens on")
    group.add_argument("--num_processes", type=int, help="number of processes in the job")
    group.add_argument("--process_id", type=int, help="number of this process, counted from 0")
    group.add_argument("--start_timeout", type=int, default=300, help="seconds to wait for the others; default: 300")


def initialize(arguments: argparse.Namespace) -> None:
    """Join the job that the flags name, if they name one; call it before JAX is used.

    A process that waits longer than `--start_timeout` for the others is terminated by JAX (exit status 134).

    Raises:
      ValueError: flags are missing or do not fit, or no such cluster is found.
    """
    flags = {name: getattr(arguments, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if arguments.cluster is None and len(missing) == len(flags):
        return
    if arguments.cluster is not None and len(missing) < len(flags):
        raise ValueError(f"--cluster={arguments.cluster}: must come without {', '.join(map('--{}'.format, flags))}")
    if arguments.cluster is None:
        _check(**flags, missing=missing)
    where = arguments.coordinator or f"the coordinator that {arguments.cluster} names"
    print(f"joins the job of {where}; waits up to {arguments.start_timeout} s for its processes", file=sys.stderr)
    try:
        jax.distributed.initialize(
            arguments.coordinator,
            arguments.num_processes,
            arguments.process_id,
            cluster_detection_method={None: "deactivate", "auto": None}.get(arguments.cluster, arguments.cluster),
            initialization_timeout=arguments.start_timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,  # of a process that leaves before the others do
        )
    except Exception as error:  # each kind of cluster has its own
        remedy = "start it as the cluster starts jobs, or give --coordinator, --num_processes and --process_id"
        raise ValueError(
            f"--cluster={arguments.cluster}: must be where this process runs ({error!r}); {remedy}"
        ) from error


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None, missing: list[str]) -> None:
    """Check the flags of a job that no cluster describes; raise ValueError."""
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(f"{', '.join(missing)}: must be given, too; or give --cluster alone")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator={coordinator}: must be HOST:PORT; give all processes the same")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id}: must be from 0 to {num_processes - 1}, as --num_processes={num_processes}; "
            "give each process another one"
        )


def count() -> int:
    """Return the number of processes in the job; 1 without a job."""
    return _job.num_processes if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Return whether this is process 0, which alone decides and writes."""
    return count() == 1 or _job.process_id == 0


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Let process 0 run a block before the others do, so that they find its files.

    The others wait at most `BARRIER_SECONDS`.
    """
    if is_first():
        yield
    barrier(name)
    if not is_first():
        yield


def barrier(name: str) -> None:
    """Wait until all processes are here, at most `BARRIER_SECONDS`."""
    if count() > 1:
        _job.client.wait_at_barrier(f"alexnet_jax/{name}/{next(_numbers)}", BARRIER_SECONDS * 1000)


def merge(values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of all processes together in process 0, and unchanged elsewhere; all must call it together."""
    if count() == 1:
        return values
    client, key = _job.client, f"alexnet_jax/merge/{next(_numbers)}/"
    client.key_value_set(f"{key}{_job.process_id}", json.dumps(values))
    if not is_first():
        return values
    parts = [client.blocking_key_value_get(f"{key}{number}", BARRIER_SECONDS * 1000) for number in range(count())]
    client.key_value_delete(key)
    return {name: value for part in parts for name, value in json.loads(part).items()}


def put(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Put arrays on devices, of all processes, which give the same arrays."""
    if count() == 1:
        return jax.device_put(tree, sharding)

    def put_leaf(leaf: Any) -> jax.Array:  # `device_put` would send it to the other processes, to compare it
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put_leaf, tree)


def fetch(tree: Any) -> Any:
    """Return a tree of arrays whole, as NumPy arrays; all processes must call it together."""

    def gather(leaf: Any) -> Any:
        is_local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
        return leaf if is_local else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(gather, tree))


def local_shards(array: Any) -> list[tuple[int, np.ndarray]]:
    """Return what this process has of an array, in pieces along its first axis, each with its first position."""
    if not isinstance(array, jax.Array):
        return [(0, np.asarray(array))]
    pieces = {shard.index[0].start or 0: shard for shard in array.addressable_shards}  # replicas are equal
    return [(start, np.asarray(shard.data)) for start, shard in sorted(pieces.items())]


def any_process(flag: bool) -> bool:
    """Return whether the flag is set in any process; all must call it together."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if count() > 1 else flag


def stop_is_agreed() -> bool:
    """Return whether a process was asked to stop by SIGTERM and this is the moment at which all of them stop.

    All processes must ask equally often: JAX chooses one of the next times that they do.
    """
    global _asked
    _asked += 1
    return multihost_utils.reached_preemption_sync_point(_asked)


def agreement() -> Callable[[], bool] | None:
    """Return `stop_is_agreed`, or None without a job: then a process stops when it is asked to."""
    return stop_is_agreed if count() > 1 else None


def send(order: dict[str, Any]) -> None:
    """Give the other processes an order, as JSON; do nothing without a job."""
    if count() > 1:
        _job.client.key_value_set(f"alexnet_jax/order/{next(_numbers)}", json.dumps([_asked, order]))


def receive() -> dict[str, Any]:
    """Wait for the next order of process 0, as long as it lives."""
    global _asked
    key = f"alexnet_jax/order/{next(_numbers)}"
    while True:
        try:
            _asked, order = json.loads(_job.client.blocking_key_value_get(key, POLL_MILLISECONDS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        else:
            return order


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Run a block in process 0, then order the other processes to exit with its status."""
    status = 1
    try:
        yield
        status = 0
    except Stopped as stopped:
        status = stopped.exit_status
        raise
    finally:
        send({"exit": status})


def is_common(error: Exception) -> bool:
    """Return whether all processes of the job have this error; do not return if it is the loss of another process.

    Then a collective operation fails at once, and a little later JAX terminates this process, with a better message.
    """
    if count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
        time.sleep(2 * HEARTBEAT_SECONDS)
    return count() == 1 or isinstance(error, FloatingPointError)


def leave() -> NoReturn:
    """End this process of a job at once, because of an error of its own: JAX then terminates the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
