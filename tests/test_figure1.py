"""Figure 1 is drawn from the kept files of its runs, its intervals include the choice of the rate, and it continues."""

import importlib
import json
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from alexnet_jax.run_dir import RunDir, StudyDir, write_json
from alexnet_jax.studies import analysis
from support import REPOSITORY


@pytest.fixture
def figure1() -> ModuleType:
    return importlib.import_module("experiments.figure1.figure1")


def write_run(run: RunDir, *errors: float, finished: bool = True) -> None:
    """Write a run whose training error after each epoch is given."""
    records = [{"step": i, "epoch": float(i), "train_eval/top1_error": error} for i, error in enumerate(errors, 1)]
    run.path.mkdir(parents=True)
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (run.checkpoints / "1").mkdir(parents=True)
    (run.checkpoints / "1" / "array").write_text("large")
    if finished:
        write_json(run.result_file, {"steps": len(errors), "epochs": float(len(errors)), "eval/top1_error": 0.5})


@pytest.fixture
def kept(figure1: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Collect a study in which tanh takes twice as long as ReLU, but for a seed that was censored after 5 epochs."""
    study = StudyDir(tmp_path / "runs" / "figure1_code2012")
    claims = [{"arm": "tanh", "metric": figure1.METRIC, "source": "figure 1", "difference": None, "ratio": 6.0}]
    arms = {"relu": {}, "tanh": {"model.activation": "tanh"}}
    tuning = {"key": "optim.learning_rate", "metric": figure1.METRIC, "arms": {}}
    seeds = {"name": "figure1", "reported": "test", "arms": arms, "seeds": [0, 1], "claims": claims, "tuning": tuning}
    write_json(study.study_file, seeds)
    key = "optim.learning_rate"
    write_run(study.trial("relu", key, 0.001, 1000), 0.5, 0.4, 0.25)
    write_run(study.trial("relu", key, 0.003, 1000), 0.5, 0.25)
    write_run(study.trial("tanh", key, 0.01, 1000), 0.5, 0.4, 0.3, 0.3, finished=False)
    write_run(study.trial("tanh", key, 0.03, 1000), 0.5, 0.4, 0.35, 0.25)
    for seed in (0, 1):
        write_run(study.run("relu", seed), 0.5, 0.25)
    write_run(study.run("tanh", 0), 0.5, 0.4, 0.35, 0.25)
    write_run(study.run("tanh", 1), 0.5, 0.4, 0.35, 0.3, 0.3)
    monkeypatch.setattr(figure1, "HERE", tmp_path / "kept")
    figure1.HERE.mkdir()
    figure1.collect(tmp_path / "runs")
    return figure1.HERE


def test_table_shows_censored_runs_as_bounds(figure1: ModuleType, kept: Path) -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in figure1.table().splitlines()[2:]]
    assert rows[0] == ["weights of 2012", "relu", "0.003", "2.0", "", "2", "2", "2.0", "", "", ""]
    assert rows[1][:8] == ["weights of 2012", "tanh", "0.03", "4.0", "2.00", "2", "1", "≥ 4.5"]
    assert rows[1][8] == f"≥ {(2 * 2.5) ** 0.5:.3g} times"
    assert figure1.rate_table().splitlines()[2:] == [
        "| weights of 2012 | relu | 3.0 | 2.0 |  |  |",
        "| weights of 2012 | tanh |  |  | ≥ 4.0 | 4.0 |",
    ]
    figure1.draw()
    assert all("<svg" in (kept / name).read_text() for name in ("figure1.svg", "curves.svg"))


def test_trial_that_is_not_finished_is_censored(figure1: ModuleType, kept: Path) -> None:
    times = figure1.trial_times(kept / "code2012")
    assert times["tanh"][0.01] == {1000: figure1.Time(4.0, censored=True)}
    assert figure1.best_rate(times["tanh"]) == 0.03


def test_trial_that_failed_at_once_keeps_its_learning_rate_from_being_chosen(
    figure1: ModuleType, kept: Path, tmp_path: Path
) -> None:
    study = StudyDir(tmp_path / "runs" / "figure1_code2012")
    write_run(study.trial("relu", "optim.learning_rate", 0.003, 1001), finished=False)
    figure1.collect(tmp_path / "runs")
    times = figure1.trial_times(kept / "code2012")["relu"]
    assert times[0.003][1001] == figure1.Time(0.0, censored=True)
    assert figure1.best_rate(times) == 0.001


def test_study_continues_from_the_archive(figure1: ModuleType, kept: Path, tmp_path: Path) -> None:
    with tarfile.open(kept / "code2012" / "runs.tar.xz") as tar:
        assert not [name for name in tar.getnames() if "checkpoints" in name]
        tar.extractall(tmp_path / "elsewhere", filter="data")
    before, after = (analysis.load_runs(tmp_path / name / "figure1_code2012") for name in ("runs", "elsewhere"))
    pd.testing.assert_frame_equal(before, after)


def test_interval_includes_the_choice_of_the_rate(figure1: ModuleType) -> None:
    def times(*epochs: float) -> dict[int, Any]:
        return {seed: figure1.Time(value, censored=False) for seed, value in enumerate(epochs)}

    finals = {"relu": times(2.0, 2.0), "tanh": times(8.0, 8.0)}
    clear = {"relu": {0.003: times(2, 2, 2), 0.01: times(4, 4, 4)}, "tanh": {0.01: times(8, 8, 8)}}
    assert figure1.ratio_interval(clear, finals, "tanh", "relu") == pytest.approx((4.0, 4.0))
    # In samples that draw the second tuning seed often, the other rate is better, and its times are 1.
    unclear = clear | {"relu": {0.003: times(2, 2, 2), 0.01: times(4, 1, 4)}}
    low, high = figure1.ratio_interval(unclear, finals, "tanh", "relu")
    assert low < 3
    assert high > 5
    # Without another choice, the interval is that of the paired t-test.
    spread = {"relu": times(2.0, 2.5, 3.0, 2.2), "tanh": times(8.0, 9.0, 13.0, 8.0)}
    differences = [np.log(spread["tanh"][i].epochs / spread["relu"][i].epochs) for i in range(4)]
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    interval = figure1.ratio_interval(clear, spread, "tanh", "relu")
    assert np.mean(np.log(interval)) == pytest.approx(np.mean(differences))
    assert np.ptp(np.log(interval)) == pytest.approx(np.ptp(expected), rel=0.05)
    # A bound has no interval; learning rates may have been tried with other seeds.
    censored = finals | {"tanh": {0: figure1.Time(8.0, censored=False), 1: figure1.Time(9.0, censored=True)}}
    assert figure1.ratio_interval(clear, censored, "tanh", "relu") is None
    shifted = {seed + 1: time for seed, time in times(9, 9, 9, 9).items()}
    others = clear | {"tanh": {0.01: times(8, 8, 8, 8), 0.03: shifted}}
    assert figure1.ratio_interval(others, finals, "tanh", "relu") == pytest.approx((4.0, 4.0))
    few = {"relu": {0.003: times(2, 2, 2)}, "tanh": {0.01: times(8, 8, 8), 0.03: times(9)}}
    assert figure1.ratio_interval(few, finals, "tanh", "relu") == pytest.approx((4.0, 4.0))
    few["tanh"][0.03] = times(7)  # might be the best
    assert figure1.ratio_interval(few, finals, "tanh", "relu") is None


def test_committed_tables_and_the_sentences_about_them_are_current(figure1: ModuleType) -> None:
    text = (figure1.HERE / "README.md").read_text()
    assert figure1.pages.insert(text, figure1.tables()) == text, "run experiments/figure1/figure1.py"
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in figure1.table().splitlines()[2:]]
    by_arm = {(study, arm): cells for study, arm, *cells in rows}
    relu, tanh = (float(by_arm["weights of 2012", arm][5]) for arm in ("relu", "tanh"))
    front_page = (REPOSITORY / "README.md").read_text()
    assert f"ReLU is at 25 % after {relu:.0f} epochs, tanh after {tanh:.0f}]" in front_page
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    sentences = {  # study: what is said, seeds, and the ratios that it describes
        "code2012": ("tanh takes about seven times as many epochs as ReLU", "Ten fresh seeds", "10", (6.5, 7.4)),
        "fan_in": ("With weights by fan-in, tanh takes about three times as many", "Ten fresh seeds", "10", (2.6, 3.4)),
        "code2012_5000": ("tanh takes about twice as many", "Three fresh seeds", "3", (1.8, 2.3)),
        "fan_in_5000": ("no difference is seen: tanh takes 1.07 times", "Five fresh seeds", "5", (1.06, 1.21)),
    }
    for study, (sentence, seeds, n, (low, high)) in sentences.items():
        _, _, trials, found, _, _, ratio, *_ = by_arm[figure1.STUDIES[study], "tanh"]
        assert any(sentence in paragraph and f"{seeds} " in paragraph for paragraph in paragraphs)
        assert found == n
        assert low < float(ratio.removesuffix(" times")) < high
        assert low < float(trials) < high
    said = " ".join(text.split())
    assert "takes 1.43 times as many epochs as ReLU, and the interval, 1.29 to 1.58, lies below" in said
    assert by_arm["weights of 2012, 5,000 images", "scaled_tanh"][6:8] == ["1.43 times", "1.29 to 1.58"]
    assert by_arm["weights of 2012, 5,000 images", "tanh"][7] == "1.93 to 2.24"
    assert "The scaled tanh takes 0.834 times as many as ReLU, 0.547 to 1.27: no difference is seen either" in said
    assert by_arm["weights by fan-in, 5,000 images", "scaled_tanh"][6:8] == ["0.834 times", "0.547 to 1.27"]
    assert "the interval, 0.70 to 1.65, contains 1 and excludes 2" in said
    assert by_arm["weights by fan-in, 5,000 images", "tanh"][7] == "0.695 to 1.65"
    changes = {}
    for row in figure1.weights_table().splitlines()[2:]:
        images, what, _, ratio, interval = (cell.strip() for cell in row.split("|")[1:-1])
        changes[images, what] = float(ratio.removesuffix(" times")), *map(float, interval.split(" to "))
    ratio, low, high = changes["50,000", "tanh / relu"]
    assert f"the factor is about half as large**, {ratio} times, 95 % CI {low} to {high}" in said
    assert "about twice as many epochs by fan-in; no change of tanh is seen" in said
    assert changes["50,000", "relu"][0] == pytest.approx(2, abs=0.2)
    assert changes["50,000", "tanh"][1] < 1 < changes["50,000", "tanh"][2]
    assert "The three seeds that both initial weights have are too few to say" in said
    assert changes["5,000", "tanh / relu"][1] < 1 < changes["5,000", "tanh / relu"][2]
    interval, with_choice = by_arm["weights of 2012", "tanh"][7:]
    assert float(interval.split(" to ")[0]) > 6  # as the page says, below the interval
    assert with_choice == interval
    slow = analysis.load_runs(figure1.HERE / "fan_in").set_index("seed")
    relu, tanh = (slow[slow["arm"] == arm][figure1.METRIC] for arm in ("relu", "tanh"))
    assert sorted(relu.round().astype(int))[-2:] == [16, 21]
    assert relu.nsmallest(8).round().between(9, 13).all()
    assert f"the median of the ratios is {(tanh / relu).median():.2f}" in said
    few = analysis.load_runs(figure1.HERE / "fan_in_5000")
    few = few[few["seed"] != few[few["arm"] == "relu"].set_index("seed")[figure1.METRIC].idxmax()]
    without = [
        np.exp(analysis.mean_and_interval(analysis.paired_effects(few, arm, figure1.METRIC, ratio=True)))
        for arm in ("tanh", "scaled_tanh")
    ]
    shown = " and ".join("{:.2f} ({:.2f} to {:.2f})".format(*numbers) for numbers in without)
    assert f"without that seed the ratios are {shown}" in said
    tenth, all_images = (
        analysis.load_runs(figure1.HERE / name).query("arm == 'tanh'")[figure1.METRIC]
        for name in ("code2012_5000", "code2012")
    )
    fewer = 1 - stats.gmean(tenth.dropna()) / stats.gmean(all_images.dropna())
    assert f"tanh {100 * fewer:.0f} % fewer, at a higher learning rate" in said
