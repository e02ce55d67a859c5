"""Draw the curves of the study `initialisation` and write its table.

python experiments/initialisation/trained.py --runs=RUNS    # keep the files of the study in RUNS, then draw
python experiments/initialisation/trained.py                # draw the files in imagenette/, beside the script
"""

from pathlib import Path

import matplotlib as mpl

from alexnet_jax.studies import analysis, plots
from experiments import pages
from experiments.keep import keep

HERE = Path(__file__).resolve().parent
STUDY = HERE / "imagenette"
ERROR = "train_eval/top1_error"
TRAINS_BELOW = 0.8  # training error; chance is 0.9. The criterion of PLAN.md


def collect(runs: Path) -> None:
    """Keep the files of the study in a folder of runs."""
    keep(runs / "initialisation_imagenette", STUDY)


def table() -> str:
    """Return a row for each arm, in Markdown: its seeds that train, and their errors after the last epoch."""
    rows = [["weights, pixels", "n", "train", "training error, %", "top-1 error, held out, %"]]
    for arm, runs in analysis.load_runs(STUDY).query("status == 'finished'").groupby("arm", sort=False):
        errors = [", ".join(f"{100 * value:.1f}" for value in runs[metric]) for metric in (ERROR, "eval/top1_error")]
        rows.append([f"`{arm}`", str(len(runs)), str((runs[ERROR] < TRAINS_BELOW).sum()), *errors])
    return pages.markdown(rows)


def draw() -> None:
    """Draw the training errors."""
    mpl.rcParams["svg.hashsalt"] = "curves.svg"  # the same file each time
    figure = plots.plot_curves(analysis.load_curves(STUDY), ERROR)
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    pages.renew(__doc__, HERE, collect, draw, table)
