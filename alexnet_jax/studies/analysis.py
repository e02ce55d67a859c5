"""Statistics of a study: tables, confidence intervals and verdicts on the paper's claims.

Reads the folders of the runs, or the `study.json`, `results.csv` and `curves.csv` that were kept of them. Imports
neither JAX nor the model, so it works wherever the files are.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from alexnet_jax.run_dir import DamagedFileError, RunDir, StudyDir

METRICS = ("train/loss", "train/top1_error", "train_eval/top1_error", "eval/loss", "eval/top1_error", "eval/top5_error")
# Step and epoch at which the error of the training batches first was 25 % or less (paper, section 3.1), and the epoch
# at which that of the training images as they are evaluated was; runs that never reach it have none.
CENSORED = ("steps_to_25", "epochs_to_25", "train_eval_epochs_to_25")
DERIVED = ("generalisation_gap", *CENSORED)  # the gap is eval/top1_error minus train_eval/top1_error
COLOUR = ("colour/share", "colour/difference", "colour/excess")
COLUMNS = (
    *("arm", "seed", "status", "steps", "epochs", "parameters"),
    *METRICS,
    *DERIVED,
    *COLOUR,
    *("images_per_second", "seconds"),
)
NUMBERS = COLUMNS[3:]
TARGET_ERROR = 0.25
TEXT_COLUMNS = ("arm", "status", "metric", "claim", "verdict")  # headings of names; other columns have numbers
NO_EFFECT = "no effect (within the margin)"
SMALL_EFFECT = "small effect (within the margin)"  # which differs from zero
SMALL_OPPOSITE = "small opposite effect (within the margin)"
WITHDRAWN = "withdrawn: "  # how a verdict starts that does not count; the reason follows
AT_LEAST, AT_MOST, UNKNOWN = "≥", "≤", "?"  # bounds of an effect, if runs are censored
NONE_FOUND = "no value has a score, so the arm is not run; change tuning.choices or tuning.epochs"
AT_EDGE = "at the edge of the grid: the optimum may lie outside"


def load_study(study: Path | str) -> dict[str, Any]:
    """Return the description in `study.json`: name, arms and their changes, network sizes, claims, tuning."""
    return StudyDir(study).read()


def load_runs(study: Path | str) -> pd.DataFrame:
    """Return a row for each run, in the order of the study, with `COLUMNS`; errors are fractions of 1.

    The folder has the runs, or the `results.csv` that was kept of them. `status` is "finished", "failed", "unfinished",
    "not started" or "damaged"; only finished runs have numbers. `CENSORED` metrics are NaN if the error was never
    reached.
    """
    folder = StudyDir(study)
    if _is_summary(folder, folder.results_file):
        return _read_csv(folder.results_file).reindex(columns=list(COLUMNS))  # older ones lack some
    rows = []
    for arm, seed, run in folder.runs():
        row = {"arm": arm, "seed": seed, "status": run.status}
        if row["status"] == "finished" and (result := run.result):
            row |= result | time_to_target(run.metrics())
        rows.append(row)
    runs = pd.DataFrame(rows, columns=list(COLUMNS))
    runs["generalisation_gap"] = runs["eval/top1_error"] - runs["train_eval/top1_error"]
    return runs


def time_to_target(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of `CENSORED` from a run's records; without those whose error is never reached.

    Evaluations of the training images are epochs apart: the error is interpolated linearly between them.
    """
    times: dict[str, float] = {}
    before: tuple[float, float] | None = None  # epoch and error of the evaluation before
    for record in records:
        if "epochs_to_25" not in times and record.get("train/top1_error", np.inf) <= TARGET_ERROR:
            times |= {"steps_to_25": record["step"], "epochs_to_25": record["epoch"]}
        if "train_eval_epochs_to_25" not in times and "train_eval/top1_error" in record:
            epoch, error = record["epoch"], record["train_eval/top1_error"]
            if error <= TARGET_ERROR:
                if before is not None:
                    epoch = float(np.interp(-TARGET_ERROR, [-before[1], -error], [before[0], epoch]))
                times["train_eval_epochs_to_25"] = epoch
            before = epoch, error
    return times


def load_curves(study: Path | str) -> pd.DataFrame:
    """Return step, epoch and metrics of each record of each run, or of the `curves.csv` that was kept of the runs.

    A run whose records are damaged has none: `RunDir.damages` says so.
    """
    folder = StudyDir(study)
    if _is_summary(folder, folder.curves_file):
        return _read_csv(folder.curves_file)
    rows = [
        {"arm": arm, "seed": seed, **line}
        for arm, seed, run in folder.runs()
        for line in run.undamaged(RunDir.metrics) or []
    ]
    return pd.DataFrame(rows, columns=None if rows else ["arm", "seed", "step", "epoch", *METRICS])


