"""Break runs on purpose, and compare them with undisturbed ones: python experiments/reliability/soak.py SCENARIO

Each scenario prints what went wrong and appends a row to results.csv; the exit status is 1 if anything did. README.md
explains the scenarios.
"""

import argparse
import contextlib
import csv
import gc
import itertools
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexnet_jax import config as config_lib
from alexnet_jax import parallel, train
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.configs import base
from alexnet_jax.run_dir import RunDir, StudyDir, environment
from alexnet_jax.studies import report, runner

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PATIENCE = 600.0  # seconds after which a process counts as hanging
TIMES = {"images_per_second", "seconds", "data/wait_fraction", "training_seconds", "waiting_seconds", "images"}


def changes(steps: int, checkpoint_every: int) -> dict[str, Any]:
    """Return what makes a small run of the base config: a second after its start."""
    return {
        **{f"model.layers.conv{number}.features": 8 for number in range(1, 6)},
        **{f"model.layers.fc{number}.features": 16 for number in (6, 7)},
        "train.batch_size": 4,
        "train.epochs": steps / 1000,
        "train.log_every": 2,
        "train.checkpoint_every": checkpoint_every,
        "eval.every_epochs": max(steps // 4, 1) / 1000,
        "eval.train_images": 20,
    }


def run_config(steps: int, checkpoint_every: int, seed: int = 0) -> ConfigDict:
    """Return the config of a small run."""
    return config_lib.run_config(base.get_config("embedded", changes(steps, checkpoint_every)), "base", seed)


def start(workdir: Path, values: dict[str, Any], *arguments: str) -> subprocess.Popen:
    """Start the command of a study in a process of its own; its output goes to a file beside the study's folder."""
    command = [sys.executable, "-m", "alexnet_jax", "run", "--config=configs/base.py:embedded", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in values.items()]
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    variables = os.environ | {"PYTHONPATH": path}
    with Path(f"{workdir}.out").open("ab") as output:
        return subprocess.Popen([*command, *arguments], cwd=REPOSITORY, env=variables, stdout=output, stderr=output)


def finish(workdir: Path, values: dict[str, Any], *arguments: str) -> None:
    """Run the command of a study to its end, undisturbed."""
    process = start(workdir, values, *arguments)
    if process.wait(PATIENCE):
        raise RuntimeError(f"exit status {process.returncode}:\n{printed(workdir)[-1000:]}")


def printed(workdir: Path) -> str:
    """Return what the commands of a study's folder have printed."""
    return Path(f"{workdir}.out").read_text(errors="replace")


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    """Return what equal runs have in common."""
    return {name: value for name, value in values.items() if name not in TIMES}


def checkpoint(run: RunDir) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the arrays and the progress of a run's last checkpoint."""
    with Checkpoints(run.checkpoints) as checkpoints:
        restored = checkpoints.restore()
    if restored is None:
        raise ValueError(f"{run.path}: has no checkpoint")
    state, progress = restored
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(path): repr(leaf.shape).encode() + leaf.tobytes() for path, leaf in leaves}
    return arrays, without_times(progress) | {"metrics": without_times(progress["metrics"])}


def differences(expected: RunDir, run: RunDir) -> list[str]:
    """Return in what a finished run differs from one that was left alone, bit for bit; and what it has left behind."""
    if run.result is None or expected.result is None:
        return [f"{run.path}: is not finished"]
    pairs = {
        "parameters and progress": [checkpoint(each) for each in (expected, run)],
        "metrics": [[without_times(line) for line in each.metrics()] for each in (expected, run)],
        "result": [without_times(each.result or {}) for each in (expected, run)],
        "filters": [each.filters_file.read_bytes() for each in (expected, run)],
        "by_class": [each.by_class_file.read_bytes() for each in (expected, run)],
        "TensorBoard's images": [images(each) for each in (expected, run)],
    }
    wrong = [name for name, (one, other) in pairs.items() if one != other]
    wrong += [] if scalars(run) == recorded(run) else ["TensorBoard's points are not those of metrics.jsonl, once"]
    leftover = [path.name for path in run.checkpoints.iterdir() if not path.name.removeprefix("damaged_").isdecimal()]
    return [f"{run.path}: {name}" for name in [*wrong, *leftover]]


