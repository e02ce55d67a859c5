"""Jobs of several processes: real ones, which talk over loopback, are one process with as many devices."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import jax
import numpy as np
import pytest

import job
from alexnet_jax import config as config_lib
from alexnet_jax import parallel, processes, train
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.parallel import Executor, make_executor
from alexnet_jax.run_dir import RunDir, StudyDir
from support import REPOSITORY, TESTS, assert_close, noise_setup

STUDY = "configs/ablation_lrn.py"
TERMINATED_BY_JAX = -signal.SIGABRT  # a shell's status 134


class Job:
    """The processes of a job."""

    def __init__(self, command: Sequence[str | Path], count: int, devices: int, logs: Path):
        logs.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._logs = [logs / f"{number}.log" for number in range(count)]
        self.processes = []
        for number, log in enumerate(self._logs):
            flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={number}"]
            environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
            environment["PYTHONPATH"] = f"{os.environ['PYTHONPATH']}:{REPOSITORY}:{TESTS}"
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *(flags if count > 1 else [])],
                        cwd=REPOSITORY,
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def log(self, number: int) -> str:
        """Return what a process has printed."""
        return self._logs[number].read_text()

    def wait_for(self, pattern: str, number: int = 0, seconds: float = 300) -> None:
        """Wait until a process has printed a pattern."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.log(number)):
            assert self.processes[number].poll() is None, self.log(number)
            assert time.monotonic() < end, self.log(number)
            time.sleep(0.05)

    def statuses(self, seconds: float = 300) -> list[int]:
        """Wait for all processes, and return how they ended; fail if one does not."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail("\n".join(f"process {n}:\n{self.log(n)[-2000:]}" for n in range(len(self.processes))))

    def kill(self) -> None:
        """Kill what is still there."""
        for process in self.processes:
            process.kill()
            process.wait()


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a job: `start(command, processes, devices)`; its processes end with the test."""
    jobs: list[Job] = []

    def start_job(command: Sequence[str | Path], count: int, devices: int) -> Job:
        jobs.append(Job(command, count, devices, tmp_path / f"logs_{len(jobs)}"))
        return jobs[-1]

    yield start_job
    for each in jobs:
        each.kill()


def assert_equal_arrays(actual: Path, expected: Path, relative: float = 0.0) -> None:
    """Assert that two files have arrays of the same names, equal up to a fraction of each array's largest value."""
    with np.load(actual) as left, np.load(expected) as right:
        assert set(left) == set(right)
        for name in left:
            if relative:
                assert_close(left[name], right[name], relative)
            else:
                np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.slow
def test_job_computes_what_one_process_does(start: Start, tmp_path: Path) -> None:
    """Loss, gradients (in the velocity) and parameters after steps with dropout; every image counts once; restored.

    In the first job each process has a shard of the batch and both towers, in the second a shard and one tower.
    """
    setup = noise_setup(job.job_config(), "vmap")
    state = job.train_steps(setup)
    job.save_arrays(tmp_path / "state.npz", state)
    job.save_arrays(tmp_path / "outcomes.npz", job.evaluate_images(setup, state))
    first = tmp_path / "2x2"
    for count, devices in ((2, 2), (4, 1)):
        folder = tmp_path / f"{count}x{devices}"
        folder.mkdir()
        restore = [] if folder == first else [f"--restore={first}"]
        statuses = start(["tests/job.py", folder, *restore], count, devices).statuses()
        assert statuses == [0] * count
        assert_equal_arrays(folder / "state.npz", tmp_path / "state.npz", relative=1e-5)
        assert_equal_arrays(folder / "outcomes.npz", tmp_path / "outcomes.npz", relative=1e-4)
        if restore:
            assert_equal_arrays(folder / "restored.npz", first / "state.npz")
    for name in ("vmap", "pmap"):  # on one device, and on two
        setup = noise_setup(job.job_config(), name)
        with Checkpoints(first / "checkpoints") as checkpoints:
            restored = checkpoints.restore(setup.executor.place(train.init_state(setup)))
        assert restored is not None
        assert restored[1] == {"process": 2}
        job.save_arrays(tmp_path / f"{name}.npz", restored[0])
        assert_equal_arrays(tmp_path / f"{name}.npz", first / "state.npz")


def study_overrides(epochs: float) -> list[str]:
    """Return the flags that make a study's runs small, with a checkpoint after each 100 of 500 steps an epoch."""
    changes = job.CHANGES | {"train.epochs": epochs, "train.log_every": 10, "train.checkpoint_every": 100}
    return [f"--config.{key}={value}" for key, value in (changes | {"eval.every_epochs": 1.0}).items()]


def study_command(folder: Path, *flags: str, epochs: float = 0.8) -> list[str]:
    """Return the command line of a study of small runs."""
    study = [f"--config={STUDY}", "--only=lrn", f"--workdir={folder}"]
    return ["-m", "alexnet_jax", "run", *study, *study_overrides(epochs), *flags]


def curve(run: RunDir) -> list[dict[str, float]]:
    """Return a run's metrics without those of time."""
    times = ("images_per_second", "data/wait_fraction")
    return [{key: value for key, value in line.items() if key not in times} for line in run.metrics()]


