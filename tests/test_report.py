"""The report says what the runs say, no more; and it needs no JAX."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import command
from scipy import stats

from alexnet_jax import report

ERRORS = {"lrn": [0.10, 0.12, 0.11], "no_lrn": [0.13, 0.14, 0.16]}


def make_study(folder: Path, errors: dict[str, list[float]], seeds: int | None = None) -> Path:
    """A study's folder as runs leave it; arms with fewer errors than seeds have runs that were not started."""
    count = seeds or max(len(values) for values in errors.values())
    arms = {arm: {} if arm == "lrn" else {"model.lrn.enabled": False} for arm in errors}
    folder.mkdir()
    described = {"name": "lrn?", "arms": arms, "seeds": list(range(count)), "reported": "mnist5k, test"}
    (folder / "study.json").write_text(json.dumps(described))
    for arm, values in errors.items():
        for seed, error in enumerate(values):
            run = folder / arm / f"seed_{seed}"
            run.mkdir(parents=True)
            (run / "env.json").write_text(json.dumps({"jax": "0.0"}))
            records = [
                {"step": step, "epoch": step / 10, "eval/top1_error": error / step, "eval/loss": 1.0} for step in (1, 2)
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records) + '{"step": 3, "ep')
            result = {"steps": 2, "epochs": 0.2, "parameters": 7, "eval/top1_error": error, "seconds": 1.5}
            (run / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def a_study(tmp_path: Path) -> Path:
    return make_study(tmp_path / "study", ERRORS)


def test_intervals_are_student_ts_and_differences_are_paired(a_study: Path) -> None:
    table = report.compare(report.load_runs(a_study))
    one, two = (np.array(ERRORS[arm]) for arm in ("lrn", "no_lrn"))
    for arm, values in (("lrn", one), ("no_lrn", two)):
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        found = table.loc[arm, ["n", "mean", "low", "high"]].tolist()
        np.testing.assert_allclose(found, [3, values.mean(), interval.low, interval.high])
    paired = stats.ttest_rel(two, one).confidence_interval(0.95)
    found = table.loc["no_lrn", ["pairs", "difference", "difference_low", "difference_high"]].tolist()
    np.testing.assert_allclose(found, [3, (two - one).mean(), paired.low, paired.high])
    assert table.loc["lrn", ["difference", "difference_low", "difference_high"]].isna().all()


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    table = report.compare(report.load_runs(make_study(tmp_path / "study", {"lrn": [0.1], "no_lrn": [0.2]})))
    assert table["n"].tolist() == [1, 1]
    assert table["difference"]["no_lrn"] == pytest.approx(0.1)
    assert table[["low", "high", "difference_low", "difference_high"]].isna().all(axis=None)


def test_only_seeds_that_both_arms_finished_are_paired(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", {"lrn": [0.1, 0.2], "no_lrn": [0.15, 0.2, 0.9]})
    (study / "lrn" / "seed_1" / "result.json").unlink()
    runs = report.load_runs(study)
    assert runs["status"].tolist() == ["finished", "unfinished", "not started", *["finished"] * 3]
    table = report.compare(runs)
    assert table["n"].tolist() == [1, 3]
    assert table["pairs"].tolist() == [0, 1]
    assert table["difference"]["no_lrn"] == pytest.approx(0.05)


def test_a_study_with_nothing_finished_still_has_a_report(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", {"lrn": [], "no_lrn": []}, seeds=2)
    report.write(study)
    assert pd.read_csv(study / "results.csv")["status"].tolist() == ["not started"] * 4
    assert "0 of 4 runs finished" in (study / "report.html").read_text()


def test_results_csv_has_a_row_for_each_run(a_study: Path) -> None:
    report.write(a_study)
    results = pd.read_csv(a_study / "results.csv")
    assert tuple(results) == report.COLUMNS
    assert results["arm"].tolist() == ["lrn"] * 3 + ["no_lrn"] * 3
    assert results["eval/top1_error"].tolist() == [*ERRORS["lrn"], *ERRORS["no_lrn"]]


def test_the_printed_table_is_in_percent(a_study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.write(a_study)
    printed = capsys.readouterr().out
    assert re.search(r"lrn\s+│ 3 │ 11\.00 │ +8\.52 to 13\.48", printed)
    assert re.search(r"no_lrn\s+│ 3 │ 14\.33 │ +10\.54 to 18\.13 │ +\+3\.33 │ +-0\.46 to \+7\.13", printed)


def test_the_page_is_self_contained_and_shows_every_arm(a_study: Path) -> None:
    report.write(a_study)
    page = (a_study / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(?!#)""", page.replace("xlink:href", "xlink"))
    assert "<script" not in page
    assert "lrn?" in page
    assert "model.lrn.enabled = False" in page
    assert "Top-1 error on mnist5k, test, %" in page
    assert page.count("<svg") == 2  # of the metrics, these runs recorded two
    for text in ("no_lrn", "eval/top1_error (%)", "eval/loss", "14.33", "-0.46 to +7.13"):
        assert text in page


def test_curves_are_means_with_bands(a_study: Path) -> None:
    figure = report.plot_curves(report.load_curves(a_study), "eval/top1_error")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["lrn", "no_lrn"]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [0.1, 0.2])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [11.0, 5.5])
    band = axes.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [5.0, 12.0])


def test_the_report_is_made_again_without_jax(a_study: Path) -> None:
    script = f"""
import runpy, sys
sys.argv = ["report", {str(a_study)!r}]
runpy.run_module("alexnet_jax.report", run_name="__main__")
assert not {{"jax", "flax", "tensorflow", "alexnet_jax.model"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no_lrn" in done.stdout
    assert (a_study / "report.html").exists()


def test_a_folder_that_is_no_study_is_one_clear_line(tmp_path: Path) -> None:
    done = command("alexnet_jax.report", str(tmp_path))
    assert done.returncode == 1
    assert "is not the folder of a study: it has no study.json" in done.stderr
    assert "Traceback" not in done.stderr
