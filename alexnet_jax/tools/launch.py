"""Start the processes of one job on one machine.

alexnet-jax launch --processes=2 [--devices=1] -- run --config=configs/ablation_lrn.py ...

Each line of output begins with the number of its process. SIGINT, SIGTERM and SIGHUP are passed on to every process.
The exit status is that of the first process that ended unsuccessfully, or 128 + N if signal N killed it.
"""

import argparse
import contextlib
import ctypes
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from alexnet_jax import stop

DRAIN_SECONDS = 10.0  # for output that is left in a pipe, which a process of a process may hold open for ever
POLL_SECONDS = 0.1  # a wait without a limit would not notice a signal that another thread has received
_PR_SET_PDEATHSIG = 1  # in Linux's <sys/prctl.h>
_libc = ctypes.CDLL(None)


def supervise(
    commands: Sequence[Sequence[str]], variables: Sequence[Mapping[str, str]], grace: float
) -> tuple[int, int] | None:
    """Run each command in a process of its own until all have ended, and print their output line by line.

    Once a process has ended unsuccessfully, the others have `grace` seconds to end by themselves, and as long again
    between SIGTERM and SIGKILL.

    Args:
      commands: one for each process.
      variables: environment variables of each process besides those of this one.
      grace: seconds.

    Returns:
      The first process that ended unsuccessfully, and its exit status, -N if signal N killed it; None without one.
    """
    processes: list[subprocess.Popen[bytes]] = []
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    failed, deadline, measures = None, math.inf, [signal.SIGTERM, signal.SIGKILL]

    def send(number: int) -> None:
        for process in processes:
            process.send_signal(number)  # does nothing to a process that has ended

    def wait(index: int) -> None:
        ended.put((index, processes[index].wait()))

    with _handling_signals(send):
        try:
            for command, added in zip(commands, variables, strict=True):
                processes.append(_start(command, os.environ | added))
            copying = _copy_output(processes)
            for index in range(len(processes)):
                _start_thread(wait, index)
            running = len(processes)
            while running:
                if time.monotonic() > deadline:
                    send(measures.pop(0))
                    deadline = time.monotonic() + grace if measures else math.inf
                with contextlib.suppress(queue.Empty):
                    index, status = ended.get(timeout=POLL_SECONDS)
                    running -= 1
                    if status and failed is None:
                        failed, deadline = (index, status), time.monotonic() + grace
        finally:
            send(signal.SIGKILL)  # some may run if not all could be started
    for thread in copying:
        thread.join(DRAIN_SECONDS)
    return failed


@contextlib.contextmanager
def _handling_signals(send: Callable[[int], None]) -> Iterator[None]:
    """Call a function with the number of each stop signal that arrives; ignored signals stay ignored, as in `stop`."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: send(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that ends with this one."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # a terminal's Ctrl-C reaches this process alone, which passes it on once
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    """Make Linux kill this process when its parent ends, even if that is killed and can pass on nothing."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _copy_output(processes: Sequence[subprocess.Popen[bytes]]) -> list[threading.Thread]:
    """Copy each line that a process prints, after the number of the process; return the threads that copy."""
    lock = threading.Lock()

    def copy(prefix: bytes, source: IO[bytes], target: IO[bytes] | None) -> None:
        for line in source:
            # Without a target, as after `>&-` or once `| head` has ended, the process must still be able to print.
            with lock, contextlib.suppress(BrokenPipeError):
                if target is not None:
                    target.write(prefix + line.removesuffix(b"\n") + b"\n")
                    target.flush()

    return [
        _start_thread(copy, f"{index}: ".encode(), source, getattr(target, "buffer", None))
        for index, process in enumerate(processes)
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]


def _start_thread(function: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def job_commands(arguments: Sequence[str], processes: int) -> list[list[str]]:
    """Return the command of each process of a job, whose coordinator will listen on a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    python = [sys.executable, "-u", "-m", "alexnet_jax"]  # -u: lines arrive when they are printed
    job = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [[*python, *arguments, *job, f"--process_id={index}"] for index in range(processes)]


def device_variables(index: int, devices: int) -> dict[str, str]:
    """Return the environment variables that give a process its devices: CPU devices, or GPUs that no other one has."""
    gpus = range(index * devices, (index + 1) * devices)
    return {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, gpus))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb launch."""
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="number of processes")
    parser.add_argument(
        "--devices", type=int, metavar="N", help="devices of each process; default: all GPUs, or CPU devices as needed"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="after one process has failed: how long the others may take to end, and again after SIGTERM; default: 30",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="-- run --config=FILE ...")


def main(arguments: argparse.Namespace) -> None:
    """Run the processes of a job, and exit with the status of the first one that failed."""
    for flag, minimum in (("processes", 1), ("devices", 1), ("grace", 0)):
        value = getattr(arguments, flag)
        if value is not None and not value >= minimum:
            raise ValueError(f"--{flag}={value}: must be {minimum} or more")
    if arguments.command[:2] != ["--", "run"]:
        given = " ".join(arguments.command[:2])
        raise ValueError(f"COMMAND={given!r}: must be -- and the verb run; write `launch ... -- run --config=FILE ...`")
    commands = job_commands(arguments.command[1:], arguments.processes)
    devices = arguments.devices
    variables = [device_variables(index, devices) if devices else {} for index in range(arguments.processes)]
    if failed := supervise(commands, variables, arguments.grace):
        index, status = failed
        killed = status < 0
        how = f"was killed by {signal.Signals(-status).name}" if killed else f"ended with exit status {status}"
        remedy = "its own message says why" if status in (1, 2) else "re-run the command to resume"
        print(f"alexnet-jax launch: process {index} {how}; {remedy}", file=sys.stderr)
        sys.exit(128 - status if killed else status)
