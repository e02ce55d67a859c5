"""Jobs of a cluster, each of which is a command `alexnet-jax run` of its own. Needs submitit, and no JAX."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLUSTERS = ("slurm", "local")
DEFAULTS = {"timeout_min": 240}  # submitit's own is 5
# A job that reaches its time limit has saved a checkpoint and is requeued; submitit would do that three times.
TIMEOUTS = 100


class Job:
    """A command `alexnet-jax run` as submitit runs it: when the job is preempted or out of time, it resumes later.

    The command is a process of its own, so that submitit's signals and those that stop a run do not meet: submitit asks
    for a checkpoint by SIGUSR2 and ignores SIGTERM; a run saves one at SIGTERM.
    """

    def __init__(self, arguments: Sequence[str]):
        self.command = [sys.executable, "-u", "-m", "alexnet_jax", "run", *arguments]
        self._process = 0

    def __call__(self) -> None:
        """Run the command; raise RuntimeError if it fails."""
        # Slurm may send a job's signals to its whole process group, and SIGUSR2 would end the command.
        self._process = os.posix_spawn(sys.executable, self.command, os.environ, setpgroup=0)
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        except BaseException:  # such as SIGINT, with which submitit cancels a local job
            self._stop()
            raise
        if status:
            raise RuntimeError(f"exit status {status}; submit again to resume")

    def checkpoint(self) -> Any:
        """Save a checkpoint, end the command, and return what submitit is to run when the job starts again."""
        from submitit.helpers import DelayedSubmission

        self._stop()
        return DelayedSubmission(self)

    def _stop(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended
            os.kill(self._process, signal.SIGTERM)
            os.waitpid(self._process, 0)


def submit(jobs: Mapping[str, Sequence[str]], folder: Path, cluster: str, options: str) -> None:
    """Submit jobs, as one array on Slurm, and print their ids and logs.

    Args:
      jobs: by name, the arguments of each job's command `alexnet-jax run`.
      folder: of the logs, and of submitit's files.
      cluster: one of `CLUSTERS`.
      options: parameters of `submitit.AutoExecutor.update_parameters`, as a JSON object.

    Raises:
      ValueError: submitit is missing, an option does not exist, or the cluster refuses the jobs.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError(f"--submit={cluster}: must have the package submitit; pip install submitit") from None
    try:
        parameters = json.loads(options)
        if not isinstance(parameters, dict):
            raise ValueError('must be a JSON object, such as {"slurm_partition": "gpu", "gpus_per_node": 1}')
        executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(**DEFAULTS | {"name": folder.absolute().parent.name} | parameters)
        with executor.batch():
            submitted = [executor.submit(Job(arguments)) for arguments in jobs.values()]
    # Of JSON, of submitit's checks of names, types and values, and of commands such as sbatch.
    except (ValueError, NameError, AssertionError, TypeError, RuntimeError) as error:
        raise ValueError(f"--submit={cluster}, --submit_options={options}: {error}") from None
    for name, job in zip(jobs, submitted, strict=True):
        print(f"{name}: job {job.job_id}, log {job.paths.stdout}")


def job_arguments(argv: Sequence[str]) -> list[str]:
    """Return the arguments of a command without those that submit it and those that choose arms and seeds."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--submit", "--submit_options", "--only", "--seeds"):
        parser.add_argument(flag)
    return parser.parse_known_args(argv)[1]
