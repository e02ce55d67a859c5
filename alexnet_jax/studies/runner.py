"""Train and evaluate every run of a study, then write its report.

python -m alexnet_jax.main --config=configs/ablation_lrn.py[:SCALE] [--config.KEY=VALUE ...]

Every arm runs with every seed, each in a folder of its own; several machines may share the study's folder. Re-run the
command to resume: finished runs are skipped, interrupted runs continue. The processes of a job (`launch`,
`--cluster`) train each run together, one run after the other.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict
from rich.table import Table

from alexnet_jax import parallel, processes, stop, terminal, train, weights
from alexnet_jax.config import as_json, flatten, from_json, run_config
from alexnet_jax.data import datasets
from alexnet_jax.metrics import write_layout
from alexnet_jax.run_dir import DamagedFileError, RunDir, StudyDir, write_json
from alexnet_jax.studies import analysis, report, submit
from alexnet_jax.studies.analysis import CENSORED, time_to_target
from alexnet_jax.tools import summary

POLL_SECONDS = 5.0  # between looks at runs of other processes
CRASHES = 3  # after which a run is left to the end of the study
TUNING_METRICS = ("validation/top1_error", "epochs_to_25", "train_eval_epochs_to_25")


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    config: ConfigDict
    folder: RunDir
    labels: dict[str, Any]  # in TensorBoard: arm, seed, and the fields in which the arms differ
    value: Any = None  # a tuning run's candidate value of the tuned field; None for the runs that are compared

    @property
    def name(self) -> str:
        """The run as messages name it: its folder within that of the study."""
        return "/".join(self.folder.path.parts[-2 if self.value is None else -3 :])


def plan(study: ConfigDict, workdir: Path, only: Sequence[str] = (), chosen: dict[str, Any] | None = None) -> list[Run]:
    """Return the runs of a study, seed by seed, so that arms can be compared before the last run is done.

    Args:
      only: arms; empty means all.
      chosen: by arm, the chosen value of the tuned field.
    """
    if RunDir(workdir).config_file.exists():
        raise ValueError(
            f"--workdir={workdir}: must be a study's folder, and is a run; give another one, and "
            f"--init_from={workdir} to start from its weights"
        )
    if not study.arms or not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"arms={list(study.arms)}, seeds={study.seeds}: must be at least one each, without repeats")
    for arm in study.arms:
        if not arm or set(arm) & set("/\\,"):
            raise ValueError(f"arm {arm!r}: must be the name of a folder, without / and commas; rename it")
    return [
        _planned(study, arm, seed, StudyDir(workdir).run(arm, seed), _changes(study, arm, chosen))
        for seed in study.seeds
        for arm in _selected(study, only)
    ]


def trials(study: ConfigDict, workdir: Path, only: Sequence[str] = ()) -> list[Run]:
    """Return the trials, in which each arm tries every value of the tuned field; none if no field is tuned.

    They use seeds of their own, and hold out validation images if they are tuned by a validation error, so that nothing
    is chosen on what the study reports.
    """
    tuning = study.tuning
    if not tuning.key:
        return []
    if unknown := set(tuning.choices_by_arm) - set(study.arms):
        raise ValueError(
            f"tuning.choices_by_arm={sorted(unknown)}: must be among the study's arms {', '.join(study.arms)}"
        )
    if not tuning.choices or not tuning.seeds or set(tuning.seeds) & set(study.seeds):
        raise ValueError(
            f"tuning.choices={tuning.choices}, tuning.seeds={tuning.seeds}: must be values of {tuning.key}, and seeds "
            f"other than the study's {study.seeds}"
        )
    if tuning.metric not in TUNING_METRICS:
        raise ValueError(f"tuning.metric={tuning.metric!r}: must be one of {', '.join(TUNING_METRICS)}")
    split = study.data.validation_split or ("" if tuning.metric in CENSORED else "1/20")
    common = {"data.validation_split": split, "train.epochs": tuning.epochs or study.train.epochs}
    folder, selected = StudyDir(workdir), _selected(study, only)
    return [
        _planned(study, arm, seed, folder.trial(arm, tuning.key, value, seed), common | {tuning.key: value}, value)
        for seed in tuning.seeds
        for values in itertools.zip_longest(*(_grid(study, arm) for arm in selected))
        for arm, value in zip(selected, values, strict=True)
        if value is not None
    ]


def _grid(study: ConfigDict, arm: str) -> tuple[Any, ...]:
    """Return the values of the tuned field that an arm tries."""
    return study.tuning.choices_by_arm.get(arm, study.tuning.choices)


def chosen_values(study: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Return what each arm chose that has finished its trials: the value with the lowest mean of `tuning.metric`.

    By arm: `chosen`, the value, or None if none has a score; `scores`, the mean metric of each value (None where it was
    never reached or a run failed), and `at_edge`, whether the chosen value is the smallest or largest number: the best
    one may lie outside.
    """
    chosen: dict[str, Any] = {}
    for arm in study.arms:
        runs = trials(study, workdir, [arm])
        if not runs or any(run.folder.status not in ("finished", "failed") for run in runs):
            continue
        scores = {
            value: float(np.mean([_score(run.folder, study.tuning.metric) for run in runs if run.value == value]))
            for value in _grid(study, arm)
        }
        best = min(scores, key=lambda value: scores[value])
        is_found = math.isfinite(scores[best])
        is_number = isinstance(best, int | float) and not isinstance(best, bool)
        chosen[arm] = {
            "chosen": best if is_found else None,
            "scores": {str(value): None if math.isinf(score) else score for value, score in scores.items()},
            "at_edge": is_found and is_number and best in (min(scores), max(scores)),
        }
    return chosen