def mean_and_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean and its two-sided confidence interval (Student's t), which is NaN for fewer than two values."""
    if len(values) < 2:
        return float(values.sum()) if len(values) else np.nan, np.nan, np.nan
    half = special.stdtrit(len(values) - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def paired_effects(runs: pd.DataFrame, arm: str, metric: str, *, ratio: bool = False) -> np.ndarray:
    """Return `metric` of an arm minus that of the first arm, or of their logarithms, for each seed that has both."""
    columns = [runs[runs["arm"] == name].set_index("seed")[metric] for name in (runs["arm"].iloc[0], arm)]
    pairs = pd.concat(columns, axis="columns", join="inner").dropna().to_numpy(float)
    if ratio:
        pairs = np.log(pairs)
    return pairs[:, 1] - pairs[:, 0]


def compare(runs: pd.DataFrame, metric: str = "eval/top1_error") -> pd.DataFrame:
    """Return the mean of `metric` for each arm, and its effect: the difference to the first arm.

    Returns:
      A row for each arm: n (runs that have the metric), finished (runs), mean with its 95 % CI (low, high), and the
      effect, paired by seed: pairs, effect, effect_low, effect_high. A CI needs two runs: it is NaN for fewer.
    """
    arms, rows = runs["arm"].unique(), []
    for arm in arms:
        of_arm = runs[runs["arm"] == arm]
        values = of_arm[metric].dropna().to_numpy(float)
        effects = np.empty(0) if arm == arms[0] else paired_effects(runs, arm, metric)
        finished = (of_arm["status"] == "finished").sum()
        estimates = (*mean_and_interval(values), len(effects), *mean_and_interval(effects))
        rows.append((len(values), finished, *estimates))
    columns = ["n", "finished", "mean", "low", "high", "pairs", "effect", "effect_low", "effect_high"]
    return pd.DataFrame(rows, index=pd.Index(arms, name="arm"), columns=columns)


def fill_censored(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return runs in which those that never reached the error of a `CENSORED` metric have the time of their end."""
    if metric not in CENSORED:
        return runs
    end = runs["steps" if metric == "steps_to_25" else "epochs"].where(runs["status"] == "finished")
    return runs.assign(**{metric: runs[metric].fillna(end)})


def effect_bound(runs: pd.DataFrame, arm: str, metric: str) -> str:
    """Return what an effect of runs from `fill_censored` is: "" (measured), or `AT_LEAST`, `AT_MOST` or `UNKNOWN`."""
    if metric not in CENSORED:
        return ""
    censored = runs[metric].isna() & (runs["status"] == "finished")
    of_reference, of_arm = (bool(censored[runs["arm"] == name].any()) for name in (runs["arm"].iloc[0], arm))
    return {(False, False): "", (False, True): AT_LEAST, (True, False): AT_MOST}.get((of_reference, of_arm), UNKNOWN)


def check_claim(claim: Mapping[str, Any], arms: Iterable[str]) -> None:
    """Raise ValueError unless a claim is about a number of `COLUMNS` and another arm than the first, with a margin."""
    about, (reference, *others) = f"claim about {claim['arm']!r}", arms
    if claim["arm"] not in others:
        raise ValueError(f"{about}: must be about an arm that is compared with {reference!r}: {', '.join(others)}")
    if claim["metric"] not in NUMBERS:
        raise ValueError(f"{about}: metric={claim['metric']!r} must be one of {', '.join(NUMBERS)}")
    least, margin = 0 if claim["ratio"] is None else 1, claim.get("margin")
    if margin is not None and margin <= least:
        raise ValueError(f"{about}: margin={margin} must be more than {least}: a difference, or of a ratio a factor")


def claim_margin(claim: Mapping[str, Any]) -> float:
    """Return the half-width of "no effect" of a claim: a factor for ratios, else in the unit of the metric.

    The default is 1.25 for ratios, half of the paper's difference, or without one 0.005 for fractions of 1; for other
    metrics it is 0, which no effect is equivalent to.
    """
    if claim.get("margin") is not None:
        return claim["margin"]
    if claim["ratio"] is not None:
        return 1.25
    if claim["difference"] is not None:
        return abs(claim["difference"]) / 2
    return 0.005 if is_fraction(claim["metric"]) else 0.0


def verdict(effects: np.ndarray, margin: float, *, higher: bool, bound: str = "") -> str:
    """Return the verdict on a claim that the effect is positive, or negative unless `higher`, whatever its size.

    If two one-sided t-tests at 5 % show that the effect is within the margin, which its 90 % CI then is, `NO_EFFECT`;
    but `SMALL_EFFECT` or `SMALL_OPPOSITE` if its 95 % CI is on one side of zero. Otherwise "reproduced" or
    "contradicted" if the 95 % CI is on one side of zero, and "inconclusive" if it contains zero. "too few seeds" for
    fewer than two pairs. If effects are bounds (`effect_bound`), what they do not exclude is "inconclusive"; so are
    effects that are not finite, as of the logarithm of an error of zero.
    """
    if len(effects) < 2:
        return "too few seeds"
    if not np.isfinite(effects).all():
        return "inconclusive"
    _, low, high = mean_and_interval(effects, 0.90)
    is_within_margin = -margin < low and high < margin and not bound
    _, low, high = mean_and_interval(effects, 0.95)
    if is_within_margin:
        return NO_EFFECT if low <= 0 <= high else SMALL_EFFECT if (low > 0) == higher else SMALL_OPPOSITE
    if low <= 0 <= high or bound == UNKNOWN or bound == (AT_MOST if low > 0 else AT_LEAST):
        return "inconclusive"
    return "reproduced" if (low > 0) == higher else "contradicted"


def _objection(study: Mapping[str, Any], runs: pd.DataFrame, arm: str, metric: str) -> str:
    """Return why the verdict on a claim does not count: failed runs or tuning of the arm or the reference; or ""."""
    compared = (next(iter(study["arms"])), arm)
    if (runs["arm"].isin(compared) & (runs["status"] == "failed")).any():  # the others may be the lucky ones
        return f"{WITHDRAWN}runs failed"
    tuning = study.get("tuning") or {"arms": {}}
    tuned = [tuning["arms"][name] for name in compared if name in tuning["arms"]]
    if tuned and (metric in CENSORED) != (tuning["metric"] in CENSORED):  # speed is tuned on speed
        return f"{WITHDRAWN}arms tuned on another metric"
    return f"{WITHDRAWN}tuned value at the edge of its grid" if any(each["at_edge"] for each in tuned) else ""


def claim_effects(study: Path | str, claims: Iterable[Mapping[str, Any]] | None = None) -> pd.DataFrame:
    """Return a row for each claim, as numbers: `paper` is the paper's effect or NaN, low and high are the 95 % CI.

    `reference` is the mean of the first arm. `bound` says whether the effect is a bound, because runs are censored
    (`effect_bound`). The verdict is "withdrawn: " and the reason if runs of one of the two arms failed, if one has its
    tuned value at the edge of the grid, or if arms were tuned by an error and the claim is about speed, or the reverse.

    Args:
      claims: None: those of the study.
    """
    runs, description, rows = load_runs(study), load_study(study), []
    for claim in description["claims"] if claims is None else claims:
        arm, metric, ratio = claim["arm"], claim["metric"], claim["ratio"] is not None
        paper, margin = claim["ratio"] if ratio else claim["difference"], claim_margin(claim)
        effects = paired_effects(fill_censored(runs, metric), arm, metric, ratio=ratio)
        higher, bound = paper is None or paper > (1 if ratio else 0), effect_bound(runs, arm, metric)
        decision = verdict(effects, np.log(margin) if ratio else margin, higher=higher, bound=bound)
        if len(effects) > 1:
            decision = _objection(description, runs, arm, metric) or decision
        interval = (np.exp if ratio else np.asarray)(mean_and_interval(effects))
        reference = runs.loc[runs["arm"] == runs["arm"].iloc[0], metric].mean()
        measured = (reference, *interval, bound, len(effects), margin, decision)
        rows.append((arm, metric, claim["source"], ratio, np.nan if paper is None else paper, *measured))
    columns = ["arm", "metric", "source", "ratio", "paper", "reference", "effect", "low", "high", "bound"]
    return pd.DataFrame(rows, columns=[*columns, "pairs", "margin", "verdict"])


def verdicts(study: Path | str, claims: Iterable[Mapping[str, Any]] | None = None) -> pd.DataFrame:
    """Return `claim_effects` as text: errors in percentage points, ratios as "6 times"."""
    rows = []
    for row in claim_effects(study, claims).to_dict("records"):
        show = _times if row["ratio"] else functools.partial(_show, row["metric"], sign="+")
        margin = f"factor {row['margin']:.3g}" if row["ratio"] else show(row["margin"]).replace("+", "±")
        rows.append(
            {
                "arm": row["arm"],
                "metric": row["metric"],
                "reference": _show(row["metric"], row["reference"]),
                "claim": f"{'higher' if np.isnan(row['paper']) else show(row['paper'])} ({row['source']})",
                "found": f"{row['bound']} {show(row['effect'])}".strip(),
                "95 % CI": _bounded(row["bound"], show, row["low"], row["high"]),
                "pairs": str(row["pairs"]),
                "margin": margin if row["margin"] else "",
                "verdict": row["verdict"],
            }
        )
    return pd.DataFrame(rows)


def table(runs: pd.DataFrame, metric: str = "eval/top1_error") -> pd.DataFrame:
    """Return `compare` as text: errors in percent, and an empty cell where there is no number.

    A metric of `CENSORED` has two counts: finished runs, and those that reached the error.
    """
    counts = {"n": "finished", "n reached": "n"} if metric in CENSORED else {"n": "n"}
    rows = []
    for arm, row in compare(runs, metric).iterrows():
        rows.append(
            {
                "arm": arm,
                **{heading: f"{row[count]:.0f}" for heading, count in counts.items()},
                f"{metric}, %" if is_fraction(metric) else metric: _show(metric, row["mean"]),
                "95 % CI": _show(metric, row["low"], row["high"]),
                "difference": _show(metric, row["effect"], sign="+"),
                "95 % CI of the difference": _show(metric, row["effect_low"], row["effect_high"], sign="+"),
            }
        )
    return pd.DataFrame(rows)


def size_notes(study: Path | str) -> dict[str, str]:
    """Return for each arm how the size of its network differs from the first arm's; "" if it does not."""
    sizes = load_study(study).get("sizes", {})
    reference: dict[str, Any] = next(iter(sizes.values()), {})
    notes = {}
    for arm, size in sizes.items():
        changes = []
        if size["parameters"] != reference["parameters"]:
            changes.append(f"parameters {reference['parameters']:,} to {size['parameters']:,}")
        for layer in reference["maps"] | size["maps"]:
            before, after = (of_arm["maps"].get(layer, "none") for of_arm in (reference, size))
            if before != after and layer != "logits":
                changes.append(f"{layer} {before} to {after}")
        notes[arm] = "; ".join(changes)
    return notes


def tuning_notes(study: Path | str) -> dict[str, str]:
    """Return for each tuned arm its chosen value, whether that is at the edge of the grid, and the scores of all."""
    tuning, notes = load_study(study).get("tuning") or {"arms": {}}, {}
    for arm, tuned in tuning["arms"].items():
        metric, key = tuning["metric"], tuning["key"]
        failed, unit = (
            "never reached or failed" if metric in CENSORED else "failed",
            " %" if is_fraction(metric) else "",
        )
        texts = [
            f"{value}: {failed if score is None else _show(metric, score) + unit}"
            for value, score in tuned["scores"].items()
        ]
        edge = f", {AT_EDGE}" if tuned["at_edge"] else ""
        choice = f"{key}: {NONE_FOUND}" if tuned["chosen"] is None else f"{key} = {tuned['chosen']}{edge}"
        notes[arm] = f"{choice}. Tuned by {metric} ({', '.join(texts)})"
    return notes


def is_fraction(metric: str) -> bool:
    """Return whether a metric is a fraction of 1, shown in percent."""
    return metric.endswith("_error") or metric in ("generalisation_gap", *COLOUR)


def _read_csv(file: Path) -> pd.DataFrame:
    """Return the table that `report.write` wrote; raise DamagedFileError if the file has no such table."""
    try:
        table = pd.read_csv(file, dtype={"arm": str}, keep_default_na=False, na_values=[""])  # an arm may be "None"
    except ValueError as error:
        raise DamagedFileError(f"{file}: cannot be read ({error}); must be a table of runs") from None
    if missing := {"arm", "seed"} - set(table):
        raise DamagedFileError(f"{file}: must be a table of runs, and has no column {' and '.join(sorted(missing))}")
    return table


def _is_summary(study: StudyDir, file: Path) -> bool:
    """Return whether only a file that summarises the runs is there, and not the runs."""
    return file.exists() and not any(run.path.exists() for _, _, run in study.runs())


def _show(metric: str, *values: float, sign: str = "") -> str:
    """Return one value of a metric, or the bounds of an interval, as text; "" for NaN."""
    scale, digits = (100, ".2f") if is_fraction(metric) else (1, ".3g" if sign else ".4g")
    return "" if np.isnan(values).any() else " to ".join(f"{scale * value:{sign}{digits}}" for value in values)


def _bounded(bound: str, show: Callable[..., str], low: float, high: float) -> str:
    """Return a confidence interval as text: of a bound, only the end that holds."""
    ends = {"": (low, high), AT_LEAST: (low,), AT_MOST: (high,)}.get(bound)
    text = show(*ends) if ends else ""
    return f"{bound} {text}".strip() if text else ""


def _times(*values: float) -> str:
    """Return one ratio, or the bounds of an interval, as text; "" for NaN."""
    unit = " times" if len(values) == 1 else ""
    return "" if np.isnan(values).any() else " to ".join(f"{value:.3g}{unit}" for value in values)
