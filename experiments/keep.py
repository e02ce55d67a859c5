"""Copy a study's results and the records of its runs: python experiments/keep.py RUNS/STUDY FOLDER

Writes into FOLDER study.json, results.csv and curves.csv, which pages and tables read, and runs.tar.xz: the configs and
records of all runs, without checkpoints, from which the study continues in any folder of runs:

    mkdir -p runs && tar -xf FOLDER/runs.tar.xz -C runs
"""

import argparse
import shutil
import tarfile
from pathlib import Path

from alexnet_jax.run_dir import StudyDir
from alexnet_jax.studies import report

KEPT = (  # of runs and studies
    *("config.json", "dataset.json", "env.json", "metrics.jsonl", "result.json", "study.json"),
    *("failure.json", "initial.json", "extended.json"),
)


def keep(study: Path, folder: Path) -> None:
    """Write the report of a study, and copy its files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = StudyDir(study)
    report.write(study)
    for file in (files.study_file, files.results_file, files.curves_file):
        shutil.copy(file, folder)
    with tarfile.open(folder / "runs.tar.xz", "w:xz") as tar:
        for file in sorted(path for path in study.rglob("*.json*") if path.name in KEPT):
            tar.add(file, file.relative_to(study.parent))


def main() -> None:
    """Keep the files of the study on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    keep(options.study.resolve(), options.folder)


if __name__ == "__main__":
    main()
