"""The report says what the runs say, no more; and it needs no JAX."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import TEXT, Browser
from conftest import command
from scipy import stats

from alexnet_jax import report
from alexnet_jax.results import COLUMNS
from configs import base

CLAIMS = (
    base.claim("no_lrn", "eval/top1_error", "section 3.3", difference=0.014),
    base.claim("no_lrn", "epochs_to_25", "<section> 3.1", ratio=6.0),
)
ERRORS = {"lrn": [0.10, 0.12, 0.11], "no_lrn": [0.13, 0.14, 0.16]}


def make_study(folder: Path, errors: dict[str, list[float]], seeds: int | None = None) -> Path:
    """A study's folder as runs leave it; arms with fewer errors than seeds have runs that were not started."""
    count = seeds or max(len(values) for values in errors.values())
    arms = {arm: {} if arm == "lrn" else {"model.lrn.enabled": False} for arm in errors}
    folder.mkdir()
    sizes = {arm: {"parameters": 7, "maps": {"conv1": "5x5x2"}} for arm in errors}
    described = {"name": "lrn?", "arms": arms, "seeds": list(range(count)), "reported": "mnist5k, test"}
    described |= {"sizes": sizes, "claims": list(CLAIMS), "tuning": None}
    (folder / "study.json").write_text(json.dumps(described))
    for arm, values in errors.items():
        for seed, error in enumerate(values):
            run = folder / arm / f"seed_{seed}"
            run.mkdir(parents=True)
            (run / "env.json").write_text(json.dumps({"jax": "0.0"}))
            records = [
                {"step": step, "epoch": step / 10, "eval/top1_error": error / step, "eval/loss": 1.0} for step in (1, 2)
            ]
            records += [{"step": 3, "epoch": 0.3 * (1 + (arm != "lrn")) + error, "train/top1_error": 0.25}]
            records += [{"step": 4, "epoch": 1.0, "train/top1_error": 0.2}]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records) + '{"step": 3, "ep')
            result = {"steps": 2, "epochs": 0.2, "parameters": 7, "eval/top1_error": error, "seconds": 1.5}
            result["train_eval/top1_error"] = error / 2
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
    found = table.loc["no_lrn", ["pairs", "effect", "effect_low", "effect_high"]].tolist()
    np.testing.assert_allclose(found, [3, (two - one).mean(), paired.low, paired.high])
    assert table.loc["lrn", ["effect", "effect_low", "effect_high"]].isna().all()


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    table = report.compare(report.load_runs(make_study(tmp_path / "study", {"lrn": [0.1], "no_lrn": [0.2]})))
    assert table["n"].tolist() == [1, 1]
    assert table["effect"]["no_lrn"] == pytest.approx(0.1)
    assert table[["low", "high", "effect_low", "effect_high"]].isna().all(axis=None)