def _found(choices: dict[str, Any]) -> dict[str, Any]:
    """Return the chosen value of each arm that has one, of what `chosen_values` returned."""
    return {arm: choice["chosen"] for arm, choice in choices.items() if choice["chosen"] is not None}


def _score(folder: RunDir, metric: str) -> float:
    """Return a tuning run's metric; infinity if it failed or never reached the goal."""
    if folder.result is None:
        return math.inf
    if metric in CENSORED:
        return time_to_target(folder.metrics()).get(metric, math.inf)
    return folder.result[metric]


def run_study(study: ConfigDict, workdir: Path | str, only: Sequence[str] = (), *, extend: bool = False) -> list[Run]:
    """Run everything that is neither finished nor being run by another process, then write the report.

    A failed run does not stop the others: failed runs are returned, and their errors are in failure.json.

    Args:
      only: arms; empty means all.
      extend: whether to train finished runs of fewer epochs further, with the study's learning rates.

    Raises:
      ValueError: some run cannot run as configured; none was started.
      stop.Stopped: a signal asked to stop; the command resumes when it is run again.
    """
    with stop.requests(processes.agreement()) as request:
        return _run_study(study, Path(workdir), only, request, extend)


def _run_study(study: ConfigDict, workdir: Path, only: Sequence[str], request: stop.Request, extend: bool) -> list[Run]:
    runs, tuning_runs, sizes = _check(study, workdir, only, extend)
    _describe(study, workdir, sizes)
    write_layout(workdir)
    failed = _run_all(tuning_runs, request, extend, wait=True)
    if tuning_runs:
        chosen = _found(chosen_values(study, workdir))
        runs = [run for run in plan(study, workdir, only, chosen) if run.arm in chosen]
        _check_folders(runs, extend)
        _describe(study, workdir, sizes)
    failed += _run_all(runs, request, extend)
    report.write(workdir)
    return failed


