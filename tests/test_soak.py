"""Short forms of the scenarios of experiments/reliability, whose long forms run for hours."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import REPOSITORY


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "count"), [("kill", 1), ("damage", 5), ("files", 3)])
def test_scenario_passes(tmp_path: Path, scenario: str, count: int) -> None:
    results = tmp_path / "results.csv"
    arguments = [scenario, f"--count={count}", f"--results={results}"]
    done = subprocess.run(
        [sys.executable, "experiments/reliability/soak.py", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = csv.DictReader(results.read_text().splitlines())
    assert (row["scenario"], row["passed"]) == (scenario, row["tried"])
