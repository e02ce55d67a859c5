"""Run a list of studies within a given time.

    python experiments/gpu/study_queue.py --minutes=12 --archive=queue.tar SPEC ...

A SPEC is the rest of a command line of `python -m alexnet_jax.main`, in quotes:

    "--config=configs/ablation_lrn.py:cifar10 --seeds=0:10" "--config=configs/ablation_dropout.py:cifar10 --seeds=0:10"

With --processes several processes share the runs of each study, because one run of a small network does not fill a GPU.

Every minute, and at the end, everything is packed into the archive and, beyond 16 MiB, into further ones
(queue.1.tar, ...). Before the end the study that runs is asked to stop, and saves a checkpoint. The same command, with
these archives in the same place, resumes, in any folder and on any machine. Archives hold no TensorBoard files, and
checkpoints only of unfinished runs.
"""

import argparse
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PART_BYTES = 15 * 2**20  # of one archive: some machines send back files of at most 16 MiB, and eight of them
PARTS = 8
PACK_SECONDS = 60.0  # a machine that is lost loses no more


def study_name(spec: str) -> str:
    """Return the folder of a study: its --workdir, or the names of its config and scale."""
    arguments = dict(argument.removeprefix("--").partition("=")[::2] for argument in shlex.split(spec))
    if "config" not in arguments:
        raise ValueError(f"SPEC={spec!r}: must have --config=FILE[:SCALE]")
    file, _, scale = arguments["config"].partition(":")
    name = arguments.get("workdir") or "_".join(filter(None, (Path(file).stem, scale)))
    if Path(name).name != name:
        raise ValueError(f"--workdir={name}: must be a plain name; --folder says where it is")
    return name


def part_path(archive: Path, number: int) -> Path:
    """Return the path of the archive with a number, counted from 0: queue.tar, queue.1.tar, and so on."""
    return archive.with_suffix(f".{number}{archive.suffix}") if number else archive


def done_file(archive: Path, folder: Path) -> Path:
    """Return the file, beside the studies, that lists the finished specs of an archive."""
    return folder / f"{archive.stem}.json"


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the parts of an archive that exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(PARTS):
        if (path := part_path(archive, number)).exists():
            with tarfile.open(path) as tar:
                tar.extractall(folder, filter="data")
            print(f"unpacked {path}", flush=True)


def pack(archive: Path, folder: Path, names: list[str]) -> None:
    """Pack the studies into as few archives as their sizes allow, replacing those that exist.

    What has no room is named: files larger than an archive, and what more than `PARTS` archives would need.
    """
    parts: list[list[Path]] = [[]]
    sizes = [0]
    finished = [path] if (path := done_file(archive, folder)).exists() else []
    for files in [finished, *(each for name in names for each in units(folder / name))]:
        costs = [1024 + file.stat().st_size for file in files]  # a header, and padding to blocks of 512 bytes
        # A checkpoint is packed whole or not at all.
        trial = sizes.copy()
        placed: list[int] = []
        for size in costs:
            if trial[-1] + size > PART_BYTES:
                trial.append(0)
            trial[-1] += size
            placed.append(len(trial) - 1)
        if max(costs, default=0) > PART_BYTES or len(trial) > PARTS:
            print(f"not packed, no room: {files[0].parent}", flush=True)
            continue
        parts += [[] for _ in range(len(trial) - len(parts))]
        sizes = trial
        for file, number in zip(files, placed, strict=True):
            parts[number].append(file)
    archive.parent.mkdir(parents=True, exist_ok=True)
    for number in range(PARTS):
        path = part_path(archive, number)
        if number < len(parts):
            incomplete = path.with_name(f".{path.name}")
            with tarfile.open(incomplete, "w") as tar:
                for file in parts[number]:
                    tar.add(file, file.relative_to(folder))
            incomplete.replace(path)
            print(f"packed {path}: {path.stat().st_size:,} bytes", flush=True)
        else:
            path.unlink(missing_ok=True)


def pack_meanwhile(archive: Path, folder: Path, names: list[str]) -> None:
    """Pack studies that are running; keep the archives of before where a file changes meanwhile."""
    try:
        pack(archive, folder, names)
    except (OSError, tarfile.TarError) as error:  # a checkpoint was removed, or a file cut
        print(f"not packed this time: {error}", flush=True)


