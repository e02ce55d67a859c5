"""A study: every arm with every seed, each a run in a folder of its own. Several machines may share one folder."""

import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
from ml_collections import ConfigDict

from alexnet_jax import logs, records, summary, train
from alexnet_jax.config import as_json, flatten, run_config

POLL = 5.0  # seconds between looks at what other machines have done


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
      config: of the run.
      workdir: the run's folder.
      labels: what it is called by in TensorBoard: arm, seed, and the fields in which the arms differ.
      value: that is tried for the tuned field; None for the runs that are compared.
    """

    arm: str
    seed: int
    config: ConfigDict
    workdir: Path
    labels: dict[str, Any]
    value: Any = None

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.arm}, {f'seed {self.seed}' if self.value is None else f'trying {self.value}'}"


def plan(
    config: ConfigDict, workdir: Path, only: Sequence[str] = (), chosen: dict[str, Any] | None = None
) -> list[Run]:
    """The runs of a study, seed by seed, so that the arms can be compared before the last one is done.

    Args:
      only: arms; none of them means all.
      chosen: by arm, the value of the tuned field.

    Raises:
      ValueError: there is no arm or no seed, a seed stands twice, or an arm changes what does not exist.
    """
    if not config.arms or not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"a study needs arms and different seeds, and has {list(config.arms)} and {config.seeds}")
    return [
        _planned(config, arm, seed, workdir / arm / f"seed_{seed}", _changes(config, arm, chosen))
        for seed in config.seeds
        for arm in _among(config, only)
    ]


def candidates(config: ConfigDict, workdir: Path, only: Sequence[str] = ()) -> list[Run]:
    """The runs by which each arm chooses its value of the tuned field; none, where no field is tuned.

    They keep images apart to decide on, and so do not train on them; their seed is none of the study's.

    Raises:
      ValueError: there is no such field, nothing to choose among, or the seed is one of the study's.
    """
    tuning = config.tuning
    if not tuning.key:
        return []
    if not tuning.choices or tuning.seed in config.seeds:
        raise ValueError(
            f"tuning.choices={tuning.choices}, tuning.seed={tuning.seed}: must be values for {tuning.key} to choose "
            f"among, and a seed that is none of the study's {config.seeds}"
        )
    field = tuning.key.rpartition(".")[2]
    other = {"eval.validation": True, "train.epochs": tuning.epochs or config.train.epochs}
    return [
        _planned(config, arm, tuning.seed, workdir / arm / f"{field}_{value}", other | {tuning.key: value}, value)
        for value in tuning.choices
        for arm in _among(config, only)
    ]


def choices(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """What each arm that has tried all its values has chosen: the lowest error on validation images.

    Returns:
      By arm, ``chosen``, the value, and ``errors``, of each value (fractions of 1; None where the run failed). Of
      equal errors the lower loss decides.
    """
    found: dict[str, Any] = {}
    for arm in config.arms:
        tried = candidates(config, workdir, [arm])
        results = {run.value: records.result(run.workdir) for run in tried}
        failed = [run for run in tried if (run.workdir / records.FAILURE).exists()]
        good = {value: result for value, result in results.items() if result}
        if good and len(good) + len(failed) == len(tried):
            best = min(good, key=lambda value: [good[value][f"validation/{name}"] for name in ("top1_error", "loss")])
            errors = {str(value): result and result["validation/top1_error"] for value, result in results.items()}
            found[arm] = {"chosen": best, "errors": errors}
    return found


def run_study(config: ConfigDict, workdir: Path | str, only: Sequence[str] = ()) -> list[Run]:
    """Runs what is not finished and not being run elsewhere, then writes the report.

    Args:
      config: of a file in ``configs/``.
      workdir: the study's folder.
      only: arms to run; none of them means all.

    Returns:
      The runs that failed. What failed them is in their ``failure.json``; it did not keep others from running.

    Raises:
      ValueError: some run cannot run as configured; none was started.
    """
    workdir = Path(workdir)
    runs, tries = plan(config, workdir, only), candidates(config, workdir, only)
    sizes = {}
    for run in plan(config, workdir)[: len(config.arms)] + tries:
        dataset, _ = train.prepare(run.config)
        sizes[run.arm] = summary.sizes(run.config, dataset.classes, dataset.channels)
    _check_folders(tries or runs)
    _describe(config, workdir, sizes)
    logs.write_layout(workdir)
    failed = _run_all(tries, wait=True)
    if tries:
        chosen = {arm: found["chosen"] for arm, found in choices(config, workdir).items()}
        runs = [run for run in plan(config, workdir, only, chosen) if run.arm in chosen]
        _check_folders(runs)
        _describe(config, workdir, sizes)
    failed += _run_all(runs)
    from alexnet_jax import report  # what it draws and calculates with would keep the first step waiting

    report.write(workdir)
    return failed


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds as a flag has them: "0:5" is 0 to 4, "0,2,4" just these.

    Raises:
      ValueError: it is neither.
    """
    if span := re.fullmatch(r"(\d+):(\d+)", text):
        return tuple(range(int(span[1]), int(span[2])))
    if re.fullmatch(r"\d+(,\d+)*", text):
        return tuple(map(int, text.split(",")))
    raise ValueError(f"--seeds={text}: must be a range as 0:5, which is 0 to 4, or a list as 0,2,4")


