"""The plan's numbers are those of the script that it names, and its commands are studies."""

import math
import runpy
import shlex
import subprocess

import numpy as np
import pytest
from scipy import stats

from alexnet_jax import config as config_lib
from alexnet_jax.studies import runner
from support import REPOSITORY

PLAN = REPOSITORY / "experiments" / "PLAN.md"
POWER = runpy.run_path(str(REPOSITORY / "experiments" / "power.py"))


def test_plan_has_the_tables_of_power() -> None:
    plan = PLAN.read_text()
    assert all(table in plan for table in POWER["tables"]())


def test_power_is_the_fraction_of_simulated_tests() -> None:
    values = np.random.default_rng(0).standard_normal((20_000, 9))
    seen = stats.ttest_1samp(values, -1.0, axis=1).pvalue < 0.05
    assert POWER["power_of_difference"](9, 1.0) == pytest.approx(seen.mean(), abs=0.01)
    half = stats.t.ppf(0.95, 8) * values.std(axis=1, ddof=1) / math.sqrt(9)
    assert POWER["power_of_equivalence"](9, 1.2) == pytest.approx(
        (abs(values.mean(axis=1)) + half < 1.2).mean(), abs=0.01
    )


def test_every_command_of_the_plan_is_a_study() -> None:
    """Runs the plan's commands in a shell in which programs print their arguments."""
    code = "".join(line for line in PLAN.read_text().splitlines(keepends=True) if line.startswith("    "))
    code = code.replace(" & ", "; ")  # so that what they print is not mixed
    stubs = 'python() { printf "%s\\0" "$@"; }; nice() { shift 2; "$@"; }\n'
    stubs += "".join(f"{program}() {{ :; }}\n" for program in ("alexnet-jax", "nvidia-cuda-mps-control", "tar"))
    printed = subprocess.run(["bash", "-c", stubs + code], capture_output=True, text=True, check=True).stdout
    specs = [argument for argument in printed.split("\0") if argument.startswith("--config=")]
    assert len(specs) >= 12
    for spec in specs:
        file, *flags = shlex.split(spec)
        overrides = [flag for flag in flags if flag.startswith("--config.")]
        study = config_lib.load_study(file.removeprefix("--config="), overrides)
        only = [arm for flag in flags if flag.startswith("--only=") for arm in flag.removeprefix("--only=").split(",")]
        assert {flag.partition("=")[0] for flag in flags if flag not in overrides} <= {"--only", "--seeds", "--workdir"}
        folder = PLAN.parent / "absent"
        for run in runner.plan(study, folder, only) + runner.trials(study, folder, only):
            config_lib.validate(run.config)
