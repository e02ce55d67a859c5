"""Short forms of the scenarios of experiments/reliability, whose long forms run for hours."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import REPOSITORY

COUNTS = {"kill": 1, "damage": 2}

# One process compiles once for all of them.
SCENARIOS = f"""
import runpy, sys
results, soak = sys.argv[1], runpy.run_path("experiments/reliability/soak.py")
for scenario, count in {COUNTS}.items():
    sys.argv[1:] = [scenario, f"--count={{count}}", f"--results={{results}}"]
    try:
        soak["main"]()
    except SystemExit as end:
        print(scenario, "ends with", int(end.code))
"""


@pytest.mark.slow
def test_scenarios_pass(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    done = subprocess.run(
        [sys.executable, "-c", SCENARIOS, str(results)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{os.environ['PYTHONPATH']}:{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(results.read_text().splitlines()))
    assert [row["scenario"] for row in rows] == list(COUNTS)
    for row in rows:
        assert f"{row['scenario']} ends with 0" in done.stdout
        assert int(row["passed"]) == int(row["tried"]) > 0, done.stdout