def recorded(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Return the points of metrics.jsonl, by name: step and float32 value."""
    points: dict[str, dict[int, float]] = {}
    for line in run.metrics():
        for name, value in line.items():
            points.setdefault(name, {})[line["step"]] = float(np.float32(value))
    return {name: sorted(of_name.items()) for name, of_name in points.items() if name != "step"}


def events(run: RunDir) -> EventAccumulator:
    """Return what TensorBoard reads of a run."""
    return EventAccumulator(str(run.path), {"scalars": 0, "images": 0}).Reload()


def scalars(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Return the points that TensorBoard shows, by name, in its order."""
    read = events(run)
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


def images(run: RunDir) -> dict[str, list[int]]:
    """Return the steps of the images that TensorBoard shows."""
    read = events(run)
    return {name: [event.step for event in read.Images(name)] for name in read.Tags()["images"]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what is printed."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def wait_for_training(run: RunDir, process: subprocess.Popen, lines: int) -> None:
    """Return when a process has logged something new, or has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and log_lines(run) <= lines and time.monotonic() < deadline:
        time.sleep(0.02)


def log_lines(run: RunDir) -> int:
    """Return the number of lines in a run's log."""
    return run.log_file.read_bytes().count(b"\n") if run.log_file.exists() else 0


class Undisturbed:
    """A run that was left alone, and how long its parts take."""

    def __init__(self, folder: Path, steps: int, checkpoint_every: int):
        self.values = changes(steps, checkpoint_every)
        finish(folder / "first", self.values)  # compiles
        began = time.monotonic()
        process = start(folder / "undisturbed", self.values)
        self.run = StudyDir(folder / "undisturbed").run("base", 0)
        wait_for_training(self.run, process, 0)
        self.start_seconds = time.monotonic() - began
        process.wait(PATIENCE)
        self.training_seconds = time.monotonic() - began - self.start_seconds

    def moment(self, run: RunDir, process: subprocess.Popen, generator: random.Random) -> None:
        """Wait for a random moment: of the start in one of four times, else of training, evaluation and the end."""
        if generator.random() < 0.25:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(0, self.start_seconds))
            return
        wait_for_training(run, process, log_lines(run))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0, 1.1 * self.training_seconds))


Scenario = Iterator[list[str]]  # what is wrong, for each try


def kill(folder: Path, options: argparse.Namespace) -> Scenario:
    """Kill -9 at random moments, resume until done: parameters, metrics, results, TensorBoard."""
    generator, whole = random.Random(options.seed), Undisturbed(folder, 60, 5)
    kills = 0
    for number in itertools.count():
        workdir = folder / f"killed_{number}"
        run = StudyDir(workdir).run("base", 0)
        for _ in range(5):
            process = start(workdir, whole.values)
            whole.moment(run, process, generator)
            if process.poll() is not None or kills == options.count:
                break
            process.kill()
            kills += 1
            process.wait()
            print(f"kill {kills}: after {log_lines(run)} lines of the log", flush=True)
        if process.wait(PATIENCE):
            finish(workdir, whole.values)
        wrong = differences(whole.run, run)
        yield wrong
        if kills >= options.count:
            return
        if not wrong:
            shutil.rmtree(workdir)