def test_only_seeds_that_both_arms_finished_are_paired(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", {"lrn": [0.1, 0.2], "no_lrn": [0.15, 0.2, 0.9]})
    (study / "lrn" / "seed_1" / "result.json").unlink()
    runs = report.load_runs(study)
    assert runs["status"].tolist() == ["finished", "unfinished", "not started", *["finished"] * 3]
    table = report.compare(runs)
    assert table["n"].tolist() == [1, 3]
    assert table["pairs"].tolist() == [0, 1]
    assert table["effect"]["no_lrn"] == pytest.approx(0.05)


def test_a_study_with_nothing_finished_still_has_a_report(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", {"lrn": [], "no_lrn": []}, seeds=2)
    report.write(study)
    assert pd.read_csv(study / "results.csv")["status"].tolist() == ["not started"] * 4
    assert "0 of 4 runs finished" in (study / "report.html").read_text()


def test_results_csv_has_a_row_for_each_run(a_study: Path) -> None:
    report.write(a_study)
    results = pd.read_csv(a_study / "results.csv")
    assert tuple(results) == COLUMNS
    assert results["arm"].tolist() == ["lrn"] * 3 + ["no_lrn"] * 3
    assert results["eval/top1_error"].tolist() == [*ERRORS["lrn"], *ERRORS["no_lrn"]]


def test_the_printed_table_is_in_percent(a_study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.write(a_study)
    printed = capsys.readouterr().out
    assert re.search(r"lrn\s+│ 3 │ +11\.00 │ +8\.52 to 13\.48", printed)
    assert re.search(r"no_lrn\s+│ 3 │ +14\.33 │ +10\.54 to 18\.13 │ +\+3\.33 │ +-0\.46 to \+7\.13", printed)


def test_the_page_is_self_contained_and_shows_every_arm(a_study: Path) -> None:
    report.write(a_study)
    page = (a_study / "report.html").read_text()
    targets = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert all(target.startswith(("#", "data:")) for target in targets)
    inner = {target[1:] for target in targets if target.startswith("#") and not target.startswith(("#m", "#C"))}
    assert inner <= set(re.findall(r'id="([^"]*)"', page))
    assert {"arm-lrn", "arm-no-lrn", "lrn-0", "no-lrn-2"} <= inner  # arm and runs lead to each other
    assert "<script" not in page
    assert "(&lt;section&gt; 3.1)" in page
    assert "lrn?" in page
    assert "model.lrn.enabled = False" in page
    assert "Top-1 error on mnist5k, test" in page
    assert page.count("<svg") == 5  # the arms, the curves of three metrics, and the loss on a logarithmic axis
    for text in ("no_lrn", "eval/top1_error (%)", "eval/loss", "14.33", "-0.46 to +7.13"):
        assert text in page


@pytest.mark.parametrize(
    ("interval", "nothing", "higher", "said"),
    [
        ((0.1, 0.3), 0.0, True, "reproduced"),
        ((-0.1, 0.3), 0.0, True, "not distinguishable"),
        ((-0.3, -0.1), 0.0, True, "opposite"),
        ((-0.3, -0.1), 0.0, False, "reproduced"),
        ((1.2, 5.0), 1.0, True, "reproduced"),
        ((0.8, 5.0), 1.0, True, "not distinguishable"),
        ((0.3, 0.7), 1.0, False, "reproduced"),
        ((np.nan, np.nan), 0.0, True, "too few seeds"),
    ],
)
def test_the_interval_decides_on_a_claim(interval: tuple, nothing: float, higher: bool, said: str) -> None:
    assert report.verdict(*interval, nothing=nothing, higher=higher) == said


def test_claims_are_held_against_differences_and_ratios(a_study: Path) -> None:
    error, epochs = (row for _, row in report.verdicts(a_study).iterrows())
    assert error[["the paper", "found", "verdict"]].tolist() == ["+1.40 (section 3.3)", "+3.33", "not distinguishable"]
    runs = report.load_runs(a_study)
    one, two = (runs.loc[runs["arm"] == arm, "epochs_to_25"].to_numpy() for arm in ("lrn", "no_lrn"))
    logs = stats.ttest_1samp(np.log(two / one), 0).confidence_interval(0.95)
    assert epochs["found"] == f"{stats.gmean(two / one):.3g} times"
    assert epochs["its 95 % interval"] == f"{np.exp(logs.low):.3g} to {np.exp(logs.high):.3g}"
    assert epochs["verdict"] == "reproduced"


def test_what_was_kept_of_a_study_says_the_same_as_its_runs(a_study: Path, tmp_path: Path) -> None:
    report.write(a_study)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("study.json", "results.csv", "curves.csv"):
        (kept / name).write_bytes((a_study / name).read_bytes())
    pd.testing.assert_frame_equal(report.table(report.load_runs(kept)), report.table(report.load_runs(a_study)))
    pd.testing.assert_frame_equal(report.verdicts(kept), report.verdicts(a_study))
    for load in (report.load_runs, report.load_curves):
        pd.testing.assert_frame_equal(load(kept), load(a_study), check_dtype=False, check_exact=False)


def test_when_an_error_was_reached_is_its_first_record(a_study: Path) -> None:
    runs = report.load_runs(a_study).set_index(["arm", "seed"])
    assert runs.loc[("no_lrn", 2), "epochs_to_25"] == pytest.approx(0.6 + 0.16)
    assert runs.loc[("lrn", 0), "steps_to_25"] == 3
    metrics = a_study / "lrn" / "seed_0" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('_error": 0.2', '_error": 0.3'))
    assert np.isnan(report.load_runs(a_study).set_index(["arm", "seed"]).loc[("lrn", 0), "steps_to_25"])


def test_the_generalisation_gap_is_what_held_out_images_add_to_the_error(a_study: Path) -> None:
    runs = report.load_runs(a_study)
    np.testing.assert_allclose(runs["generalisation_gap"], [error / 2 for arm in ERRORS.values() for error in arm])


def test_figure_1_is_the_training_error_against_epochs_and_its_goal(a_study: Path) -> None:
    (axes,) = report.plot_figure_1(report.load_curves(a_study)).axes
    one, two, goal = axes.lines
    assert (one.get_linestyle(), two.get_linestyle()) == ("-", "--")  # in the paper, too
    np.testing.assert_allclose(sorted(one.get_ydata()), [20, 25, 25, 25])
    np.testing.assert_allclose(goal.get_ydata(), [25, 25])


def test_losses_are_also_on_a_logarithmic_axis(a_study: Path) -> None:
    curves = report.load_curves(a_study)
    scales = [report.plot_curves(curves, "eval/loss", log=log).axes[0].get_yscale() for log in (False, True)]
    assert scales == ["linear", "log"]


def test_an_arm_of_another_size_says_so(a_study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = json.loads((a_study / "study.json").read_text())
    described["sizes"]["no_lrn"] = {"parameters": 1234, "maps": {"conv1": "4x4x2", "conv2": "3x3x2"}}
    (a_study / "study.json").write_text(json.dumps(described))
    report.write(a_study)
    note = "parameters 7 to 1,234; conv1 5x5x2 to 4x4x2; conv2 none to 3x3x2"
    assert f"no_lrn is another size: {note}" in capsys.readouterr().out
    assert note in (a_study / "report.html").read_text()


def test_failed_runs_and_other_commands_seeds_are_in_the_report(a_study: Path) -> None:
    failed = a_study / "lrn" / "seed_7"
    failed.mkdir()
    (failed / "failure.json").write_text(json.dumps({"error": "train/loss is nan by step 5", "traceback": ""}))
    runs = report.load_runs(a_study).set_index(["arm", "seed"])["status"]
    assert (runs[("lrn", 7)], runs[("no_lrn", 7)]) == ("failed", "not started")
    report.write(a_study)
    assert "lrn, seed_7: train/loss is nan by step 5" in (a_study / "report.html").read_text()


@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_the_page_without_scrolling_sideways(a_study: Path, browser: Browser, width: int) -> None:
    report.write(a_study)
    colours = []
    for dark in (False, True):
        browser.open((a_study / "report.html").as_uri(), width, 900, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert "not distinguishable" in browser.evaluate(TEXT)
        style = "getComputedStyle(document.querySelector('svg text')).fill"
        colours.append(browser.evaluate(style))
    assert colours == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]


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
