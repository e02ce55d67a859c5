"""A study's runs as numbers: tables, intervals, and what they say of the paper's claims.

Reads what the runs left on disk, or the `study.json`, `results.csv` and `curves.csv` that were kept of them. Imports
neither JAX nor the model, so it works wherever the files are.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from alexnet_jax import records

METRICS = (
    "train/loss",
    "train/top1_error",
    "train_eval/top1_error",
    "eval/loss",
    "eval/top1_error",
    "eval/top5_error",
)
# generalisation_gap is eval/top1_error less train_eval/top1_error; steps_to_25 and epochs_to_25 are when the error of
# the training batches was first 25 % or less (paper, section 3.1), and are empty where it never was.
DERIVED = ("generalisation_gap", "steps_to_25", "epochs_to_25")
COLOUR = ("colour/share", "colour/difference", "colour/excess")
COLUMNS = (
    *("arm", "seed", "status", "steps", "epochs", "parameters"),
    *METRICS,
    *DERIVED,
    *COLOUR,
    *("images_per_second", "seconds"),
)
GOAL = 0.25


def load_study(study: Path | str) -> dict[str, Any]:
    """What ``study.json`` says: name, arms and what each changes, sizes of their nets, claims, what was tuned.

    Raises:
      ValueError: the folder is not a study's.
    """
    described = records.read_json(Path(study) / "study.json")
    if described is None:
        raise ValueError(f"{study} is not the folder of a study: it has no study.json; give one like runs/ablation_lrn")
    return described


def run_folders(study: Path | str) -> list[tuple[str, int, Path]]:
    """Arm, seed and folder of each run of a study, in its order; of seeds that another command added, too."""
    study, described = Path(study), load_study(study)
    added = {int(folder.name.removeprefix("seed_")) for folder in study.glob("*/seed_*")}
    seeds = [*described["seeds"], *sorted(added - set(described["seeds"]))]
    return [(arm, seed, study / arm / f"seed_{seed}") for arm in described["arms"] for seed in seeds]


def load_runs(study: Path | str) -> pd.DataFrame:
    """A row for each run of a study, in the study's order, with ``COLUMNS``; errors are fractions of 1.

    ``status`` is "finished", "failed", "unfinished" or "not started"; only finished runs have numbers.

    Args:
      study: its folder, with its runs or with the ``results.csv`` that was kept of them.

    Raises:
      ValueError: the folder is not a study's.
    """
    study, folders = Path(study), run_folders(study)
    if not any(folder.exists() for _, _, folder in folders) and (study / "results.csv").exists():
        return pd.read_csv(study / "results.csv")
    rows = []
    for arm, seed, folder in folders:
        result = records.result(folder) or {}
        derived: dict[str, float] = {}
        if {"eval/top1_error", "train_eval/top1_error"} <= result.keys():
            derived["generalisation_gap"] = result["eval/top1_error"] - result["train_eval/top1_error"]
        if result:
            reached = [line for line in _records(folder) if line.get("train/top1_error", np.inf) <= GOAL]
            derived |= {f"{unit}s_to_25": line[unit] for line in reached[:1] for unit in ("step", "epoch")}
        rows.append({"arm": arm, "seed": seed, "status": records.status(folder), **result, **derived})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def load_curves(study: Path | str) -> pd.DataFrame:
    """A row for each record of each run, finished or not: arm, seed, step, epoch and the metrics recorded there.

    Args:
      study: its folder, with its runs or with the ``curves.csv`` that was kept of them.
    """
    study, folders = Path(study), run_folders(study)
    if not any(folder.exists() for _, _, folder in folders) and (study / "curves.csv").exists():
        return pd.read_csv(study / "curves.csv")
    rows = [{"arm": arm, "seed": seed, **line} for arm, seed, folder in folders for line in _records(folder)]
    return pd.DataFrame(rows, columns=None if rows else ["arm", "seed", "step", "epoch", *METRICS])


def compare(runs: pd.DataFrame, metric: str = "eval/top1_error", *, ratio: bool = False) -> pd.DataFrame:
    """The arms side by side, from their finished runs.

    Args:
      runs: as from ``load_runs``.
      metric: one of its columns.
      ratio: whether the effect is the ratio to the first arm, of geometric means, and not the difference.

    Returns:
      A row for each arm: n, mean, low and high (95 % interval of the mean, Student's t), and for the effect, the
      difference to the first arm, paired by seed: pairs, effect, effect_low, effect_high. An interval needs two runs:
      it is NaN for fewer.
    """
    by_arm = {arm: group.set_index("seed")[metric].dropna() for arm, group in runs.groupby("arm", sort=False)}
    scale, back = (np.log, np.exp) if ratio else (np.asarray, np.asarray)
    reference = next(iter(by_arm.values()), pd.Series(dtype=float))
    rows = []
    for position, (arm, values) in enumerate(by_arm.items()):
        seeds = values.index.intersection(reference.index) if position > 0 else values.index[:0]
        effects = scale(values[seeds].to_numpy(float)) - scale(reference[seeds].to_numpy(float))
        numbers = (len(values), *_interval(values.to_numpy(float)), len(seeds), *back(_interval(effects)))
        columns = ("n", "mean", "low", "high", "pairs", "effect", "effect_low", "effect_high")
        rows.append({"arm": arm, **dict(zip(columns, numbers, strict=True))})
    return pd.DataFrame(rows).set_index("arm")


def verdict(low: float, high: float, *, nothing: float, higher: bool) -> str:
    """What the 95 % interval of an effect says of a claim: "reproduced", "opposite", "not distinguishable", or "too few
    seeds" where there is no interval.

    Args:
      nothing: the effect if there is none: 0 of a difference, 1 of a ratio.
      higher: whether the claim is that the effect is larger than that. Its size is not judged.
    """
    if np.isnan([low, high]).any():
        return "too few seeds"
    if low <= nothing <= high:
        return "not distinguishable"
    return "reproduced" if (low > nothing) == higher else "opposite"


def verdicts(study: Path | str) -> pd.DataFrame:
    """The paper's claims beside what was found: a row for each, as people read them."""
    runs = load_runs(study)
    rows = []
    for said in load_study(study)["claims"]:
        ratio = said["ratio"] is not None
        found = compare(runs, said["metric"], ratio=ratio).loc[said["arm"]]
        low, high = found["effect_low"], found["effect_high"]
        size = said["ratio"] if ratio else said["difference"]
        higher = size is None or size > (1 if ratio else 0)
        form = _times if ratio else _points
        rows.append(
            {
                "arm": said["arm"],
                "metric": said["metric"],
                "the paper": ("higher" if size is None else form(size)) + f" ({said['source']})",
                "found": form(found["effect"]),
                "its 95 % interval": form(low, high),
                "pairs": f"{found['pairs']:.0f}",
                "verdict": verdict(low, high, nothing=1.0 if ratio else 0.0, higher=higher),
            }
        )
    return pd.DataFrame(rows)


def table(runs: pd.DataFrame, metric: str = "eval/top1_error") -> pd.DataFrame:
    """``compare`` as people read it: errors in percent, and an empty cell where there is nothing to say.

    Args:
      runs: as from ``load_runs``.
      metric: one of its columns.
    """
    percent = is_share(metric)

    def number(*values: float) -> str:
        return _join(*(f"{100 * value:.2f}" if percent else f"{value:.4g}" for value in values), of=values)

    def signed(*values: float) -> str:
        return _points(*values) if percent else _join(*(f"{value:+.3g}" for value in values), of=values)

    return pd.DataFrame(
        [
            {
                "arm": arm,
                "n": f"{row['n']:.0f}",
                f"{metric}, %" if percent else metric: number(row["mean"]),
                "95 % interval": number(row["low"], row["high"]),
                "difference": signed(row["effect"]),
                "its 95 % interval": signed(row["effect_low"], row["effect_high"]),
            }
            for arm, row in compare(runs, metric).iterrows()
        ]
    )


def size_notes(study: Path | str) -> dict[str, str]:
    """By arm, in what its net is not as large as the first arm's: parameters, and maps by layer; "" where it is."""
    sizes = load_study(study).get("sizes", {})
    reference: dict[str, Any] = next(iter(sizes.values()), {})
    notes = {}
    for arm, size in sizes.items():
        changed = []
        if size["parameters"] != reference["parameters"]:
            changed.append(f"parameters {reference['parameters']:,} to {size['parameters']:,}")
        for layer in reference["maps"] | size["maps"]:
            before, after = (of["maps"].get(layer, "none") for of in (reference, size))
            if before != after and layer != "logits":
                changed.append(f"{layer} {before} to {after}")
        notes[arm] = "; ".join(changed)
    return notes


def is_share(metric: str) -> bool:
    """Whether it is a fraction of 1 that people read in percent."""
    return metric.endswith("error") or metric == "generalisation_gap" or metric.startswith("colour/")


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in records.complete_lines(folder / "metrics.jsonl")]


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval."""
    if len(values) < 2:
        return (values.mean() if len(values) else np.nan), np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return values.mean(), values.mean() - half, values.mean() + half


def _join(*texts: str, of: tuple[float, ...]) -> str:
    return "" if np.isnan(of).any() else " to ".join(texts)


def _points(*values: float) -> str:
    return _join(*(f"{100 * value:+.2f}" for value in values), of=values)


def _times(*values: float) -> str:
    return _join(*(f"{value:.3g} times" if len(values) == 1 else f"{value:.3g}" for value in values), of=values)