def steps_on_disk(run: RunDir) -> list[int]:
    return sorted(int(path.name) for path in run.checkpoints.iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_interrupted_jobs_resume_with_any_number_of_processes(start: Start, tmp_path: Path) -> None:
    command = study_command(tmp_path / "study", "--seeds=0:1")
    run = StudyDir(tmp_path / "study").run("lrn", 0)

    stopped = start(command, 2, 1)
    stopped.wait_for("step 10/")
    stopped.processes[1].send_signal(signal.SIGTERM)  # to one of them
    assert stopped.statuses() == [143, 143]
    steps = {re.search(r"stopped at step (\d+)", stopped.log(number))[1] for number in (0, 1)}  # type: ignore[index]
    assert steps == {str(steps_on_disk(run)[-1])}

    for lost, saved in ((1, 100), (0, 200)):
        job = start(command, 2, 1)
        job.wait_for(f"step {saved + 10}/")
        job.processes[lost].kill()
        killed = time.monotonic()
        statuses = job.statuses()
        assert time.monotonic() - killed < 30
        assert statuses[lost] == -signal.SIGKILL
        assert statuses[1 - lost] == TERMINATED_BY_JAX
        assert "another task died" in job.log(1 - lost)
        assert run.status == "unfinished"

    straight = RunDir(tmp_path / "straight")
    config = config_lib.run_config(config_lib.load_study(STUDY, study_overrides(0.8)), "lrn", 0)
    for each in (run, straight):  # in this process, which has two devices
        train.train_and_evaluate(config, each.path)
    assert re.search("from step [23]00 to 400", run.log_file.read_text())  # 300: it was killed late
    actual, expected = curve(run), curve(straight)
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for line, other in zip(actual, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-3)


@pytest.mark.slow
def test_launched_job_trains_what_no_other_job_does(start: Start, tmp_path: Path) -> None:
    """It passes over a run whose lock is held, and holds the lock of its own; process 0 alone writes."""
    study = StudyDir(tmp_path / "study")
    runs = [study.run("lrn", seed) for seed in (0, 1)]
    locks = [filelock.FileLock(run.path.parent / f".{run.path.name}.lock", timeout=0) for run in runs]
    _, _, *run_verb = study_command(study.path, "--seeds=0:2", epochs=0.1)
    runs[0].path.parent.mkdir(parents=True)
    with locks[0]:
        job = start(["-m", "alexnet_jax", "launch", "--processes=2", "--devices=1", "--", *run_verb], 1, 1)
        begins = "lrn/seed_1: shard_map on cpu:0, cpu:2048: from step 0 to 50"
        job.wait_for(f"0: {begins}")
        with pytest.raises(filelock.Timeout):
            locks[1].acquire()
        assert job.statuses() == [0]
    assert "being run by another process: lrn/seed_0" in job.log(0)
    assert f"1: {begins}" not in job.log(0)
    assert [run.status for run in runs] == ["not started", "finished"]
    assert [line["step"] for line in curve(runs[1])] == [10, 20, 30, 40, 50, 50]
    environment = runs[1].read_environment()
    assert environment is not None
    assert environment["processes"] == 2


@pytest.mark.slow
def test_process_that_never_comes_is_an_error(start: Start, tmp_path: Path) -> None:
    job = start([*study_command(tmp_path / "study"), "--start_timeout=3"], 2, 1)
    job.processes[1].kill()
    assert job.statuses(60)[0] == TERMINATED_BY_JAX
    assert "waits up to 3 s for its processes" in job.log(0)
    assert "DEADLINE_EXCEEDED" in job.log(0)
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_error_of_one_process_ends_the_job(start: Start, tmp_path: Path) -> None:
    """Bad input is told once, by process 0; all have its status."""
    job = start([*study_command(tmp_path / "study"), "--config.train.batch_size=5", "--config.model.towers=1"], 2, 1)
    assert job.statuses() == [1, 1]
    assert "train.batch_size=5: must be a multiple of 2" in job.log(0)
    assert "batch_size" not in job.log(1)
    assert not (tmp_path / "study" / "lrn").exists()


def flags(**values: Any) -> SimpleNamespace:
    names = ("cluster", "coordinator", "num_processes", "process_id")
    return SimpleNamespace(**dict.fromkeys(names) | {"start_timeout": 1} | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "a:1"}, "--num_processes, --process_id: must be given, too"),
        ({"process_id": 0, "num_processes": 2}, "--coordinator: must be given, too"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "--coordinator=a: must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id=2: must be from 0 to 1"),
        ({"cluster": "slurm", "process_id": 0}, "--cluster=slurm: must come without"),
        ({"cluster": "slurm"}, "--cluster=slurm: must be where this process runs"),
    ],
)
def test_flags_of_a_job_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        processes.initialize(flags(**values))  # type: ignore[arg-type]
    assert not jax.distributed.is_initialized()


def test_without_flags_there_is_no_job() -> None:
    processes.initialize(flags())  # type: ignore[arg-type]
    assert (processes.count(), processes.is_first(), processes.agreement()) == (1, True, None)


@pytest.mark.parametrize(
    ("name", "towers", "batch_size", "message"),
    [
        ("pmap", 2, 8, "train.executor=pmap: must be shard_map for a job of 2 processes"),
        ("vmap", 2, 8, "train.executor=vmap: must be shard_map for a job of 2 processes"),
        ("auto", 4, 8, "model.towers=4: must divide the 2 devices of the job's 2 processes"),
        ("auto", 1, 7, "train.batch_size=7: must be a multiple of 2"),
    ],
)
def test_job_uses_all_devices_in_one_mesh(
    name: str, towers: int, batch_size: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert make_executor("auto", 2, 8) == Executor("shard_map", 2, 1)
    with pytest.raises(ValueError, match=re.escape(message)):
        parallel.make_executor(name, towers, batch_size)