def _check(
    study: ConfigDict, workdir: Path, only: Sequence[str], extend: bool
) -> tuple[list[Run], list[Run], dict[str, Any]]:
    """Check that all runs can run, before anything is written; return them, the trials and the sizes of the arms.

    Raises:
      ValueError: some run cannot run as configured.
    """
    _check_writable(workdir)
    runs, tuning_runs = plan(study, workdir, only), trials(study, workdir, only)
    if extend and tuning_runs and study.tuning.epochs is None:
        raise ValueError(
            "--extend: must come with --config.tuning.epochs=N, the epochs of the trials, which are not extended"
        )
    for claim in study.claims:
        analysis.check_claim(claim, study.arms)
    for run in tuning_runs:
        train.open_run(run.config)
    sizes = {}
    for run in plan(study, workdir)[: len(study.arms)]:
        dataset = train.open_run(run.config).dataset
        sizes[run.arm] = summary.sizes(run.config, dataset.classes, dataset.channels)
    _check_folders(tuning_runs or runs, extend)
    _check_folders(_existing(study, workdir), extend)
    return runs, tuning_runs, sizes


def _existing(study: ConfigDict, workdir: Path) -> list[Run]:
    """Return the runs that the folder has, of any arm and seed: the study compares them with the selected ones."""
    existing, key = [], study.tuning.key
    with contextlib.suppress(DamagedFileError):  # study.json is written again; a run with a damaged config fails later
        folders = StudyDir(workdir).runs() if StudyDir(workdir).study_file.exists() else []
        for arm, seed, folder in folders:
            config = folder.undamaged(RunDir.read_config)
            if config is not None and arm in study.arms:
                tuned = {arm: flatten(config)[key]} if key else None
                existing.append(_planned(study, arm, seed, folder, _changes(study, arm, tuned)))
    return existing


def submit_study(
    study: ConfigDict, workdir: Path, only: Sequence[str] = (), *, extend: bool, arguments: argparse.Namespace
) -> None:
    """Submit a job for each run that is not finished; or for each arm of a study that tunes, with all its runs.

    Raises:
      ValueError: some run cannot run as configured, or the cluster refuses; no job was submitted.
    """
    runs, tuning_runs, _ = _check(study, workdir, only, extend)
    shared, jobs = submit.job_arguments(arguments.argv), {}
    for run in runs:
        if extend or run.folder.status != "finished":
            name, seeds = (run.arm, study.seeds) if tuning_runs else (run.name, [run.seed])
            jobs[name] = [*shared, f"--only={run.arm}", f"--seeds={','.join(map(str, seeds))}"]
    if jobs:
        submit.submit(jobs, workdir / "jobs", arguments.submit, arguments.submit_options or "{}")
    print(f"{len(jobs)} job(s) submitted; each one writes {StudyDir(workdir).report_file} at its end")


def _check_writable(workdir: Path) -> None:
    """Check that a study can be written to a folder; raise ValueError if it is a file, or nothing can be written."""
    existing = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written" if existing.is_dir() else "is a file"
        raise ValueError(
            f"--workdir={workdir}: must be a folder that can be written, and {existing} {what}; name another"
        )


def print_plan(study: ConfigDict, workdir: Path, only: Sequence[str] = ()) -> None:
    """Print every run with its status and size; write nothing."""
    runs = trials(study, workdir, only) + plan(study, workdir, only)
    table = Table(title=f"{len(runs)} runs in {workdir}", title_justify="left")
    for column in ("run", "status", "parameters", "multiply-adds", "steps"):
        table.add_column(column, justify="left" if column in ("run", "status") else "right")
    for run in runs:
        setup = train.open_run(run.config)
        weights.check_initial(run.folder, run.config, setup.dataset)
        size = summary.sizes(run.config, setup.dataset.classes, setup.dataset.channels)
        numbers = (f"{size['parameters']:,}", f"{size['multiply_adds']:,}", f"{setup.steps:,}")
        table.add_row(run.name, run.folder.status, *numbers)
    terminal.console(width=100).print(table)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse seeds: "0:5" means 0 to 4, "0,2,4" these three."""
    if span := re.fullmatch(r"(\d+):(\d+)", text):
        return tuple(range(int(span[1]), int(span[2])))
    if re.fullmatch(r"\d+(,\d+)*", text):
        return tuple(map(int, text.split(",")))
    raise ValueError(f"--seeds={text}: must be a range as 0:5, which is 0 to 4, or a list as 0,2,4")


def _selected(study: ConfigDict, only: Sequence[str]) -> list[str]:
    """Return the arms to run, in the study's order."""
    if unknown := set(only) - set(study.arms):
        raise ValueError(f"--only={','.join(sorted(unknown))}: must be among the arms {', '.join(study.arms)}")
    return [arm for arm in study.arms if arm in only or not only]


