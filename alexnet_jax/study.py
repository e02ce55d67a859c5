"""A study: every arm with every seed, each a run in a folder of its own."""

from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from alexnet_jax import records, report, train
from alexnet_jax.config import as_json, flatten, run_config


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    config: ConfigDict
    workdir: Path


def plan(config: ConfigDict, workdir: Path) -> list[Run]:
    """The runs of a study, seed by seed, so that the arms can be compared before the last one is done.

    Raises:
      ValueError: there is no arm or no seed, a seed stands twice, or an arm changes what does not exist.
    """
    if not config.arms or not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"a study needs arms and different seeds, and has {list(config.arms)} and {config.seeds}")
    return [
        Run(arm, seed, run_config(config, arm, seed), workdir / arm / f"seed_{seed}")
        for seed in config.seeds
        for arm in config.arms
    ]


def run_study(config: ConfigDict, workdir: Path | str) -> None:
    """Runs what is not finished yet, then writes the report.

    Args:
      config: of a file in ``configs/``.
      workdir: the study's folder.

    Raises:
      ValueError: some run cannot run as configured; none was started.
    """
    workdir = Path(workdir)
    runs = plan(config, workdir)
    for run in runs[: len(config.arms)]:
        train.prepare(run.config)
    for run in runs:
        records.check_config(run.workdir, as_json(run.config))
    arms = {arm: flatten(config.arms[arm]) for arm in config.arms}
    images = f"{config.data.name}, {config.data.eval_split}"
    described = {"name": workdir.name, "arms": arms, "seeds": list(config.seeds), "reported": images}
    records.write_json(workdir / "study.json", described)
    for run in runs:
        values = flatten(run.config)
        changed = {key: values[key] for keys in arms.values() for key in keys}
        train.train_and_evaluate(run.config, run.workdir, {"arm": run.arm, "seed": run.seed, **changed})
    report.write(workdir)