def _among(config: ConfigDict, only: Sequence[str]) -> list[str]:
    if unknown := set(only) - set(config.arms):
        raise ValueError(f"--only={','.join(sorted(unknown))}: must be among the arms {', '.join(config.arms)}")
    return [arm for arm in config.arms if arm in only or not only]


def _planned(config: ConfigDict, arm: str, seed: int, workdir: Path, changes: dict[str, Any], value: Any = None) -> Run:
    of_run = run_config(config, arm, seed, changes)
    values = flatten(of_run)
    differing = {key for name in config.arms for key in _changes(config, name)} | set(changes)
    return Run(
        arm, seed, of_run, workdir, {"arm": arm, "seed": seed, **{k: values[k] for k in sorted(differing)}}, value
    )


def _changes(config: ConfigDict, arm: str, chosen: dict[str, Any] | None = None) -> dict[str, Any]:
    """What an arm changes; dotted keys."""
    tuned = {config.tuning.key: chosen[arm]} if chosen and arm in chosen else {}
    return flatten(config.arms[arm]) | tuned


def _check_folders(runs: list[Run]) -> None:
    for run in runs:
        records.check_config(run.workdir, as_json(run.config))


def _describe(config: ConfigDict, workdir: Path, sizes: dict[str, Any]) -> None:
    """Writes ``study.json``: what the report needs to know of a study besides its runs."""
    found = choices(config, workdir)
    chosen = {arm: choice["chosen"] for arm, choice in found.items()}
    records.write_json(
        workdir / "study.json",
        {
            "name": workdir.name,
            "reported": f"{config.data.name}, {config.data.eval_split}",
            "arms": {arm: _changes(config, arm, chosen) for arm in config.arms},
            "sizes": sizes,
            "seeds": list(config.seeds),
            "claims": list(config.claims),
            "tuning": {"key": config.tuning.key, "arms": found},
        },
    )


def _run_all(runs: list[Run], *, wait: bool = False) -> list[Run]:
    """Runs what is not finished, and returns what failed.

    Args:
      wait: whether to return only when what others are running has ended, too.
    """
    failed = []
    while runs:
        taken = []
        for run in runs:
            try:
                run.workdir.parent.mkdir(parents=True, exist_ok=True)
                # The system takes a lock from a process that ends, however it ends.
                with filelock.FileLock(run.workdir.parent / f".{run.workdir.name}.lock", timeout=0):
                    if not _succeeds(run):
                        failed.append(run)
            except filelock.Timeout:
                taken.append(run)
        if taken:
            print(f"being run elsewhere: {'; '.join(run.name for run in taken)}", flush=True)
        runs = taken if wait else []
        if runs:
            time.sleep(POLL)
    return failed


def _succeeds(run: Run) -> bool:
    """Trains and evaluates, and keeps what went wrong, if something does."""
    failure = run.workdir / records.FAILURE
    failure.unlink(missing_ok=True)
    try:
        train.train_and_evaluate(run.config, run.workdir, run.labels)
    except Exception as error:  # of whatever kind: the other runs are to go on
        records.write_json(failure, {"error": str(error), "traceback": traceback.format_exc()})
        print(f"{run.name} failed: {error}", flush=True)
        return False
    return True
