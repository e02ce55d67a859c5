"""The report of a study: its files, and that it needs no JAX."""

import html
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
import pytest

from alexnet_jax.run_dir import DamagedFileError, StudyDir, write_json
from alexnet_jax.studies import analysis, plots, report

Errors = dict[str, list[float]]
MakeStudy = Callable[..., Path]


def write_page(study: Path) -> str:
    """Write the report and return the page."""
    report.write(study)
    return StudyDir(study).report_file.read_text()


def test_study_without_finished_runs_has_a_report(make_study: MakeStudy) -> None:
    study = make_study({"lrn": [], "no_lrn": []}, seeds=2)
    assert "0 of 4 runs finished" in write_page(study)
    assert pd.read_csv(study / "results.csv")["status"].tolist() == ["not started"] * 4


@pytest.mark.slow
def test_results_csv_has_a_row_for_each_run(study: Path, errors: Errors) -> None:
    report.write(study)
    results = pd.read_csv(study / "results.csv")
    assert tuple(results) == analysis.COLUMNS
    assert results["arm"].tolist() == ["lrn"] * 3 + ["no_lrn"] * 3
    assert results["eval/top1_error"].tolist() == [*errors["lrn"], *errors["no_lrn"]]


def test_printed_table_is_in_percent(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.write(study)
    printed = capsys.readouterr().out
    assert re.search(r"lrn\s+│ 3 │ +11\.00 │ +8\.52 to 13\.48", printed)
    assert re.search(r"no_lrn\s+│ 3 │ +14\.33 │ +10\.54 to 18\.13 │ +\+3\.33 │ +-0\.46 to \+7\.13", printed)


def test_page_is_self_contained_and_its_links_lead_somewhere(study: Path) -> None:
    page = write_page(study)
    targets = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert all(target.startswith(("#", "data:")) for target in targets)
    links = {target[1:] for target in re.findall(r'<a[^>]* href="([^"]*)"', page)}
    assert links <= set(re.findall(r'id="([^"]*)"', page))
    assert {"arm-lrn", "arm-no_lrn", "lrn-0", "no_lrn-2", "runs"} <= links
    assert "<script" not in page


def test_page_shows_claims_arms_and_curves(study: Path) -> None:
    page = write_page(study)
    assert page.count("<svg") == 6  # claims, arms, the curves of three metrics, and the loss on a logarithmic axis
    for text in ("(&lt;section&gt; 3.1)", "lrn?", "model.lrn.enabled = False", "Top-1 error on mnist5k, test"):
        assert text in page
    for text in ("eval/top1_error (%)", "eval/loss", "14.33", "-0.46 to +7.13", "±0.70"):
        assert text in page


def test_verdicts_are_coloured(study: Path) -> None:
    page = write_page(study)
    for verdict, colour in (("inconclusive", "--neutral"), ("reproduced", "--good")):
        cell = re.search(rf'id="(\w+)"[^>]*>{verdict}</td>', page)
        assert cell
        assert re.search(rf"#{cell[1]}\b[^{{]*{{\s*color: var\({colour}\)", page)


def test_text_is_left_aligned_and_numbers_are_not(make_study: MakeStudy) -> None:
    page = write_page(make_study({"2_towers": [0.1, 0.2], "1_tower": [0.1, 0.3]}, claims=[]))
    aligned = re.search(r"(#T_error[^{]*){\s*text-align: left", page)
    assert aligned
    assert re.findall(r"\.col\d+", aligned[1]) == [".col0"]


def test_text_of_the_study_is_escaped(make_study: MakeStudy) -> None:
    arms = {"<b>": {"data.name": "<i>"}, "c&d": {}}
    study = make_study({"<b>": [0.1], "c&d": [0.2]}, arms=arms, claims=[], name="<u>", reported="<s>")
    write_json(StudyDir(study).run("c&d", 1).failure_file, {"error": "<em>"})
    write_json(StudyDir(study).run("c&d", 0).by_class_file, {"class": ["<tt>"], "top1_error": [0.5]})
    page = write_page(study)
    for text in ("<b>", "<i>", "<u>", "<s>", "<em>", "<tt>", "c&d"):
        assert text not in page
        assert html.escape(text) in page


def test_page_shows_filters_of_the_first_finished_run_of_each_arm(study: Path) -> None:
    for arm, seed in (("lrn", 1), ("lrn", 2), ("no_lrn", 0)):
        np.save(StudyDir(study).run(arm, seed).filters_file, np.ones((2, 5, 5, 3, 4), np.float32))
    page = write_page(study)
    names = re.findall(r'<img alt="([^"]*)" width="(\d+)" src="data:image/png;base64,', page)
    assert names == [("lrn/seed_1", "96"), ("no_lrn/seed_0", "96")]  # 4 filters of 5 pixels and a gap, magnified


def test_page_shows_the_classes_that_are_hardest_for_the_first_arm(study: Path) -> None:
    for arm, values in (("lrn", [0.1, 0.4, 0.2]), ("no_lrn", [0.3, 0.2, 0.1])):
        by_class = {"class": ["cat", "dog", "fox"], "top1_error": values}
        write_json(StudyDir(study).run(arm, 0).by_class_file, by_class)
    table = re.search(r'<table id="T_classes">.*?</table>', write_page(study), re.DOTALL)
    assert table
    assert re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", table[0]) == [
        *("&nbsp;", "dog", "fox", "cat"),
        *("lrn", "40.0", "20.0", "10.0"),
        *("no_lrn", "20.0", "10.0", "30.0"),
    ]


