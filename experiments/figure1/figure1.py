"""Collect the runs of configs/figure1.py, draw figure 1 and write its table.

    python experiments/figure1/figure1.py --runs=RUNS    # collect the runs in RUNS/figure1_*, then draw
    python experiments/figure1/figure1.py                # draw the files beside the script

Beside the script is a folder for each study, with the files of experiments/keep.py, among them runs.tar.xz, from which
the study continues; and trials.csv, which has the training error of the trials.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import special

from alexnet_jax.run_dir import RunDir
from alexnet_jax.studies import analysis
from experiments import pages
from experiments.keep import keep
from experiments.pages import markdown

HERE = Path(__file__).resolve().parent
STUDIES = {
    "code2012": "weights of 2012",
    "fan_in": "weights by fan-in",
    "code2012_5000": "weights of 2012, 5,000 images",
    "fan_in_5000": "weights by fan-in, 5,000 images",
}
LINES = {"relu": "C0-", "tanh": "C1--", "scaled_tanh": "C2-."}  # colour and line of each arm
ERROR, METRIC = "train_eval/top1_error", "train_eval_epochs_to_25"
TUNING_SEEDS = 3  # that an interval needs which includes the choice of the learning rate
SAMPLES = 10_000


class Time(NamedTuple):
    """Epochs of one run until 25 % training error, or until its end if it is censored."""

    epochs: float
    censored: bool


Trials = dict[float, dict[int, Time]]  # of one arm, by learning rate and seed


def collect(runs: Path) -> None:
    """Keep the files of the studies in a folder of runs."""
    for name in STUDIES:
        if (study := runs / f"figure1_{name}").exists():
            keep(study, HERE / name)
            pd.DataFrame(trial_records(study)).to_csv(HERE / name / "trials.csv", index=False)


def trial_records(study: Path) -> Iterator[dict[str, Any]]:
    """Yield the evaluations of each trial that has started."""
    for folder in sorted(study.glob("*/learning_rate_*/seed_*")):
        arm, rate, seed = folder.relative_to(study).parts
        run = RunDir(folder)
        named = {"arm": arm, "learning_rate": float(rate.rpartition("_")[2]), "seed": int(seed.rpartition("_")[2])}
        evaluations = [record for record in run.metrics() if ERROR in record]
        for record in evaluations or [{}]:  # a trial that failed at once counts, too
            yield named | {"status": run.status} | {key: record.get(key) for key in ("step", "epoch", ERROR)}


def time_of(curve: pd.DataFrame) -> Time:
    """Return the time of a run from its evaluations."""
    reached = analysis.time_to_target(curve.to_dict("records")).get(METRIC)
    if reached is None:
        return Time(curve["epoch"].fillna(0.0).max(), censored=True)
    return Time(reached, censored=False)


def trial_times(study: Path) -> dict[str, Trials]:
    """Return the time of each trial by arm."""
    found: dict[str, Trials] = {arm: {} for arm in LINES}
    for (arm, rate, seed), curve in pd.read_csv(study / "trials.csv").groupby(["arm", "learning_rate", "seed"]):
        found[arm].setdefault(rate, {})[seed] = time_of(curve)
    return {arm: rates for arm, rates in found.items() if rates}


def best_rate(trials: Trials) -> float:
    """Return the learning rate with the lowest mean time; a rate that is censored in some trial comes last."""
    return min(trials, key=lambda rate: (any_censored(trials[rate]), mean_epochs(trials[rate])))


def any_censored(seeds: dict[int, Time]) -> bool:
    """Return whether the time of some run is a bound."""
    return any(time.censored for time in seeds.values())


def mean_epochs(seeds: dict[int, Time]) -> float:
    """Return the mean time."""
    return float(np.mean([time.epochs for time in seeds.values()]))


def ratio_interval(
    trials: dict[str, Trials], finals: dict[str, dict[int, Time]], arm: str, reference: str
) -> tuple[float, float] | None:
    """Return the 95 % interval of the ratio of geometric means, with the choice of the learning rates.

    Its width is from a bootstrap: each sample chooses seeds of the trials and pairs of fresh seeds, with replacement,
    and from the former the learning rates. Fresh seeds ran with the study's choice only: where a sample chooses another
    one, the times are those of its trials. Learning rates that were tried with fewer than `TUNING_SEEDS` are left out.
    If all samples choose as the study did, the interval is that of the paired t-test.

    Returns:
      None if a best learning rate is left out, there are fewer than two pairs, or a run is censored.
    """
    names = (arm, reference)
    tried = {
        name: {rate: seeds for rate, seeds in trials[name].items() if len(seeds) >= TUNING_SEEDS} for name in names
    }
    pairs = sorted(finals[arm].keys() & finals[reference].keys())
    if any(best_rate(trials[name]) not in rates for name, rates in tried.items()) or len(pairs) < 2:
        return None
    if any(any_censored(finals[name]) for name in names):
        return None

    def mean_log(times: Iterable[Time]) -> float:
        return float(np.mean([np.log(time.epochs) for time in times]))

    estimate = mean_log(finals[arm][seed] for seed in pairs) - mean_log(finals[reference][seed] for seed in pairs)
    generator, samples = np.random.default_rng(0), []
    for _ in range(SAMPLES):
        fresh = generator.choice(pairs, len(pairs))
        logs = {}
        for name, rates in tried.items():
            common = sorted(set.intersection(*map(set, rates.values())))
            chosen = generator.choice(common, len(common))
            sampled = {rate: {i: seeds[seed] for i, seed in enumerate(chosen)} for rate, seeds in rates.items()}
            rate = best_rate(sampled)
            if any_censored(sampled[rate]):
                return None
            times = (finals[name][seed] for seed in fresh) if rate == best_rate(rates) else sampled[rate].values()
            logs[name] = mean_log(times)
        samples.append(logs[arm] - logs[reference])
    # The variance of a sample of n is (n - 1) / n of the variance, so that of a bootstrap is, too.
    half = special.stdtrit(len(pairs) - 1, 0.975) * np.std(samples) * np.sqrt(len(pairs) / (len(pairs) - 1))
    return float(np.exp(estimate - half)), float(np.exp(estimate + half))


def kept() -> dict[str, Path]:
    """Return the folders of the studies whose files were kept."""
    return {name: HERE / name for name in STUDIES if (HERE / name / "trials.csv").exists()}


def final_curves(study: Path) -> pd.DataFrame:
    """Return the evaluations of the runs with fresh seeds."""
    curves = analysis.load_curves(study)
    return curves.dropna(subset=[ERROR]) if ERROR in curves else curves.iloc[:0]


def final_times(runs: pd.DataFrame, arm: str) -> dict[int, Time]:
    """Return the time of each finished final run of an arm, by seed."""
    of_arm = runs[(runs["arm"] == arm) & (runs["status"] == "finished")]
    filled = analysis.fill_censored(of_arm, METRIC)
    return {
        seed: Time(epochs, np.isnan(measured))
        for seed, epochs, measured in zip(of_arm["seed"], filled[METRIC], of_arm[METRIC], strict=True)
    }


def show(seeds: dict[int, Time]) -> str:
    """Return the mean time of runs as text, "≥" before a bound; "" if there are none."""
    return f"{'≥ ' * any_censored(seeds)}{mean_epochs(seeds):.1f}" if seeds else ""


def table() -> str:
    """Return a row for each arm, in Markdown: its learning rate, trials, runs with fresh seeds, and ratios to ReLU."""
    headings = [
        "study",
        "activation",
        "learning rate",
        "epochs, trials",
        "ratio, trials",
        "n",
        "reached 25 %",
    ]
    rows = [[*headings, "epochs", "ratio", "95 % CI", "with the choice of the learning rate"]]
    for name, study in kept().items():
        runs, trials = analysis.load_runs(study), trial_times(study)
        (claim,) = analysis.load_study(study)["claims"]
        compared = [claim | {"arm": arm} for arm in trials if arm != "relu"]
        ratios = analysis.verdicts(study, compared).set_index("arm")
        finals = {arm: final_times(runs, arm) for arm in trials}
        best = {arm: of_arm[best_rate(of_arm)] for arm, of_arm in trials.items()}
        for arm, of_arm in trials.items():
            times = finals[arm]
            row = [STUDIES[name], arm, f"{best_rate(of_arm):g}", show(best[arm])]
            known = arm != "relu" and best[arm].keys() == best.get("relu", {}).keys() and not any_censored(best["relu"])
            bound = "≥ " * any_censored(best[arm])
            row.append(f"{bound}{mean_epochs(best[arm]) / mean_epochs(best['relu']):.2f}" if known else "")
            row += [str(len(times)), str(sum(not time.censored for time in times.values())), show(times)]
            ratio = interval = choice = ""
            if arm in ratios.index and ratios["pairs"][arm] != "0":
                ratio, interval = ratios["found"][arm], ratios["95 % CI"][arm]
                if with_choice := ratio_interval(trials, finals, arm, "relu"):
                    choice = f"{with_choice[0]:.3g} to {with_choice[1]:.3g}"
            rows.append([*row, ratio, interval, choice])
    return markdown(rows)


def rate_table() -> str:
    """Return a row for each arm, in Markdown: the mean time of its trials at each learning rate."""
    found = {name: trial_times(study) for name, study in kept().items()}
    tried = sorted({rate for arms in found.values() for rates in arms.values() for rate in rates})
    rows = [["study", "activation", *(f"{rate:g}" for rate in tried)]]
    for name, arms in found.items():
        for arm, rates in arms.items():
            rows.append([STUDIES[name], arm, *(show(rates.get(rate, {})) for rate in tried)])
    return markdown(rows)


def weights_table() -> str:
    """Return a row for each arm, in Markdown: its epochs by fan-in divided by those with the weights of 2012.

    And a row for the ratio of tanh to ReLU by fan-in divided by that ratio with the weights of 2012.
    """
    rows = [["images", "epochs of", "n", "by fan-in / with the weights of 2012", "95 % CI"]]
    for images, names in (("50,000", ("code2012", "fan_in")), ("5,000", ("code2012_5000", "fan_in_5000"))):
        if not all(name in kept() for name in names):
            continue
        of_2012, by_fan_in = (analysis.load_runs(HERE / name) for name in names)
        logs = {}
        for arm in ("relu", "tanh"):
            before, after = final_times(of_2012, arm), final_times(by_fan_in, arm)
            seeds = before.keys() & after.keys()
            if not (any_censored(before) or any_censored(after)):
                logs[arm] = pd.Series({seed: np.log(after[seed].epochs / before[seed].epochs) for seed in seeds})
        if len(logs) == 2:
            logs["tanh / relu"] = logs["tanh"] - logs["relu"]
        for what, values in logs.items():
            ratio, low, high = np.exp(analysis.mean_and_interval(values.dropna().to_numpy()))
            rows.append([images, what, str(values.count()), f"{ratio:.3g} times", f"{low:.3g} to {high:.3g}"])
    return markdown(rows)


def draw_curves(axes: Axes, study: Path, title: str = "", *, with_trials: bool = True) -> None:
    """Draw training error against epochs, as figure 1: each final run, or, of an arm without any, its best trials."""
    finals = final_curves(study)
    trials = pd.read_csv(study / "trials.csv")
    for arm, rates in trial_times(study).items():
        curves = finals[finals["arm"] == arm]
        label = arm
        if curves.empty and with_trials:
            curves = trials[(trials["arm"] == arm) & (trials["learning_rate"] == best_rate(rates))]
            label = f"{arm} (trial)"
        for _, curve in curves.groupby("seed"):
            axes.plot(curve["epoch"], 100 * curve[ERROR], LINES[arm], label=label)
            label = None
    axes.axhline(100 * analysis.TARGET_ERROR, color="gray", linestyle="--", linewidth=1)
    axes.set(title=title, xlabel="epochs", ylabel="training error rate (%)", ylim=(0, 80), xlim=(0, None))
    axes.legend(frameon=False)


def draw_rates(axes: Axes, study: Path) -> None:
    """Draw epochs to 25 % against the learning rate: a dot for each trial, a triangle for one that was censored."""
    for arm, rates in trial_times(study).items():
        points = sorted((rate, time) for rate, seeds in rates.items() for time in seeds.values())
        for censored, marker in ((False, "o"), (True, "^")):
            chosen = [(rate, time.epochs) for rate, time in points if time.censored == censored]
            axes.plot(*zip(*chosen, strict=True) if chosen else ((), ()), LINES[arm][:2] + marker)
        means = {rate: mean_epochs(seeds) for rate, seeds in sorted(rates.items())}
        axes.plot(list(means), list(means.values()), LINES[arm], linewidth=1)
    axes.set(xscale="log", xlabel="learning rate", ylabel="epochs to 25 % (triangle: more)", ylim=(0, None))
    tried = sorted({rate for rates in trial_times(study).values() for rate in rates})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.set_xticks([], minor=True)


def draw() -> None:
    """Draw the figure, for each study the curves and beside them the learning rates; and the first curves alone."""
    studies = kept()
    whole = Figure(figsize=(9, 3.5 * len(studies)), layout="constrained")
    grid: Any = whole.subplots(len(studies), 2, squeeze=False)
    for (name, study), (left, right) in zip(studies.items(), grid, strict=True):
        draw_curves(left, study, STUDIES[name])
        draw_rates(right, study)
    first = Figure(figsize=(5, 3), layout="constrained")
    draw_curves(first.subplots(), next(iter(studies.values())), with_trials=False)
    for name, figure in (("figure1.svg", whole), ("curves.svg", first)):
        mpl.rcParams["svg.hashsalt"] = name  # the same file each time
        figure.savefig(HERE / name, metadata={"Date": None})


def tables() -> str:
    """Return all tables of the README."""
    return (
        f"{table()}\nWhat the initial weights do, paired by seed:\n\n{weights_table()}\n"
        f"Epochs to 25 % of the trials, by learning rate:\n\n{rate_table()}"
    )


if __name__ == "__main__":
    pages.renew(__doc__, HERE, collect, draw, tables)
