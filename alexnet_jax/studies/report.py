"""What a study found: `python -m alexnet_jax.report runs/ablation_lrn`, and the functions that a notebook calls.

Imports neither JAX nor the model, so it works wherever the files are.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from alexnet_jax import kernels, page, records
from alexnet_jax.plots import plot_arms, plot_curves, plot_figure_1
from alexnet_jax.results import (
    DERIVED,
    METRICS,
    compare,
    load_curves,
    load_runs,
    load_study,
    run_folders,
    size_notes,
    table,
    verdict,
    verdicts,
)

__all__ = [
    "compare",
    "load_curves",
    "load_runs",
    "load_study",
    "plot_arms",
    "plot_curves",
    "plot_figure_1",
    "table",
    "verdict",
    "verdicts",
    "write",
]


def write(study: Path | str) -> None:
    """Writes ``results.csv``, ``curves.csv`` and ``report.html`` into the study's folder and prints what was found."""
    study = Path(study)
    runs = load_runs(study)
    records.write_text(study / "results.csv", runs.to_csv(index=False))
    records.write_text(study / "curves.csv", load_curves(study).to_csv(index=False, float_format="%.6g"))
    records.write_text(study / "report.html", _page(study))
    _print(table(runs), f"top-1 error on {load_study(study)['reported']}, %")
    if len(said := verdicts(study)):
        _print(said, "the paper's claims; differences of errors in points")
    for arm, note in size_notes(study).items():
        if note:
            print(f"{arm} is another size: {note}")
    for status, count in runs["status"].value_counts().items():
        if status != "finished":
            print(f"{count} run(s) {status}: the study's command goes on with them")
    print(f"{study / 'results.csv'}  {study / 'report.html'}\ntensorboard --logdir {study}")


CLASSES_SHOWN = 25
_RULE = """The 95 % interval (Student's t) of the effect, paired by seed, decides: reproduced, if it lies on the side
that the paper says; opposite, if on the other; not distinguishable, if it contains no effect at all. The size of the
paper's effect is not judged. Differences of errors are in points."""
_COMPARISON = "Mean over seeds with its 95 % interval, and the difference to the first arm, paired by seed."
_FIGURE_1 = "Training error against epochs, means over seeds. In the paper tanh units took six times as long to 25 %."
_CURVES = """Lines: mean over seeds. Bands: from the lowest to the highest seed. train/ is of the augmented batches,
with dropout on; train_eval/ of training images that are seen as the held-out ones are. Losses also on a logarithmic
axis."""
_KERNELS = "Of each arm's first seed, one tower above the other; each kernel to its own scale, grey is zero."
_COLOUR = """colour/share: the share of the first kernels' energy off the grey axis. colour/excess: the difference
between the two towers' shares, less what it would be if the same kernels were dealt to the towers by chance. The paper
says that in every run one tower is for colour (section 6.1): then its interval lies above 0."""
_CLASSES = f"The {CLASSES_SHOWN} classes that are hardest for the first arm, where there are more."


