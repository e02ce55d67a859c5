"""The plan's numbers are those of the script that it names."""

import math
import runpy

import numpy as np
import pytest
from scipy import stats

from support import REPOSITORY

POWER = runpy.run_path(str(REPOSITORY / "experiments" / "power.py"))


def test_plan_has_the_tables_of_power() -> None:
    plan = (REPOSITORY / "experiments" / "PLAN.md").read_text()
    assert all(table in plan for table in POWER["tables"]())


def test_power_is_the_fraction_of_simulated_tests() -> None:
    values = np.random.default_rng(0).standard_normal((20_000, 9))
    seen = stats.ttest_1samp(values, -1.0, axis=1).pvalue < 0.05
    assert POWER["power_of_difference"](9, 1.0) == pytest.approx(seen.mean(), abs=0.01)
    half = stats.t.ppf(0.95, 8) * values.std(axis=1, ddof=1) / math.sqrt(9)
    assert POWER["power_of_equivalence"](9, 1.2) == pytest.approx(
        (abs(values.mean(axis=1)) + half < 1.2).mean(), abs=0.01
    )