def _planned(study: ConfigDict, arm: str, seed: int, folder: RunDir, changes: dict[str, Any], value: Any = None) -> Run:
    """Return a run of an arm with further changes."""
    config = run_config(study, arm, seed, changes)
    values = flatten(config)
    differing = {key for name in study.arms for key in _changes(study, name)} | set(changes)
    labels = {"arm": arm, "seed": seed, **{key: values[key] for key in sorted(differing)}}
    return Run(arm, seed, config, folder, labels, value)


def _changes(study: ConfigDict, arm: str, chosen: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what an arm changes, by dotted key, including its chosen value of the tuned field."""
    tuned = {study.tuning.key: chosen[arm]} if chosen and arm in chosen else {}
    return flatten(study.arms[arm]) | tuned


def _check_folders(runs: list[Run], extend: bool) -> None:
    """Check that no run's folder holds a run of another config, on other images or from other weights."""
    load = functools.cache(datasets.load)
    for run in runs:
        with contextlib.suppress(DamagedFileError):  # that run fails, when its turn comes, and no other
            run.folder.check(as_json(run.config), extend=extend)
            dataset = load(FrozenConfigDict(run.config.data))
            if run.folder.dataset_file.exists():
                run.folder.check_dataset(dataset.metadata(run.config.data))
            weights.check_initial(run.folder, run.config, dataset)


def _describe(study: ConfigDict, workdir: Path, sizes: dict[str, Any]) -> None:
    """Write study.json, which tells the report about the study."""
    folder = StudyDir(workdir)
    folder.path.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.lock_file):  # a process that read earlier must not write later
        write_json(folder.study_file, _description(study, workdir, sizes))


