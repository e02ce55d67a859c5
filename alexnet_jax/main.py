"""Train and evaluate every run of a study, then write its report.

python -m alexnet_jax.main --config=configs/ablation_lrn.py[:SCALE] [--config.KEY=VALUE ...]

Re-run the command to resume: finished runs are skipped, interrupted runs continue.
"""

import argparse
import sys
from pathlib import Path

from alexnet_jax import parallel
from alexnet_jax.__main__ import run_verb
from alexnet_jax.studies import runner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--config", required=True, help="the study's file, and its scale after a colon")
    parser.add_argument("--workdir", type=Path, help="the study's folder; default: runs/ and the name of the file")
    parser.add_argument("--dry_run", action="store_true", help="print the runs and their sizes, train nothing")
    parser.add_argument("--only", default="", help="arms to run, separated by commas; default: all")
    parser.add_argument("--seeds", help="seeds to run, as 0:5 or 0,2,4; default: the study's")


def main(arguments: argparse.Namespace) -> None:
    """Run a study; raise ValueError, before any run is started, if one cannot run as configured."""
    study = arguments.config
    workdir = arguments.workdir or Path("runs", arguments.config_name)
    if arguments.seeds is not None:
        study.seeds = runner.parse_seeds(arguments.seeds)
    only = arguments.only.split(",") if arguments.only else []
    parallel.initialize(study.model.towers)
    if arguments.dry_run:
        runner.print_plan(study, workdir, only)
    elif failed := runner.run_study(study, workdir, only):
        names = "; ".join(run.name for run in failed)
        sys.exit(f"alexnet-jax run: {len(failed)} run(s) failed: {names}; re-run the command to try them again")


if __name__ == "__main__":
    run_verb("run", sys.argv[1:])
