"""Measure on one GPU what only a GPU can tell: python experiments/gpu/measure.py [JOB ...] [--minutes=4]

A job is a process of its own (pieces.py) with a time limit; "step" names all jobs whose name begins with that word.
Each result is a row that is appended to the output at once. A job that failed or ran out of time has a row that says
so, and the next one starts. Run the command again to resume: jobs that were finished with the same card and commit are
skipped. `--list` prints all jobs; README.md says what they answer.
"""

import argparse
import contextlib
import csv
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
MACHINE = ("card", "driver", "jax", "torch", "commit")
COLUMNS = (*MACHINE, "piece", "what", "network", "batch", "dtype", "value", "unit", "n", "low", "high", "note")
FAILED = "failed"  # the unit of a row without a value; its note is the error


class Job(NamedTuple):
    """The arguments of pieces.py, the first of which is the piece, and a time limit in seconds."""

    name: str
    limit: int

    @property
    def piece(self) -> str:
        """The first word of the name."""
        return self.name.split()[0]


SEED_FORMS = ("map", "unrolled", "patches", "grouped", "processes")
JOBS = (
    Job("ceilings", 60),
    Job("right paper", 150),
    Job("right networks 0 8", 150),
    Job("right networks 8 16", 150),
    Job("kernels pool", 60),
    Job("kernels lrn", 90),
    Job("kernels conv", 200),
    Job("step paper 128", 235),
    Job("step small 128", 235),
    Job("step paper 512", 235),
    Job("step one_weird_trick 128", 235),
    Job("step torchvision 128", 235),
    Job("variants paper tensorfloat32", 235),
    Job("variants paper bfloat16", 235),
    Job("variants small tensorfloat32", 235),
    Job("deterministic embedded", 150),
    Job("deterministic paper", 200),
    *(Job(f"seeds {network} {form}", 150) for network in ("small", "cifar") for form in SEED_FORMS),
    Job("run one", 200),
    Job("run study", 230),
    Job("photos", 200),
    Job("profile paper", 90),
    Job("profile small", 60),
)


class Results:
    """A CSV file of rows in the long format, appended one by one."""

    def __init__(self, path: Path, machine: Sequence[str], piece: str):
        self._path, self._machine, self._piece = path, tuple(machine), piece

    def add(
        self,
        what: str,
        value: float | str,
        unit: str,
        *,
        network: str = "",
        batch: int | str = "",
        dtype: str = "",
        n: int = 1,
        low: float | str = "",
        high: float | str = "",
        note: str = "",
    ) -> None:
        """Append a row, and print it; numbers have six significant digits."""
        numbers = [f"{number:.6g}" if isinstance(number, float) else str(number) for number in (value, low, high)]
        row = (self._piece, what, network, batch, dtype, numbers[0], unit, n, *numbers[1:], note)
        with self._path.open("a", newline="") as file:
            if file.tell() == 0:
                csv.writer(file).writerow(COLUMNS)
            csv.writer(file).writerow((*self._machine, *row))
            file.flush()
            os.fsync(file.fileno())
        print(*(str(cell) for cell in row if cell != ""), sep="  ", flush=True)

    def samples(self, what: str, values: Sequence[float], unit: str, *, note: str = "", **labels: object) -> float:
        """Append the median of repetitions, with the lowest and the highest; return it."""
        middle = statistics.median(values)
        self.add(what, middle, unit, n=len(values), low=min(values), high=max(values), note=note, **labels)
        return middle

    def failed(self, what: str, error: object, **labels: object) -> None:
        """Append a row for what could not be measured."""
        text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
        self.add(what, "", FAILED, note=" ".join(text.split())[:500], **labels)

    def finished(self) -> set[str]:
        """Return the names of the jobs that were finished on the same machine with the same versions and commit."""
        if not self._path.exists():
            return set()
        with self._path.open(newline="") as file:
            return {
                row["what"].removeprefix("job ")
                for row in csv.DictReader(file)
                if tuple(row[field] for field in MACHINE) == self._machine
                and row["what"].startswith("job ")
                and row["unit"] != FAILED
            }


def output_of(*command: str) -> str:
    """Return the first line that a command prints; "" where it does not run."""
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]


