"""Jobs of a cluster: what is submitted, and that a job that was interrupted resumes."""

import argparse
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from alexnet_jax.configs import ablation_lrn
from alexnet_jax.run_dir import StudyDir, write_json, write_text
from alexnet_jax.studies import runner, submit
from support import REPOSITORY, TINY

with pytest.MonkeyPatch.context() as environment:
    environment.setenv("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # its setup of logging closes streams that are pytest's
    import submitit  # noqa: F401

JOBS = {"a/seed_0": ["--only=a"], "b/seed_0": ["--only=b"]}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put commands of Slurm on the path, which number every job 7; return the file of the last submission."""
    submitted = tmp_path / "submitted.sh"
    for name in ("srun", "sbatch"):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/sh\ngrep partition=none "$1" >&2 && exit 1\ncp "$1" {submitted}\necho "job 7"\n')
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return submitted


def submitted_commands(folder: Path) -> list[list[str]]:
    """Return the commands of the jobs that were submitted, without Python's part."""
    paths = sorted(folder.glob("*_submitted.pkl"))
    return [pickle.loads(path.read_bytes()).function.command[4:] for path in paths]


def test_jobs_are_one_array_on_slurm(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study" / "jobs"
    submit.submit(JOBS, folder, "slurm", '{"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 30}')
    script = slurm.read_text()
    for flag in ("array=0-1%2", "partition=gpu", "gpus-per-node=1", "time=30", "job-name=study", "signal=USR2@90"):
        assert f"#SBATCH --{flag}\n" in script
    assert submitted_commands(folder) == [["run", "--only=a"], ["run", "--only=b"]]
    logs = [f"{folder}/7_{number}_0_log.out" for number in range(2)]
    assert capsys.readouterr().out == f"a/seed_0: job 7_0, log {logs[0]}\nb/seed_0: job 7_1, log {logs[1]}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("[1]", "must be a JSON object, such as"),
        ("{", "Expecting property name"),
        ('{"slurm_partitions": "gpu"}', "Unknown argument 'partitions'"),
        ('{"timeout_min": "1h"}', '"timeout_min" expected type'),
        ('{"slurm_partition": "none"}', "partition=none"),  # sbatch's message
    ],
)
def test_bad_options_are_refused(options: str, message: str, slurm: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--submit=slurm, --submit_options=.*: ") as error:
        submit.submit(JOBS, tmp_path / "jobs", "slurm", options)
    assert message in str(error.value)
    assert not slurm.exists()


def test_missing_slurm_and_submitit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match='Could not detect "srun"'):
        submit.submit(JOBS, tmp_path, "slurm", "{}")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"^--submit=slurm: must have the package submitit; pip install"):
        submit.submit(JOBS, tmp_path, "slurm", "{}")


def tiny_study(**changes: Any) -> ConfigDict:
    study = ablation_lrn.get_config()
    study.update_from_flattened_dict(TINY | changes)
    return study


def main(workdir: Path, study: ConfigDict, *flags: str) -> None:
    """Run the verb's `main` with the study in the place of a file's."""
    argv = ["--config=study.py", "--config.seed=1", f"--workdir={workdir}", *flags]
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    arguments = parser.parse_args([flag for flag in argv if not flag.startswith("--config.")])
    arguments.argv, arguments.config, arguments.config_name = argv, study, "study"
    runner.main(arguments)