def test_notes_on_size_and_tuning_are_printed_and_on_the_page(
    make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {arm: {"parameters": count, "maps": {}} for arm, count in (("lrn", 7), ("no_lrn", 8))}
    tuned = {"chosen": 0.1, "scores": {"0.01": 0.2, "0.1": 0.1}, "at_edge": True}
    tuning = {"key": "optim.learning_rate", "metric": "validation/top1_error", "arms": {"lrn": tuned}}
    page = write_page(make_study(sizes=sizes, tuning=tuning))
    printed = capsys.readouterr().out
    for text in ("parameters 7 to 8", "0.1, at the edge of the grid: the optimum may lie outside"):
        assert text in page
        assert text in printed


def test_failures_are_on_the_page(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(StudyDir(study).run("lrn", 7).failure_file, {"error": "train/loss is nan by step 5", "traceback": ""})
    assert "lrn/seed_7: train/loss is nan by step 5" in write_page(study)
    assert "1 run(s) failed; re-run the study's command to continue" in capsys.readouterr().out


def test_writing_again_leaves_the_page_identical(study: Path) -> None:
    assert write_page(study) == write_page(study)


def test_browser_shows_the_page_without_scrolling_sideways(study: Path, tmp_path: Path) -> None:
    """Chromium lays the page out in a frame of 400 pixels, in dark mode; tables scroll in boxes of their own."""
    chromium = shutil.which("chromium")
    if chromium is None:
        absent = pytest.fail if "CI" in os.environ else pytest.skip
        absent("Chromium is what lays the page out: apt-get install chromium")
    measure = """<script>onload = () => {
        const page = document.querySelector("iframe").contentDocument, text = page.querySelector("svg text");
        document.title = [page.documentElement.scrollWidth, getComputedStyle(text).fill]}</script>"""
    frame = f'<iframe style="width: 400px; height: 20000px; border: 0" srcdoc="{html.escape(write_page(study))}">'
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f'<!DOCTYPE html><meta name="color-scheme" content="dark">{measure}{frame}</iframe>')
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    dark = "--blink-settings=preferredColorScheme=0"
    done = subprocess.run(
        [chromium, *options, dark, "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "<title>400,rgb(255, 255, 255)</title>" in done.stdout


@pytest.mark.slow
def test_report_of_a_kept_study_that_lacks_a_newer_metric(study: Path, tmp_path: Path) -> None:
    kept = StudyDir(tmp_path / "kept")
    kept.path.mkdir()
    shutil.copy(StudyDir(study).study_file, kept.study_file)
    analysis.load_runs(study).drop(columns="train_eval_epochs_to_25").to_csv(kept.results_file, index=False)
    analysis.load_curves(study).to_csv(kept.curves_file, index=False)
    assert "no_lrn" in write_page(kept.path)


def test_no_other_process_writes_a_report_from_reading_to_writing(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the one that read the runs first could overwrite the other's, which may have more of them."""
    lock = filelock.FileLock(StudyDir(study).lock_file, timeout=0, is_singleton=False)
    load, write = analysis.load_runs, report.write_text
    tried: list[Callable[..., Any]] = []

    def locked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with pytest.raises(filelock.Timeout), lock:
                pass
            tried.append(function)
            return function(*arguments)

        return call

    monkeypatch.setattr(analysis, "load_runs", locked(load))
    monkeypatch.setattr(report, "write_text", locked(write))
    report.write(study)
    assert len(tried) > 3
    with lock:
        pass


def test_report_does_not_import_jax(study: Path) -> None:
    script = f"""
import sys
from alexnet_jax.studies import report
report.write({str(study)!r})
assert not {{"jax", "flax", "tensorflow", "alexnet_jax.model"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no_lrn" in done.stdout


DAMAGED_FILES = (
    "config.json",
    "env.json",
    "metrics.jsonl",
    "filters.npy",
    "by_class.json",
    "result.json",
    "failure.json",
)


@pytest.mark.parametrize("file", DAMAGED_FILES)
def test_damaged_file_costs_no_other_run(study: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    damaged = StudyDir(study).run("no_lrn", 1)
    (damaged.path / file).write_bytes(b"\x00{<b>\n")
    page, printed = write_page(study), capsys.readouterr().out
    assert html.escape(str(damaged.path / file)) in page
    assert f"no_lrn/seed_1: {damaged.path / file}" in printed
    results = pd.read_csv(study / "results.csv")
    without_numbers = file in ("metrics.jsonl", "result.json")
    statuses = ["finished"] * 4 + ["damaged" if without_numbers else "finished", "finished"]
    assert results["status"].tolist() == statuses
    assert results["eval/top1_error"].notna().tolist() == [status == "finished" for status in statuses]


def test_checkpoint_that_was_set_aside_is_on_the_page(study: Path) -> None:
    (StudyDir(study).run("lrn", 1).checkpoints / "damaged_6").mkdir(parents=True)
    assert "damaged_6: could not be read, and was set aside" in write_page(study)


@pytest.mark.parametrize(
    ("file", "content"), [("results.csv", b"\xff\n"), ("curves.csv", b""), ("results.csv", b"x\n1\n")]
)
def test_damaged_summary_is_named(study: Path, file: str, content: bytes) -> None:
    report.write(study)
    for arm in ("lrn", "no_lrn"):
        shutil.rmtree(study / arm)
    (study / file).write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"{file}: .*must be a table of runs"):
        report.write(study)


def test_plot_that_cannot_be_drawn_costs_no_report(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no <font>")

    monkeypatch.setattr(plots, "plot_arms", fail)
    page = write_page(study)
    assert "<p>cannot be drawn: RuntimeError(&#39;no &lt;font&gt;&#39;)</p>" in page
    assert page.count("<svg") == 5


def test_names_are_no_markup(make_study: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"[bold]lrn": [0.1, 0.2], "$\\frac$ :smile:": [0.2, 0.3]}
    page = write_page(make_study(names, claims=[]))
    printed = capsys.readouterr().out
    assert "cannot be drawn" not in page
    for name in names:
        assert f" {name} " in printed
        assert page.count(f">{name}</text>") == page.count("<svg")