def version(package: str) -> str:
    """Return the version of an installed package, or ""."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def machine(commit: str) -> tuple[str, ...]:
    """Return the fields `MACHINE`; card and driver as nvidia-smi names them, "cpu" and "" without one."""
    card, _, driver = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition(",")
    commit = commit or output_of("git", "rev-parse", "--short", "HEAD")
    return card.strip() or "cpu", driver.strip(), version("jax"), version("torch"), commit


def run(job: Job, seconds: float, arguments: list[str]) -> str:
    """Run a job and everything it starts; return "" or why it failed."""
    # PyTorch shares the card, and every process would take three quarters of its memory.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    folders = [str(REPOSITORY / folder) for folder in (".", "experiments/speed", "tests")]
    environment["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    command = [sys.executable, str(HERE / "pieces.py"), *arguments, *job.name.split()]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=errors, start_new_session=True)
        failure = ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            failure = f"did not end within {seconds:.0f} s"
        finally:
            stop_group(process)
        errors.seek(0)
        lines = errors.read().splitlines()
        print(*lines[-30:], sep="\n", file=sys.stderr, flush=True)
        if process.returncode and not failure:
            failure = f"exit status {process.returncode}: {lines[-1] if lines else ''}"
        return failure


def stop_group(process: subprocess.Popen) -> None:
    """Kill a process that leads its own group, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def select(names: list[str]) -> list[Job]:
    """Return the jobs with these names, or whose names begin with them, in this order; all of them without a name."""
    chosen: dict[str, Job] = {}
    for name in names or [""]:
        jobs = {job.name: job for job in JOBS if matches(job, name)}
        if not jobs:
            known = ", ".join(job.name for job in JOBS)
            sys.exit(f"measure.py: JOB={name}: must be one of {known}, or how they begin")
        chosen |= jobs  # those that are there keep their places
    return list(chosen.values())


def matches(job: Job, name: str) -> bool:
    """Return whether a job has this name, or one that begins with its words."""
    return not name or f"{job.name} ".startswith(f"{name} ")


def main() -> None:
    """Run the jobs of the command line that were not finished before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", metavar="JOB", nargs="*", help="a job, or how its name begins; default: all")
    parser.add_argument("--output", type=Path, default=HERE / "results.csv", help="the CSV file to append to")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this time; default: never")
    parser.add_argument("--again", action="store_true", help="do not skip finished jobs")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script on a CPU; needs --output")
    parser.add_argument("--commit", default="", help="of the code; default: git's")
    parser.add_argument("--data_dir", default="", help="folder of prepared datasets, for the jobs run and photos")
    parser.add_argument("--list", action="store_true", help="print the jobs and their time limits in seconds")
    options = parser.parse_args()
    jobs = select(options.jobs)
    if options.list:
        print(*(f"{job.limit:4} {job.name}" for job in jobs), sep="\n")
        return
    if options.tiny and options.output == parser.get_default("output"):
        parser.error("--tiny: must have an --output of its own, because its numbers mean nothing")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    fields = machine(options.commit)
    if not fields[-1]:
        parser.error("--commit: must be given outside a git repository; results of the same code have the same")
    deadline = time.monotonic() + 60 * options.minutes
    finished = set() if options.again else Results(options.output, fields, "").finished()
    arguments = [
        f"--output={options.output.resolve()}",
        *(f"--{name}={value}" for name, value in zip(MACHINE, fields, strict=True)),
    ]
    arguments += [f"--data_dir={Path(options.data_dir).resolve() if options.data_dir else ''}"]
    arguments += ["--tiny"] if options.tiny else []
    for job in jobs:
        left = deadline - time.monotonic()
        if job.name in finished:
            print(f"-- {job.name}: finished before")
        elif left < 10:
            print(f"-- {job.name}: no time left; run the command again")
        else:
            print(f"-- {job.name}", flush=True)
            began, results = time.monotonic(), Results(options.output, fields, job.piece)
            limit = job.limit * (10 if options.tiny else 1)  # compiling on a CPU takes its time
            failure = run(job, min(left, limit), arguments)
            if failure:
                results.failed(f"job {job.name}", failure)
            else:
                results.add(f"job {job.name}", time.monotonic() - began, "s")


if __name__ == "__main__":
    main()