def test_each_run_that_is_not_finished_is_a_job(slurm: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "study"
    finished = StudyDir(workdir).run("no_lrn", 0)
    write_json(finished.result_file, {"steps": 4})
    write_text(finished.metrics_file, '{"step": 4}\n')
    flags = ("--submit", "slurm", "--submit_options={}", "--only=lrn,no_lrn", "--seeds=0,1")
    main(workdir, tiny_study(), *flags)
    same = ["run", "--config=study.py", "--config.seed=1", f"--workdir={workdir}"]
    assert submitted_commands(workdir / "jobs") == [
        [*same, "--only=lrn", "--seeds=0"],
        [*same, "--only=lrn", "--seeds=1"],
        [*same, "--only=no_lrn", "--seeds=1"],
    ]


def test_each_arm_is_a_job_if_it_is_tuned(slurm: Path, tmp_path: Path) -> None:
    tuning = {"tuning.key": "optim.learning_rate", "tuning.choices": (0.1, 0.2)}
    main(tmp_path, tiny_study(**tuning, seeds=(0, 1)), "--submit=slurm", "--only=lrn,no_lrn")
    flags = [command[-2:] for command in submitted_commands(tmp_path / "jobs")]
    assert flags == [["--only=lrn", "--seeds=0,1"], ["--only=no_lrn", "--seeds=0,1"]]


def test_nothing_is_submitted_where_one_arm_cannot_run(slurm: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.pool\.window=30: must fit its feature map"):
        main(tmp_path / "study", tiny_study(**{"model.pool.window": 30}), "--submit=slurm")
    with pytest.raises(ValueError, match="--submit_options: must come with --submit"):
        main(tmp_path / "study", tiny_study(), "--submit_options={}")
    with pytest.raises(ValueError, match="--submit=slurm: must come without --coordinator"):
        main(tmp_path / "study", tiny_study(), "--submit=slurm", "--coordinator=127.0.0.1:1")
    assert not slurm.exists()
    assert not (tmp_path / "study").exists()


class Signalled(Exception):  # noqa: N818
    """The end of a job by its signal, as submitit ends it."""


@pytest.fixture
def on_alarm() -> Any:
    """Return a function that installs a handler of SIGALRM."""
    before = signal.getsignal(signal.SIGALRM)
    yield lambda handler: signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


SAVES = """
import os, pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.SIGALRM)
time.sleep(60)
"""


@pytest.mark.parametrize("by_submitit", [True, False])
def test_run_has_saved_and_ended_when_its_job_ends(
    by_submitit: bool, on_alarm: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When submitit asks for a checkpoint, in a signal handler; and when the job is interrupted in another way."""
    monkeypatch.chdir(tmp_path)
    job = submit.Job(["--config=study.py"])
    command, job.command = job.command, [sys.executable, "-c", SAVES]

    def handle(*_: Any) -> None:
        if by_submitit:
            job.command = command
            delayed = pickle.loads(pickle.dumps(job.checkpoint()))
            assert delayed.function.command == command
            assert Path("saved").exists()
        raise Signalled

    on_alarm(handle)
    with pytest.raises(Signalled):
        job()
    assert Path("saved").exists()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_failed_run_fails_its_job() -> None:
    job = submit.Job([])
    job.command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="exit status 3; submit again to resume"):
        job()


def wait_for(condition: Callable[[], Any], seconds: float = 300.0) -> Any:
    """Wait until a condition holds, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the process of a job in /proc")
def test_interrupted_job_is_requeued_and_resumes(tmp_path: Path) -> None:
    """One of two jobs is told that it is out of time, in the middle of training, as Slurm tells it."""
    steps = 600
    tiny = TINY | {
        "train.epochs": 0.6,
        "train.checkpoint_every": steps,
        "train.log_every": 10,
        "eval.every_epochs": 1.0,
    }
    tiny["model.order"] = ("conv1", "conv3", "fc8")  # compiles faster
    flags = [*(f"--config.{key}={value}" for key, value in tiny.items()), f"--workdir={tmp_path / 'study'}"]
    run = [sys.executable, "-m", "alexnet_jax", "run", "--config=configs/ablation_lrn.py", "--only=lrn,no_lrn"]
    with (tmp_path / "output").open("w+") as output:  # not a pipe, which the jobs would hold open
        subprocess.run([*run, "--seeds=0:1", "--submit=local", *flags], cwd=REPOSITORY, stdout=output, check=True)
        output.seek(0)
        lines = output.readlines()
    assert len(lines) == 3
    controllers = dict(line.split(": job ") for line in lines[:2])
    controller = controllers["lrn/seed_0"].partition(",")[0]
    lrn, no_lrn = (StudyDir(tmp_path / "study").run(arm, 0) for arm in ("lrn", "no_lrn"))
    wait_for(lrn.metrics)
    os.kill(int(Path(f"/proc/{controller}/task/{controller}/children").read_text()), signal.SIGUSR2)
    wait_for(lambda: len(list((tmp_path / "study").glob("jobs/*_result.pkl"))) == 2)
    first, second = re.findall(rf": from step (\d+) to {steps}\n", lrn.log_file.read_text())
    assert 0 == int(first) < int(second) < steps
    for folder in (lrn, no_lrn):
        assert folder.status == "finished"
        assert {line["step"] for line in folder.metrics()} == set(range(10, steps + 1, 10))
    assert (tmp_path / "study" / "report.html").exists()