def units(study: Path) -> Iterator[list[Path]]:
    """Yield what is kept of a study, as files that belong together: first all results, then the last checkpoints."""
    checkpoints = []
    for directory, folders, files in os.walk(study):
        here = Path(directory)
        if "checkpoints" in folders:
            folders.remove("checkpoints")
            if not (here / "result.json").exists():
                checkpoints.append(here / "checkpoints")
        for file in sorted(files):
            if not file.startswith((".", "events.out.tfevents")):
                yield [here / file]
    for folder in checkpoints:
        steps = [path for path in folder.iterdir() if path.name.isdigit()]
        if steps:
            last = max(steps, key=lambda path: int(path.name))
            yield sorted(path for path in last.rglob("*") if path.is_file())


def run_study(
    arguments: list[str],
    deadline: float,
    grace: float,
    processes: int = 1,
    meanwhile: Callable[[], None] = lambda: None,
) -> int | None:
    """Run a study; return the exit status of a process that failed, or 0; None if it was stopped at the deadline.

    Args:
      meanwhile: called every `PACK_SECONDS`.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    # Otherwise each process would take three quarters of the card's memory, which other queues may need, too.
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    command = [sys.executable, "-m", "alexnet_jax.main", *arguments]
    running = [subprocess.Popen(command, cwd=REPOSITORY, env=environment) for _ in range(processes)]
    try:
        while None in (statuses := [process.poll() for process in running]):
            unfinished = running[statuses.index(None)]
            left = deadline - time.monotonic()
            try:
                unfinished.wait(max(0.0, min(left, PACK_SECONDS)))
            except subprocess.TimeoutExpired:
                if left <= PACK_SECONDS:
                    raise
                meanwhile()
        return next(filter(None, statuses), 0)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in running:
            process.terminate()  # the run that is in progress saves a checkpoint
        stopped = time.monotonic()
        for process in running:
            try:
                process.wait(max(0.0, stopped + grace - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return None


def main() -> None:
    """Run the studies of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", metavar="SPEC", nargs="+")
    parser.add_argument("--minutes", type=float, required=True, help="time for everything, packing included")
    parser.add_argument(
        "--grace", type=float, default=30.0, help="seconds of them to stop and to pack in (default: 30)"
    )
    parser.add_argument("--processes", type=int, default=1, help="that share the runs of a study (default: 1)")
    parser.add_argument("--archive", type=Path, required=True, help="the archive to resume from and to write")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="folder of the studies (default: runs)")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes - options.grace
    try:
        names = {study_name(spec): spec for spec in options.specs}
    except ValueError as error:
        sys.exit(f"study_queue.py: {error}")
    if len(names) < len(options.specs):
        sys.exit("study_queue.py: studies of the same config must have different names: add --workdir=NAME to a SPEC")
    # Somebody else's limit counts, too: what was done until then is packed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = options.folder.resolve()
    unpack(options.archive, folder)
    done_path = done_file(options.archive, folder)
    done = json.loads(done_path.read_text()) if done_path.exists() else {}
    studies = (options.archive, folder, list(names))
    try:
        for name, spec in names.items():
            if done.get(name) == spec:
                print(f"{name}: finished before", flush=True)
                continue
            if time.monotonic() >= deadline:
                print(f"{name}: no time left; run the command again to resume", flush=True)
                break
            arguments = [argument for argument in shlex.split(spec) if not argument.startswith("--workdir=")]
            command = [*arguments, f"--workdir={folder / name}"]
            keep = functools.partial(pack_meanwhile, *studies)
            status = run_study(command, deadline, options.grace, options.processes, keep)
            if status is None:
                print(f"{name}: stopped; run the command again to resume", flush=True)
                break
            if status:
                print(f"{name}: failed with exit status {status}; run the command again to try again", flush=True)
            else:
                done[name] = spec
                done_path.write_text(json.dumps(done, indent=2))
    finally:
        pack(*studies)
    if any(done.get(name) != spec for name, spec in names.items()):
        sys.exit(1)


if __name__ == "__main__":
    main()