def _description(study: ConfigDict, workdir: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of study.json."""
    tuned = chosen_values(study, workdir)
    chosen = _found(tuned)
    return {
        "name": workdir.name,
        "reported": f"{study.data.name}, {study.data.eval_split}",
        "arms": {arm: _changes(study, arm, chosen) for arm in study.arms},
        "sizes": sizes,
        "seeds": list(study.seeds),
        "claims": list(study.claims),
        "init_from": study.train.init_from,
        "new_head": study.train.new_head,
        "tuning": {"key": study.tuning.key, "metric": study.tuning.metric, "arms": tuned},
    }


def _run_all(runs: list[Run], request: stop.Request, extend: bool, *, wait: bool = False) -> list[Run]:
    """Run what is not finished, and return what failed; with `wait`, when runs of other processes have ended, too."""
    failed, failed_before = [], {run.name for run in runs if run.folder.failure_file.exists()}
    crashes = {run.name: run.folder.crashes for run in runs}
    for name, count in crashes.items():
        if count >= CRASHES:
            print(f"{name} has crashed {count} times: it is left to the end", flush=True)
    runs = sorted(runs, key=lambda run: crashes[run.name] >= CRASHES)
    while runs:
        busy = []
        for run in runs:
            request.obey(f"stopped before {run.name}")
            folder = run.folder.path
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                # The operating system releases the lock of a process that ends, however it ends.
                with filelock.FileLock(folder.parent / f".{folder.name}.lock", timeout=0):
                    # What another process tried meanwhile would fail again.
                    has_failed = run.folder.failure_file.exists() and run.name not in failed_before
                    if has_failed or not _run_or_record_failure(run, extend):
                        failed.append(run)
            except filelock.Timeout:
                busy.append(run)
        if busy:
            print(f"being run by another process: {'; '.join(run.name for run in busy)}", flush=True)
        runs = busy if wait else []
        if runs:
            request.wait(POLL_SECONDS)
    return failed


def _run_or_record_failure(run: Run, extend: bool) -> bool:
    """Train and evaluate a run; on failure write failure.json and return False."""
    run.folder.failure_file.unlink(missing_ok=True)
    try:
        if extend:
            run.folder.extend(as_json(run.config))
        if run.folder.result is None:
            write_json(run.folder.starts_file, {"starts": run.folder.crashes + 1})
        processes.send({"config": as_json(run.config), "folder": str(run.folder.path), "labels": run.labels})
        train.train_and_evaluate(run.config, run.folder.path, run.labels)
    except Exception as error:  # whatever it is, the other runs continue
        is_common = processes.is_common(error)
        failure = {"error": str(error), "traceback": traceback.format_exc()}
        print(f"{run.name} failed: {error}", flush=True)
        try:
            write_json(run.folder.failure_file, failure)
        except OSError as unwritten:
            print(f"{run.name}: {unwritten}", flush=True)
        if not is_common:
            processes.leave()
        return False
    finally:
        run.folder.starts_file.unlink(missing_ok=True)
    return True


def follow() -> int:
    """Train, in another process than process 0, the runs that it orders; return the exit status that it orders."""
    with stop.requests(processes.agreement()), open(os.devnull, "w") as nowhere:
        while "exit" not in (order := processes.receive()):
            try:
                with contextlib.redirect_stdout(nowhere):  # process 0 prints the same
                    train.train_and_evaluate(from_json(order["config"]), order["folder"], order["labels"])
            except Exception as error:
                if not processes.is_common(error):
                    traceback.print_exc()
                    processes.leave()
    return order["exit"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb run."""
    parser.add_argument("--config", required=True, help="the study's file, and its scale after a colon")
    parser.add_argument("--workdir", type=Path, help="the study's folder; default: runs/FILE_SCALE, without .py")
    parser.add_argument(
        "--init_from", metavar="RUN|FILE", help="start every run from these weights, not initial values"
    )
    parser.add_argument("--new_head", action="store_true", help="with --init_from: start the last layer anew")
    parser.add_argument(
        "--extend", action="store_true", help="train finished runs further, with more --config.train.epochs"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the runs and their sizes, train nothing")
    parser.add_argument("--only", default="", help="arms to run, separated by commas; default: all")
    parser.add_argument("--seeds", help="seeds to run, as 0:5 or 0,2,4; default: the study's")
    parser.add_argument(
        "--submit", choices=submit.CLUSTERS, help="submit jobs to Slurm, or start them all here, and exit"
    )
    parser.add_argument(
        "--submit_options",
        metavar="JSON",
        help='submitit\'s, such as \'{"slurm_partition": "gpu", "gpus_per_node": 1}\'',
    )
    processes.add_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    """Run a study; raise ValueError, before any run is started, if one cannot run as configured."""
    study = arguments.config
    workdir = arguments.workdir or Path("runs", arguments.config_name)
    if arguments.seeds is not None:
        study.seeds = parse_seeds(arguments.seeds)
    if arguments.init_from is not None:
        study.train.init_from = str(Path(arguments.init_from).expanduser().resolve())
    if arguments.new_head:
        if not study.train.init_from:
            raise ValueError("--new_head: must come with --init_from; without it, all layers start anew")
        study.train.new_head = True
    only = [arm for arm in arguments.only.split(",") if arm]
    if arguments.submit_options is not None and not arguments.submit:
        raise ValueError("--submit_options: must come with --submit; without it, the runs are trained here")
    if arguments.submit and arguments.coordinator:
        raise ValueError(f"--submit={arguments.submit}: must come without --coordinator; give --cluster for the jobs")
    if not arguments.submit:  # a job joins its own processes
        processes.initialize(arguments)
    parallel.initialize(study.model.towers)
    if not processes.is_first():
        sys.exit(follow())
    with processes.leading():
        if arguments.dry_run:
            print_plan(study, workdir, only)
        elif arguments.submit:
            submit_study(study, workdir, only, extend=arguments.extend, arguments=arguments)
        elif failed := run_study(study, workdir, only, extend=arguments.extend):
            names = "; ".join(run.name for run in failed)
            sys.exit(f"alexnet-jax run: {len(failed)} run(s) failed: {names}; re-run the command to try them again")
