"""Runs to tables and pictures: python -m alexnet_jax.report runs/ablation_lrn

Reads what the runs left on disk; imports neither JAX nor the model, so it works wherever the files are.
"""

import argparse
import html
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats

from alexnet_jax import records

METRICS = ("train/loss", "train/top1_error", "eval/loss", "eval/top1_error", "eval/top5_error")
COLUMNS = ("arm", "seed", "status", "steps", "epochs", "parameters", *METRICS, "images_per_second", "seconds")


def load_runs(study: Path | str) -> pd.DataFrame:
    """A row for each run of a study, in the study's order, with ``COLUMNS``; errors are fractions of 1.

    ``status`` is "finished", "unfinished" or "not started"; only finished runs have numbers.

    Raises:
      ValueError: the folder is not a study's.
    """
    rows = []
    for arm, seed, folder in _runs(Path(study)):
        result = records.result(folder)
        status = "finished" if result else "unfinished" if folder.exists() else "not started"
        rows.append({"arm": arm, "seed": seed, "status": status, **(result or {})})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def load_curves(study: Path | str) -> pd.DataFrame:
    """A row for each record of each run, finished or not: arm, seed, step, epoch and the metrics recorded there."""
    rows = []
    for arm, seed, folder in _runs(Path(study)):
        for line in records.complete_lines(folder / "metrics.jsonl"):
            rows.append({"arm": arm, "seed": seed, **json.loads(line)})
    return pd.DataFrame(rows, columns=None if rows else ["arm", "seed", "step", "epoch", *METRICS])


_COMPARED = ("n", "mean", "low", "high", "pairs", "difference", "difference_low", "difference_high")


def compare(runs: pd.DataFrame, metric: str = "eval/top1_error") -> pd.DataFrame:
    """The arms side by side, from their finished runs.

    Args:
      runs: as from ``load_runs``.

    Returns:
      A row for each arm: n, mean, low and high (95 % interval of the mean, Student's t), and the same for the
      difference to the first arm, paired by seed: pairs, difference, difference_low, difference_high. An interval
      needs two runs: it is NaN for fewer.
    """
    by_arm = {arm: group.set_index("seed")[metric].dropna() for arm, group in runs.groupby("arm", sort=False)}
    reference = next(iter(by_arm.values()), pd.Series(dtype=float))
    rows = []
    for position, (arm, values) in enumerate(by_arm.items()):
        pairs = (values - reference).dropna() if position > 0 else values.iloc[:0]
        numbers = (len(values), *_interval(values), len(pairs), *_interval(pairs))
        rows.append({"arm": arm, **dict(zip(_COMPARED, numbers, strict=True))})
    return pd.DataFrame(rows).set_index("arm")


def plot_curves(curves: pd.DataFrame, metric: str) -> Figure:
    """A metric against epochs: a line for each arm's mean over its seeds, a band from the lowest to the highest.

    Args:
      curves: as from ``load_curves``.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    percent = metric.endswith("error")
    for arm, runs in curves.dropna(subset=[metric]).groupby("arm", sort=False):
        by_epoch = runs.groupby("epoch")[metric].agg(["mean", "min", "max"]) * (100 if percent else 1)
        (line,) = axes.plot(by_epoch.index, by_epoch["mean"], label=arm, marker="." if len(by_epoch) < 20 else "")
        axes.fill_between(by_epoch.index, by_epoch["min"], by_epoch["max"], color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xlabel="epoch", ylabel=f"{metric} (%)" if percent else metric)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    return figure


def print_table(runs: pd.DataFrame, images: str = "held-out images") -> None:
    """Prints ``compare``, in percent.

    Args:
      images: that the errors are of.
    """
    table = Table(title=f"top-1 error on {images}, %", title_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in _table_rows(runs):
        table.add_row(*row)
    Console().print(table)


def write(study: Path | str) -> None:
    """Writes ``results.csv`` and ``report.html`` into the study's folder and prints the table."""
    study = Path(study)
    runs = load_runs(study)
    records.write_text(study / "results.csv", runs.to_csv(index=False))
    records.write_text(study / "report.html", _page(study, runs, load_curves(study)))
    print_table(runs, _described(study)["reported"])
    for status, count in runs["status"].value_counts().items():
        if status != "finished":
            print(f"{count} run(s) {status}: the study's command goes on with them")
    print(f"{study / 'results.csv'}  {study / 'report.html'}\ntensorboard --logdir {study}")