def _page(study: Path) -> str:
    """The report: one page with everything in it. A section that has nothing to show is left out."""
    described, runs, curves, folders = load_study(study), load_runs(study), load_curves(study), run_folders(study)
    links = {arm: page.anchor(f"arm {arm}") for arm in described["arms"]}

    def tables(*metrics: str) -> str:
        return "".join(page.table(table(runs, name), links=links) for name in metrics if runs[name].notna().any())

    sections = {}
    if len(said := verdicts(study)):
        sections["What the paper says, and what was found"] = page.text(_RULE) + page.table(said, links=links)
    finished = (runs["status"] == "finished").sum()
    sections[f"Top-1 error on {described['reported']}"] = (
        page.text(f"{finished} of {len(runs)} runs finished. {_COMPARISON}")
        + page.table(table(runs), links=links)
        + page.plots(plot_arms(runs))
    )
    sections["Other measures"] = tables("eval/top5_error", *DERIVED, "images_per_second")
    if any("model.activation" in changes for changes in described["arms"].values()):
        sections["Figure 1"] = page.text(_FIGURE_1) + page.plots(plot_figure_1(curves))
    recorded = [metric for metric in METRICS if metric in curves and curves[metric].notna().any()]
    figures = [plot_curves(curves, metric) for metric in recorded]
    figures += [plot_curves(curves, metric, log=True) for metric in recorded if metric.endswith("loss")]
    sections["Learning curves"] = page.text(_CURVES) + page.plots(*figures)
    if pictures := _kernels(folders):
        sections["Figure 3: the first kernels"] = page.text(_KERNELS) + page.pictures(pictures, magnified=4)
    if colours := tables("colour/share", "colour/excess"):
        sections["Is one tower for colour?"] = page.text(_COLOUR) + colours
    if (errors := _by_class(folders)) is not None:
        sections["Errors by class"] = page.text(f"In percent, means over seeds. {_CLASSES}") + page.heat(errors)
    sections["Arms"] = _arms(study, described, links)
    sections["Runs"] = page.table(_shown(runs), links=links, marked=True)
    failures = [(folder, records.read_json(folder / records.FAILURE)) for *_, folder in folders]
    sections["What failed"] = page.text(
        *(f"{folder.parent.name}, {folder.name}: {failure['error']}" for folder, failure in failures if failure)
    )
    environments = [found for *_, folder in folders if (found := records.read_json(folder / "env.json"))]
    sections["Environment of the first run"] = page.preformatted(
        json.dumps(environments[0], indent=2) if environments else ""
    )
    return page.page(described["name"], sections)


def _arms(study: Path, described: dict[str, Any], links: dict[str, str]) -> str:
    """What each arm changes, whether its net is another size, and what it tried before it was trained."""
    notes, tuning = size_notes(study), described.get("tuning") or {"arms": {}}
    shown = []
    for arm, changes in described["arms"].items():
        lines = [f"Changes {', '.join(f'{key} = {value}' for key, value in changes.items()) or 'nothing'}."]
        if notes.get(arm):
            lines.append(f"Another size: {notes[arm]}.")
        if found := tuning["arms"].get(arm):
            errors = (f"{v}: {'failed' if e is None else f'{100 * e:.2f} %'}" for v, e in found["errors"].items())
            lines.append(f"{tuning['key']} was chosen by the error on validation images ({', '.join(errors)}).")
        runs = {f"seed {seed}": page.anchor(f"{arm} {seed}") for of_arm, seed, _ in run_folders(study) if of_arm == arm}
        shown.append(page.part(arm, links[arm], *lines) + page.links(runs))
    return "".join(shown)


def _kernels(folders: list[tuple[str, int, Path]]) -> dict[str, np.ndarray]:
    """A picture for each arm that has a finished run."""
    shown: dict[str, np.ndarray] = {}
    for arm, seed, folder in folders:
        if (folder / "kernels.npy").exists() and not any(name.startswith(f"{arm}, ") for name in shown):
            shown[f"{arm}, seed {seed}"] = kernels.picture(np.load(folder / "kernels.npy"))
    return shown


def _by_class(folders: list[tuple[str, int, Path]]) -> pd.DataFrame | None:
    """Mean top-1 errors of the classes that are hardest for the first arm: a row for each arm; None without runs."""
    found = [
        pd.DataFrame(of_run).assign(arm=arm)
        for arm, _, folder in folders
        if (of_run := records.read_json(folder / "by_class.json"))
    ]
    if not found:
        return None
    errors = pd.concat(found).pivot_table(index="arm", columns="class", values="top1_error", sort=False)
    return errors[errors.iloc[0].nlargest(CLASSES_SHOWN).index]


def _shown(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs as people read them, without columns that are empty."""
    shown = runs.dropna(axis="columns", how="all")
    return shown.map(lambda value: "" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value))


def _print(frame: pd.DataFrame, title: str) -> None:
    printed = Table(title=title, title_justify="left")
    for heading in frame:
        printed.add_column(str(heading), justify="left" if heading in ("arm", "metric", "the paper") else "right")
    for row in frame.itertuples(index=False):
        printed.add_row(*map(str, row))
    Console(width=max(Console().width, 120)).print(printed)


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
