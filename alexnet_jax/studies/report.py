"""Write the report of a study: results.csv, curves.csv and report.html, and print its tables.

Imports neither JAX nor the model, so it works wherever the files are.
"""

import argparse
import base64
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import jinja2
import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from rich.table import Table

from alexnet_jax import terminal
from alexnet_jax.data.image_io import encode_png
from alexnet_jax.figures import filter_grid
from alexnet_jax.run_dir import RunDir, StudyDir, write_text
from alexnet_jax.studies import analysis, plots

HARDEST_CLASSES = 25
MAGNIFICATION = 4  # of the filters: screen pixels per weight
Runs = list[tuple[str, int, RunDir]]  # arm, seed and folder, as from `StudyDir.runs`
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("alexnet_jax", "studies"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# CSS variables of the template, by the text of a cell in the column "verdict" or "status".
_COLOURS = {
    "reproduced": "--good",
    analysis.NO_EFFECT: "--neutral",
    analysis.SMALL_EFFECT: "--neutral",
    analysis.SMALL_OPPOSITE: "--neutral",
    "inconclusive": "--neutral",
    "contradicted": "--bad",
    "failed": "--bad",
    "damaged": "--bad",
}


def write(study: Path | str) -> None:
    """Write `results.csv`, `curves.csv` and `report.html` into the folder of a study, and print its tables."""
    folder = StudyDir(study)
    folder.read()  # raises ValueError if it is none
    with filelock.FileLock(folder.lock_file):  # a process that read earlier must not write later
        runs, curves, claims = analysis.load_runs(study), analysis.load_curves(study), analysis.verdicts(study)
        write_text(folder.results_file, runs.to_csv(index=False))
        write_text(folder.curves_file, curves.to_csv(index=False, float_format="%.6g"))
        damages = [(run.name, damage) for *_, run in folder.runs() for damage in run.damages()]
        write_text(folder.report_file, _render(folder, runs, curves, claims, damages))
    _print(analysis.table(runs), f"top-1 error on {folder.read()['reported']}, %")
    if len(claims):
        _print(claims, "the paper's claims; differences of errors in percentage points")
    for arm, note in analysis.size_notes(study).items():
        if note:
            print(f"{arm}: network of another size: {note}")
    for arm, note in analysis.tuning_notes(study).items():
        if analysis.AT_EDGE in note or analysis.NONE_FOUND in note:
            print(f"{arm}: {note}")
    for status, count in runs["status"].value_counts().items():
        if status not in ("finished", "damaged"):
            print(f"{count} run(s) {status}; re-run the study's command to continue")
    for name, damage in damages:
        print(f"{name}: {damage}")
    print(f"{folder.results_file}  {folder.report_file}\ntensorboard --logdir {study}")


def _render(
    folder: StudyDir,
    runs: pd.DataFrame,
    curves: pd.DataFrame,
    claims: pd.DataFrame,
    damages: list[tuple[str, str]],
) -> str:
    """Return the report: one HTML page that needs no other file. The template leaves out sections without content.

    Args:
      damages: the name of a run and a sentence for each of its files that is damaged.
    """
    study, run_dirs, path = folder.read(), folder.runs(), folder.path
    logged = [metric for metric in analysis.METRICS if metric in curves and curves[metric].notna().any()]
    environments = [values for *_, run in run_dirs if (values := run.undamaged(RunDir.read_environment))]
    activations = any("model.activation" in changes for changes in study["arms"].values())

    def tables(*metrics: str) -> list[Markup]:
        return [_table(analysis.table(runs, name), name) for name in metrics if runs[name].notna().any()]

    return _TEMPLATES.get_template("report.html.j2").render(
        study=study,
        finished=(runs["status"] == "finished").sum(),
        planned=len(runs),
        claims=_table(claims, "claims") if len(claims) else None,
        effects_plot=_svg(plots.plot_effects, analysis.claim_effects(path)) if len(claims) else None,
        error_table=_table(analysis.table(runs), "error"),
        arms_plot=_svg(plots.plot_arms, runs),
        other_tables=tables("eval/top5_error", *analysis.DERIVED, "images_per_second"),
        figure_1=_svg(plots.plot_figure_1, curves) if activations else None,
        curves=[_svg(plots.plot_curves, curves, name) for name in logged]
        + [
            _svg(functools.partial(plots.plot_curves, log=True), curves, name)
            for name in logged
            if name.endswith("loss")
        ],
        filters=_filters(run_dirs),
        colour_tables=tables("colour/share", "colour/excess"),
        class_errors=_class_errors(run_dirs),
        hardest_classes=HARDEST_CLASSES,
        size_notes=analysis.size_notes(path),
        tuning_notes=analysis.tuning_notes(path),
        seeds={arm: [seed for of_arm, seed, _ in run_dirs if of_arm == arm] for arm in study["arms"]},
        run_table=_table(runs.dropna(axis="columns", how="all").convert_dtypes(), "runs", is_target=True),
        failures=[
            (run.name, failure["error"]) for *_, run in run_dirs if (failure := run.undamaged(RunDir.read_failure))
        ],
        extended={
            run.name: extensions for *_, run in run_dirs if (extensions := run.undamaged(RunDir.read_extensions))
        },
        damages=damages,
        environment=json.dumps(environments[0], indent=2) if environments else None,
    )


def _table(frame: pd.DataFrame, name: str, *, is_target: bool = False) -> Markup:
    """Return a table as HTML: text left-aligned, numbers right-aligned, arms linked to their descriptions.

    Args:
      name: unique on the page.
      is_target: whether the rows are runs, which the descriptions of the arms link to.
    """
    link = Markup('<a id="{0}-{1}" href="#arm-{0}">{0}</a>' if is_target else '<a href="#arm-{0}">{0}</a>')
    links = [link.format(*names) for names in frame.filter(["arm", "seed"]).itertuples(index=False)]
    styler = Styler(frame.assign(arm=links), uuid=name.replace("/", "-")).hide(axis="index")
    styler.format(_cell, escape="html", na_rep="", subset=frame.columns.drop("arm"))
    text = frame.columns.intersection(list(analysis.TEXT_COLUMNS))
    styler.set_table_styles({heading: [{"selector": "", "props": "text-align: left"}] for heading in text})
    styler.map(
        lambda value: f"color: var({_COLOURS[value]}); font-weight: 600" if value in _COLOURS else "",
        subset=frame.columns.intersection(["verdict", "status"]),
    )
    return Markup(styler.to_html())


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def _class_errors(run_dirs: Runs) -> Markup | None:
    """Return the mean top-1 errors of the classes that are hardest for the first arm, as HTML; None without runs."""
    by_class = [(arm, run.undamaged(RunDir.read_by_class)) for arm, _, run in run_dirs]
    frames = [pd.DataFrame(classes).assign(arm=arm) for arm, classes in by_class if classes]
    if not frames:
        return None
    errors = 100 * pd.concat(frames).pivot_table(index="arm", columns="class", values="top1_error", sort=False)
    hardest = errors[errors.iloc[0].nlargest(HARDEST_CLASSES).index].rename_axis(index=None, columns=None)
    largest = max(float(np.nanmax(hardest)), 1e-9)
    styler = Styler(hardest, uuid="classes").format(precision=1, na_rep="")
    styler.format_index(escape="html", axis="index").format_index(escape="html", axis="columns")
    return Markup(styler.map(lambda error: f"--heat: {np.nan_to_num(error) / largest:.2f}").to_html())


def _filters(run_dirs: Runs) -> dict[str, tuple[str, int]]:
    """Return the first filters of each arm's first finished run: a data URL and the width to show it at, in pixels."""
    first: dict[str, tuple[int, np.ndarray]] = {}
    for arm, seed, run in run_dirs:
        if arm not in first and (filters := run.undamaged(RunDir.read_filters)) is not None:
            first[arm] = seed, filters
    images = {}
    for arm, (seed, filters) in first.items():
        grid = (255 * filter_grid(filters)).round().astype(np.uint8)
        content = base64.b64encode(encode_png(grid)).decode()
        images[f"{arm}/seed_{seed}"] = f"data:image/png;base64,{content}", MAGNIFICATION * grid.shape[1]
    return images


def _svg(plot: Callable[..., Figure], *arguments: Any) -> Markup:
    """Return a plot as SVG, in the text colour of the page instead of black; the error, if it cannot be drawn."""
    buffer = io.StringIO()
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alexnet_jax"}):
            plot(*arguments).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    except Exception as error:  # no plot is worth the report
        return Markup("<p>cannot be drawn: {}</p>").format(repr(error))
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :].replace("#000000", "currentColor"))


def _print(frame: pd.DataFrame, title: str) -> None:
    """Print a table to the terminal."""
    printed = Table(title=title, title_justify="left")
    for heading in frame:
        printed.add_column(str(heading), justify="left" if heading in analysis.TEXT_COLUMNS else "right")
    for row in frame.itertuples(index=False):
        printed.add_row(*map(str, row))
    terminal.console(width=140).print(printed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("study", type=Path, help="folder of a study, such as runs/ablation_lrn")


def main(arguments: argparse.Namespace) -> None:
    """Write the report of the study that the command line names."""
    write(arguments.study)