def _runs(study: Path) -> list[tuple[str, int, Path]]:
    """Arm, seed and folder of each run."""
    described = _described(study)
    return [(arm, seed, study / arm / f"seed_{seed}") for arm in described["arms"] for seed in described["seeds"]]


def _described(study: Path) -> dict[str, Any]:
    """The study's name, arms (what each changes) and seeds."""
    described = records.read_json(study / "study.json")
    if described is None:
        raise ValueError(f"{study} is not the folder of a study: it has no study.json; give one like runs/ablation_lrn")
    return described


def _interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean and its 95 % interval."""
    if len(values) < 2:
        return (values.mean() if len(values) else np.nan), np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return values.mean(), values.mean() - half, values.mean() + half


_HEADINGS = ("arm", "n", "mean", "95 % interval", "difference", "its 95 % interval")


def _table_rows(runs: pd.DataFrame) -> Sequence[tuple[str, ...]]:
    """``compare`` as people read it: percent, and an empty cell where there is nothing to say."""

    def percent(*values: float, sign: str = "") -> str:
        return "" if np.isnan(values).any() else " to ".join(f"{100 * value:{sign}.2f}" for value in values)

    return [
        (
            str(arm),
            f"{row['n']:.0f}",
            percent(row["mean"]),
            percent(row["low"], row["high"]),
            percent(row["difference"], sign="+"),
            percent(row["difference_low"], row["difference_high"], sign="+"),
        )
        for arm, row in compare(runs).iterrows()
    ]


def _page(study: Path, runs: pd.DataFrame, curves: pd.DataFrame) -> str:
    """The report: one page with everything in it."""
    described = _described(study)
    folders = [folder for _, _, folder in _runs(study)]
    environments = [environment for folder in folders if (environment := records.read_json(folder / "env.json"))]
    arms = [(arm, ", ".join(f"{k} = {v}" for k, v in keys.items()) or "–") for arm, keys in described["arms"].items()]
    figures = [_svg(plot_curves(curves, metric)) for metric in METRICS if metric in curves]
    finished = runs[runs["status"] == "finished"]
    results = [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
        for row in finished.itertuples(index=False)
    ]
    return _PAGE.format(
        title=html.escape(described["name"]),
        reported=html.escape(described["reported"]),
        summary=html.escape(f"{len(finished)} of {len(runs)} runs finished."),
        comparison=_html_table(_HEADINGS, _table_rows(runs)),
        arms=_html_table(("arm", "what it changes"), arms),
        figures="\n".join(f"<figure>{figure}</figure>" for figure in figures),
        runs=_html_table(COLUMNS, results),
        environment=html.escape(json.dumps(environments[0], indent=2) if environments else ""),
    )


def _html_table(headings: Any, rows: Any) -> str:
    def row(tag: str, cells: Any) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return f'<div class="table"><table>{row("th", headings)}{body}</table></div>'


def _svg(figure: Figure) -> str:
    """The figure as an SVG element that takes the page's text colour."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alexnet_jax"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
.text th, .text td {{ text-align: left; white-space: normal; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }}
figure {{ margin: 0; }}
svg {{ width: 100%; height: auto; }}
svg text {{ fill: currentColor; }}
pre {{ overflow-x: auto; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<h2>Top-1 error on {reported}, %</h2>
<p>Mean over seeds with its 95 % interval (Student's t), and the difference to the first arm, paired by seed.
An interval that contains 0 does not tell the arms apart.</p>
{comparison}
<h2>Arms</h2>
<div class="text">{arms}</div>
<h2>Learning curves</h2>
<p>Lines: mean over seeds. Bands: from the lowest to the highest seed. Training metrics are of the augmented batches,
with dropout on.</p>
<div class="figures">
{figures}
</div>
<h2>Runs</h2>
{runs}
<h2>Environment of the first run</h2>
<pre>{environment}</pre>
</html>
"""


def main() -> None:
    """Writes the report of the study that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m alexnet_jax.report", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="a study's folder, such as runs/ablation_lrn")
    try:
        write(parser.parse_args().study)
    except ValueError as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