def flip(position: float) -> Callable[[Path], None]:
    """Return the function that changes a bit of the byte at a fraction of a file's length."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        if content:
            content[min(int(position * len(content)), len(content) - 1)] ^= 1
        path.write_bytes(content)

    change.__name__ = f"flip at {position:.0%}"
    return change


def truncate(length: float) -> Callable[[Path], None]:
    """Return the function that leaves a fraction of a file."""

    def change(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(length * len(content))])

    change.__name__ = f"truncate to {length:.0%}"
    return change


def delete(path: Path) -> None:
    """Delete a file."""
    path.unlink()


def damage(folder: Path, options: argparse.Namespace) -> Scenario:
    """Flip, truncate and delete each file of the newest checkpoint, then resume: the end is bit-equal."""
    config = run_config(12, 3)
    with quiet():
        train.train_and_evaluate(config, folder / "whole")
    whole, stopped = RunDir(folder / "whole"), RunDir(folder / "stopped")
    shutil.copytree(whole.path, stopped.path)
    stopped.result_file.unlink()
    newest = stopped.checkpoints / "12"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    harms = [*map(flip, (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)), *map(truncate, (0.0, 0.5, 0.99)), delete]
    cases = list(itertools.product(harms, files))
    for harm, file in random.Random(options.seed).sample(cases, min(options.count, len(cases))):
        run = RunDir(folder / "damaged")
        shutil.copytree(stopped.path, run.path)
        harm(run.checkpoints / "12" / file)
        try:
            with quiet():
                train.train_and_evaluate(config, run.path)
            wrong = differences(whole, run)
        except Exception as error:  # none is right here
            wrong = [repr(error)]
        aside = (run.checkpoints / "damaged_12").exists()
        said = "set aside as damaged_12; resumes from step 9" in run.log_file.read_text() and bool(run.damages())
        wrong += [] if aside == said else ["the log or the report does not say that a checkpoint was set aside"]
        print(f"{harm.__name__} {file}: {'found' if aside else 'without effect'}", flush=True)
        yield [f"{harm.__name__} {file}: {sentence}" for sentence in wrong]
        shutil.rmtree(run.path)


def files(folder: Path, options: argparse.Namespace) -> Scenario:
    """Damage the small files of a run, then report and resume: the file is named or mended, no other run suffers."""
    study = base.get_config("embedded", changes(12, 3) | {"seeds": (0, 1)})
    whole = StudyDir(folder / "whole")
    with quiet():
        runner.run_study(study, whole.path)
    names = {path.name for path in whole.run("base", 0).path.iterdir() if path.is_file()} - {"train.log"}

    def garble(path: Path) -> None:
        path.write_bytes(b"\x00\xff{<b>\n" + path.read_bytes()[6:])

    harms = [garble, flip(0.0), truncate(0.0), truncate(0.5)]
    cases = list(itertools.product(harms, [*sorted(names), "../../study.json"]))
    for harm, name in random.Random(options.seed).sample(cases, min(options.count, len(cases))):
        damaged = StudyDir(folder / "damaged")
        shutil.copytree(whole.path, damaged.path)
        run, other = damaged.run("base", 0), damaged.run("base", 1)
        file = run.path / name
        harm(file)
        wrong, page = [], ""
        with quiet():
            try:
                report.write(damaged.path)
                page = damaged.report_file.read_text()
            except ValueError as error:
                page = str(error)
                wrong += [] if file.name == "study.json" else ["the report fails"]
            for each in (run, other):
                if each.path / name != each.result_file or each is other:
                    each.result_file.unlink()  # so that both have something left to do
            failed = runner.run_study(study, damaged.path)
        named = file.name in page
        said = [(each.folder.read_failure() or {})["error"] for each in failed]
        wrong += [f"seed {each.seed} fails" for each in failed if each.seed != 0]
        wrong += [f"fails without naming the file: {sentence}" for sentence in said if file.name not in sentence]
        wrong += differences(whole.run("base", 1), other)
        if not failed:  # what only the end of the training writes stays as it is, and is named
            kept = {"filters.npy": "filters", "by_class.json": "by_class"}.get(name, "TensorBoard's images")
            wrong += [each for each in differences(whole.run("base", 0), run) if not each.endswith(kept)]
        mended = name == "statistics.npz" or name.startswith("events")  # measured, or written, again
        wrong += [] if named or failed or mended else ["the file is not named"]
        print(f"{harm.__name__} {name}: {'named' if named else ''} {'fails alone' if failed else ''}", flush=True)
        yield [f"{harm.__name__} {name}: {sentence}" for sentence in wrong]
        shutil.rmtree(damaged.path)


def disk_full(folder: Path, options: argparse.Namespace) -> Scenario:
    """Fill the disk at random moments of a run, free it after a while: it ends or is resumed, and never hangs."""
    generator, whole = random.Random(options.seed), Undisturbed(folder, 200, 20)
    for number in range(options.count):
        workdir = folder / f"full_{number}"
        with disk(workdir):
            process = start(workdir, whole.values)
            whole.moment(StudyDir(workdir).run("base", 0), process, generator)
            filler = workdir / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(0, 6))
            filler.unlink()
            try:
                status = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                yield [f"disk full {number}: hangs"]
                continue
            wrong = ["a traceback"] if "Traceback" in printed(workdir) else []
            noticed = "No space left" in printed(workdir)
            print(f"disk full {number}: exit status {status}, {'noticed' if noticed else 'not noticed'}", flush=True)
            finish(workdir, whole.values)
            wrong += differences(whole.run, StudyDir(workdir).run("base", 0))
            yield [f"disk full {number}: {sentence}" for sentence in wrong]


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Make a folder a disk of 16 MB."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False).returncode:
        raise OSError(f"{folder}: must be a disk of its own, to be filled; run this scenario as root on Linux")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def signals(folder: Path, options: argparse.Namespace) -> Scenario:
    """Send SIGTERM or SIGINT at random moments: obeyed in time, with the right exit status, and resumable."""
    generator, whole = random.Random(options.seed), Undisturbed(folder, 60, 5)
    codes = dict(zip((signal.SIGTERM, signal.SIGINT), map(int, options.codes.split(",")), strict=True))
    for number in range(options.count):
        sent = (signal.SIGTERM, signal.SIGINT)[number % 2]
        workdir = folder / f"stopped_{number}"
        run = StudyDir(workdir).run("base", 0)
        process = start(workdir, whole.values)
        whole.moment(run, process, generator)
        process.send_signal(sent)
        began = time.monotonic()
        try:
            status = process.wait(options.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            yield [f"{sent.name} {number}: not obeyed within {options.seconds} seconds"]
            continue
        code = 128 - status if status < 0 else status  # as a shell says it
        wrong = [] if code == codes[sent] or (code == 0 and run.result is not None) else [f"exit status {code}"]
        wrong += ["a traceback"] if "Traceback" in printed(workdir) else []
        print(f"{sent.name} {number}: exit status {code} after {time.monotonic() - began:.1f} s", flush=True)
        finish(workdir, whole.values)
        wrong += differences(whole.run, run)
        yield [f"{sent.name} {number}: {sentence}" for sentence in wrong]
        shutil.rmtree(workdir)


def processes(folder: Path, options: argparse.Namespace) -> Scenario:
    """Let two and four processes work on one study: each run is trained once, and equals that of one process."""
    values, seeds = changes(12, 3), "--seeds=0:4"
    finish(folder / "one", values, seeds)
    for count in (2, 4):
        workdir = folder / f"{count}_processes"
        started = [start(workdir, values, seeds) for _ in range(count)]
        statuses = [process.wait(PATIENCE) for process in started]
        wrong = [f"exit status {status}" for status in statuses if status]
        for seed in range(4):
            run = StudyDir(workdir).run("base", seed)
            wrong += differences(StudyDir(folder / "one").run("base", seed), run)
            starts = run.log_file.read_text().count("from step 0 to ")
            wrong += [] if starts == 1 else [f"seed {seed} was started {starts} times"]
        yield [f"{count} processes: {sentence}" for sentence in wrong]


def long(folder: Path, options: argparse.Namespace) -> Scenario:
    """Train 5,000 steps, then 50 runs in this process: memory, threads and file handles stay flat."""
    done, measured = threading.Event(), []

    def measure() -> None:
        while not done.wait(0.5):
            measured.append(resources())

    thread = threading.Thread(target=measure)
    thread.start()
    with quiet():
        train.train_and_evaluate(run_config(options.steps, 500), folder / "long")
    done.set()
    thread.join()
    yield flat(measured, options.megabytes, f"{options.steps} steps")
    measured = []
    for seed in range(options.runs):
        with quiet():
            train.train_and_evaluate(run_config(12, 6, seed), folder / f"run_{seed}")
        measured.append(resources())
    yield flat(measured, options.megabytes, f"{options.runs} runs")


def resources() -> tuple[int, int, int]:
    """Return this process's memory in bytes, threads and open files, as Linux says them."""
    gc.collect()
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), len(os.listdir("/proc/self/fd"))


def flat(measured: list[tuple[int, int, int]], megabytes: float, unit: str) -> list[str]:
    """Return what has grown from the third quarter of the measurements to the last one."""
    for memory, threads, handles in measured[:: max(len(measured) // 10, 1)]:
        print(f"  {memory / 1e6:.1f} MB, {threads} threads, {handles} files")
    quarter = len(measured) // 4
    before, after = np.array(measured[-2 * quarter : -quarter]), np.array(measured[-quarter:])
    grown = (np.median(after[:, 0]) - np.median(before[:, 0])) / 1e6
    threads, handles = after[:, 1:].min(axis=0) - before[:, 1:].min(axis=0)  # some of them live for a moment
    print(f"last quarter of {unit}: {grown:+.1f} MB, {threads:+} threads, {handles:+} files")
    wrong = [f"{unit}: memory grows by {grown:.1f} MB"] if grown > megabytes else []
    return wrong + [f"{unit}: {name} grow" for name, more in (("threads", threads), ("files", handles)) if more > 0]


SCENARIOS: dict[str, tuple[Callable[[Path, argparse.Namespace], Scenario], int]] = {
    "kill": (kill, 200),
    "damage": (damage, 10**6),
    "files": (files, 10**6),
    "disk_full": (disk_full, 10),
    "signals": (signals, 40),
    "processes": (processes, 2),
    "long": (long, 2),
}


def append_row(file: Path, scenario: str, tried: int, passed: int) -> None:
    """Append what a scenario has shown to a table."""
    status = ["git", "status", "--porcelain", "--", ".", ":!experiments/reliability/results.csv"]
    changed = subprocess.run(status, cwd=REPOSITORY, capture_output=True, check=False).stdout
    commit = environment()["commit"][:12] + (" and changes" if changed else "")
    command = shlex.join(["python", "experiments/reliability/soak.py", *sys.argv[1:]])
    new = not file.exists()
    with file.open("a", newline="") as table:
        rows = csv.writer(table, lineterminator="\n")
        if new:
            rows.writerow(["scenario", "tried", "passed", "command", "commit"])
        rows.writerow([scenario, tried, passed, command, commit])


def main() -> None:
    """Run the scenario that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--count", type=int, help="tries (kill: kills); default: those of results.csv, or all cases")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--results", type=Path, default=HERE / "results.csv", help="table to append to")
    parser.add_argument("--codes", default="143,130", help="signals: exit statuses after SIGTERM and SIGINT")
    parser.add_argument("--seconds", type=float, default=60, help="signals: time to obey")
    parser.add_argument("--steps", type=int, default=5000, help="long: steps of the long run")
    parser.add_argument("--runs", type=int, default=50, help="long: runs in one process")
    parser.add_argument("--megabytes", type=float, default=50, help="long: growth of memory that counts as none")
    options = parser.parse_args()
    scenario, count = SCENARIOS[options.scenario]
    options.count = count if options.count is None else options.count
    parallel.initialize(2)
    tried = passed = 0
    with tempfile.TemporaryDirectory(prefix="alexnet_jax_soak_") as folder:
        for wrong in scenario(Path(folder), options):
            tried, passed = tried + 1, passed + (not wrong)
            print("".join(f"FAILED: {sentence}\n" for sentence in wrong), end="", flush=True)
    append_row(options.results, options.scenario, tried, passed)
    print(f"{options.scenario}: {passed} of {tried} passed")
    sys.exit(passed < tried)


if __name__ == "__main__":
    main()
