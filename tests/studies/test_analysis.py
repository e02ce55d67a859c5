"""Statistics of a study, against SciPy's tests of pairs and one-sided tests."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from alexnet_jax.configs import base
from alexnet_jax.run_dir import StudyDir, write_json
from alexnet_jax.studies import analysis

Errors = dict[str, list[float]]
MakeStudy = Callable[..., Path]


def never_reach_25(study: Path, arm: str, seed: int) -> None:
    """Rewrite the metrics of a run so that its training error stays above 25 %."""
    metrics = StudyDir(study).run(arm, seed).metrics_file
    metrics.write_text(metrics.read_text().replace('"train/top1_error": 0.2', '"train/top1_error": 0.4'))


def test_intervals_equal_those_of_scipys_paired_t_test(study: Path, errors: Errors) -> None:
    compared = analysis.compare(analysis.load_runs(study))
    reference, values = (np.array(errors[arm]) for arm in ("lrn", "no_lrn"))
    half = stats.t.ppf(0.975, 2) * stats.sem(reference)
    np.testing.assert_allclose(
        compared.loc["lrn", ["n", "finished", "mean", "low", "high"]].to_numpy(float),
        [3, 3, reference.mean(), reference.mean() - half, reference.mean() + half],
    )
    paired = stats.ttest_rel(values, reference).confidence_interval(0.95)
    np.testing.assert_allclose(
        compared.loc["no_lrn", ["pairs", "effect", "effect_low", "effect_high"]].to_numpy(float),
        [3, (values - reference).mean(), paired.low, paired.high],
    )
    assert compared.loc["lrn", ["effect", "effect_low", "effect_high"]].isna().all()


def test_ratios_are_compared_on_a_logarithmic_scale(study: Path, errors: Errors) -> None:
    ratios = analysis.paired_effects(analysis.load_runs(study), "no_lrn", "eval/top1_error", ratio=True)
    reference, values = (np.array(errors[arm]) for arm in ("lrn", "no_lrn"))
    paired = stats.ttest_rel(np.log(values), np.log(reference)).confidence_interval(0.95)
    np.testing.assert_allclose(
        np.exp(analysis.mean_and_interval(ratios)),
        [stats.gmean(values) / stats.gmean(reference), np.exp(paired.low), np.exp(paired.high)],
    )


def test_one_seed_has_no_interval(make_study: MakeStudy) -> None:
    compared = analysis.compare(analysis.load_runs(make_study({"lrn": [0.1], "no_lrn": [0.2]})))
    assert compared["n"].tolist() == [1, 1]
    assert compared["effect"]["no_lrn"] == pytest.approx(0.1)
    assert compared[["low", "high", "effect_low", "effect_high"]].isna().all(axis=None)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert analysis.mean_and_interval(np.full(3, 0.028)) == pytest.approx((0.028, 0.028, 0.028))


def test_only_seeds_that_both_arms_finished_are_paired(make_study: MakeStudy) -> None:
    study = make_study({"lrn": [0.1, 0.2], "no_lrn": [0.15, 0.2, 0.9]})
    StudyDir(study).run("lrn", 1).result_file.unlink()
    runs = analysis.load_runs(study)
    assert runs["status"].tolist() == ["finished", "unfinished", "not started", *["finished"] * 3]
    compared = analysis.compare(runs)
    assert compared["n"].tolist() == [1, 3]
    assert compared["pairs"].tolist() == [0, 1]
    assert compared["effect"]["no_lrn"] == pytest.approx(0.05)


def test_seeds_of_other_commands_and_failed_runs_have_rows(study: Path) -> None:
    write_json(StudyDir(study).run("lrn", 7).failure_file, {"error": "train/loss is nan", "traceback": ""})
    status = analysis.load_runs(study).set_index(["arm", "seed"])["status"]
    assert (status[("lrn", 7)], status[("no_lrn", 7)]) == ("failed", "not started")


def test_epochs_to_25_are_of_the_first_record_that_reaches_it(study: Path) -> None:
    runs = analysis.load_runs(study).set_index(["arm", "seed"])
    assert runs["epochs_to_25"][("no_lrn", 2)] == pytest.approx(0.6 + 0.16)
    assert runs["steps_to_25"][("lrn", 0)] == 3


def test_epochs_to_25_of_evaluations_are_interpolated() -> None:
    def evaluated(*errors: float) -> list[dict[str, Any]]:
        records = [{"step": 9, "epoch": 0.5, "train/top1_error": 0.3}]
        return records + [{"step": 10 * i, "epoch": i, "train_eval/top1_error": e} for i, e in enumerate(errors, 1)]

    assert analysis.time_to_target(evaluated(0.6, 0.4, 0.2, 0.9)) == {
        "train_eval_epochs_to_25": pytest.approx(2 + 0.15 / 0.2)
    }
    assert analysis.time_to_target(evaluated(0.6, 0.25)) == {"train_eval_epochs_to_25": 2}
    assert analysis.time_to_target(evaluated(0.1)) == {"train_eval_epochs_to_25": 1}
    assert analysis.time_to_target(evaluated(0.6, 0.26)) == {}


def test_runs_that_never_reach_25_are_counted(study: Path) -> None:
    never_reach_25(study, "no_lrn", 0)
    runs = analysis.load_runs(study)
    assert np.isnan(runs.set_index(["arm", "seed"])["epochs_to_25"][("no_lrn", 0)])
    assert analysis.table(runs, "epochs_to_25")[["n", "n reached"]].to_numpy().tolist() == [["3", "3"], ["3", "2"]]
    assert "n reached" not in analysis.table(runs)


def test_effect_of_censored_runs_is_a_bound(study: Path) -> None:
    """A run that ended at epoch 1 above 25 % counts with 1, for the claim of a ratio of epochs to 25 %."""
    measured = analysis.claim_effects(study).iloc[1]
    assert measured["bound"] == ""
    never_reach_25(study, "no_lrn", 0)
    bounded = analysis.claim_effects(study).iloc[1]
    epochs = analysis.load_runs(study).set_index("arm")["epochs_to_25"]
    ratios = np.array([1.0, *epochs["no_lrn"][1:]]) / epochs["lrn"]
    assert (bounded["bound"], bounded["pairs"]) == ("≥", 3)
    assert bounded["effect"] == pytest.approx(stats.gmean(ratios))
    shown = analysis.verdicts(study).iloc[1]
    assert shown["found"].startswith("≥ ")
    assert shown["95 % CI"].startswith("≥ ")
    assert analysis._bounded("≥", analysis._times, np.nan, np.nan) == ""  # of one pair
    never_reach_25(study, "lrn", 1)
    both = analysis.verdicts(study).iloc[1]
    assert (both["found"][0], both["95 % CI"], both["verdict"]) == ("?", "", "inconclusive")


@pytest.mark.parametrize(
    ("effects", "bound", "expected"),
    [
        ([1.0, 1.1, 1.2], "≥", "reproduced"),
        ([1.0, 1.1, 1.2], "≤", "inconclusive"),
        ([-1.0, -1.1, -1.2], "≥", "inconclusive"),
        ([-1.0, -1.1, -1.2], "≤", "contradicted"),
        ([1.0, 1.1, 1.2], "?", "inconclusive"),
        ([0.0, 0.01, -0.01], "≥", "inconclusive"),
        ([0.0, 0.01, -0.01], "", analysis.NO_EFFECT),
    ],
)
def test_bound_decides_only_what_it_excludes(effects: list[float], bound: str, expected: str) -> None:
    assert analysis.verdict(np.array(effects), 0.5, higher=True, bound=bound) == expected


def test_generalisation_gap_is_held_out_minus_training_error(study: Path, errors: Errors) -> None:
    runs = analysis.load_runs(study)
    np.testing.assert_allclose(runs["generalisation_gap"], [error / 2 for arm in errors.values() for error in arm])


def one_sided_tests(effects: np.ndarray, margin: float) -> bool:
    """Return whether two one-sided t-tests at 5 % show that the mean effect is within the margin."""
    above = stats.ttest_1samp(effects, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(effects, margin, alternative="less").pvalue
    return max(above, below) < 0.05


@given(
    mean=st.floats(-3, 3),
    noise=st.lists(st.floats(-1, 1), min_size=2, max_size=10, unique=True),
    margin=st.floats(0.01, 3),
    higher=st.booleans(),
)
def test_verdicts_equal_the_decisions_of_scipys_tests(
    mean: float, noise: list[float], margin: float, higher: bool
) -> None:
    effects = mean + np.array(noise)
    assume(np.ptp(effects) > 1e-3)
    p_value = stats.ttest_1samp(effects, 0).pvalue
    side = (effects.mean() > 0) == higher
    expected = "inconclusive" if p_value > 0.05 else "reproduced" if side else "contradicted"
    if one_sided_tests(effects, margin):
        small = analysis.SMALL_EFFECT if side else analysis.SMALL_OPPOSITE
        expected = analysis.NO_EFFECT if p_value > 0.05 else small
    assert analysis.verdict(effects, margin, higher=higher) == expected


@pytest.mark.parametrize(
    ("effects", "margin", "higher", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.2], 0.05, True, "reproduced"),
        ([0.1, 0.2, 0.3, 0.2], 0.05, False, "contradicted"),
        ([-0.1, -0.2, -0.3, -0.2], 0.05, False, "reproduced"),
        ([-0.1, 0.2, 0.3, -0.2], 0.05, True, "inconclusive"),
        ([0.01, 0.02, 0.01, 0.02], 0.05, True, "small effect (within the margin)"),
        ([-0.01, -0.02, -0.01, -0.02], 0.05, True, "small opposite effect (within the margin)"),
        ([-0.01, -0.02, -0.01, -0.02], 0.05, False, "small effect (within the margin)"),
        ([-np.inf, 0.1, 0.2], 0.05, True, "inconclusive"),
        ([np.nan, 0.1, 0.2], 0.05, False, "inconclusive"),
        ([-0.01, 0.02, 0.01, -0.02], 0.05, True, "no effect (within the margin)"),
        ([0.01, 0.02, 0.01, 0.02], 0.0, True, "reproduced"),
        ([0.0, 0.0, 0.0], 0.05, True, "no effect (within the margin)"),
        ([0.1], 0.05, True, "too few seeds"),
        ([], 0.05, True, "too few seeds"),
    ],
)
def test_verdict_of_each_class(effects: list[float], margin: float, higher: bool, expected: str) -> None:
    assert analysis.verdict(np.array(effects), margin, higher=higher) == expected


@pytest.mark.parametrize(
    ("metric", "size", "margin"),
    [
        ("eval/top1_error", {"difference": 0.014}, 0.007),
        ("eval/top1_error", {"difference": -0.014}, 0.007),
        ("eval/top1_error", {"difference": 0.014, "margin": 0.002}, 0.002),
        ("generalisation_gap", {}, 0.005),
        ("epochs_to_25", {"ratio": 6.0}, 1.25),
        ("epochs_to_25", {"ratio": 6.0, "margin": 1.5}, 1.5),
        ("eval/loss", {}, 0.0),
    ],
)
def test_default_margins(metric: str, size: dict[str, float], margin: float) -> None:
    assert analysis.claim_margin(base.claim("arm", metric, "section 1", **size)) == pytest.approx(margin)


def test_claims_are_compared_with_differences_and_ratios(study: Path) -> None:
    error, epochs = (row for _, row in analysis.verdicts(study).iterrows())
    assert error.tolist() == [
        *(
            "no_lrn",
            "eval/top1_error",
            "11.00",
            "+1.40 (section 3.3)",
            "+3.33",
            "-0.46 to +7.13",
            "3",
            "±0.70",
            "inconclusive",
        )
    ]
    runs = analysis.load_runs(study)
    reference, values = (runs.loc[runs["arm"] == arm, "epochs_to_25"].to_numpy() for arm in ("lrn", "no_lrn"))
    logs = stats.ttest_rel(np.log(values), np.log(reference)).confidence_interval(0.95)
    assert epochs["claim"] == "6 times (<section> 3.1)"
    assert epochs["found"] == f"{stats.gmean(values / reference):.3g} times"
    assert epochs["95 % CI"] == f"{np.exp(logs.low):.3g} to {np.exp(logs.high):.3g}"
    assert (epochs["margin"], epochs["verdict"]) == ("factor 1.25", "reproduced")


def test_claims_of_a_lower_ratio_are_reproduced_below_one(make_study: MakeStudy) -> None:
    claims = [base.claim("no_lrn", "epochs_to_25", "section 4.2", ratio=0.5)]
    assert analysis.verdicts(make_study(claims=claims))["verdict"].tolist() == ["contradicted"]


@pytest.mark.parametrize(
    ("tuning_metric", "tuned", "error", "epochs"),
    [
        ("eval", {"lrn": 2.0, "no_lrn": 2.0}, "inconclusive", "withdrawn: arms tuned on another metric"),
        ("epochs_to_25", {"lrn": 2.0, "no_lrn": 2.0}, "withdrawn: arms tuned on another metric", "reproduced"),
        ("epochs_to_25", {"lrn": 2.0, "no_lrn": 3.0}, "withdrawn: arms tuned", "withdrawn: tuned value at the edge"),
        ("epochs_to_25", {"lrn": 1.0, "no_lrn": 2.0}, "withdrawn: arms tuned", "withdrawn: tuned value at the edge"),
        ("epochs_to_25", {"lrn": 2.0, "no_lrn": 2.0, "another": 1.0}, "withdrawn: arms tuned", "reproduced"),
    ],
)
def test_claims_are_withdrawn_if_one_of_their_arms_was_tuned_otherwise_or_at_the_edge(
    make_study: MakeStudy, tuning_metric: str, tuned: dict[str, float], error: str, epochs: str
) -> None:
    arms = {
        arm: {"chosen": chosen, "scores": {"1.0": 1.5, "2.0": 1.2, "3.0": None}, "at_edge": chosen != 2.0}
        for arm, chosen in tuned.items()
    }
    study = make_study(tuning={"key": "optim.learning_rate", "metric": tuning_metric, "arms": arms})
    found = analysis.verdicts(study)["verdict"]
    assert [verdict.startswith(expected) for verdict, expected in zip(found, (error, epochs), strict=True)] == [
        True
    ] * 2


def test_claims_are_withdrawn_if_runs_of_their_arms_failed(make_study: MakeStudy) -> None:
    """Those that did not fail may be the lucky ones."""
    study = make_study()
    assert not analysis.verdicts(study)["verdict"].str.startswith(analysis.WITHDRAWN).any()
    run = StudyDir(study).run("no_lrn", 0)
    run.result_file.unlink()
    write_json(run.failure_file, {"error": "training has diverged", "traceback": ""})
    assert (analysis.verdicts(study)["verdict"] == f"{analysis.WITHDRAWN}runs failed").all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": "lrn"}, "'lrn': must be about an arm that is compared with 'lrn': no_lrn"),
        ({"metric": "eval/top1"}, "metric='eval/top1' must be one of steps, epochs,"),
        ({"metric": "status"}, "metric='status' must be"),
        ({"margin": 0.0}, "margin=0.0 must be more than 0"),
        ({"difference": None, "ratio": 6.0, "margin": 0.8}, "margin=0.8 must be more than 1"),
    ],
)
def test_claims_that_no_study_can_decide_are_refused(changes: dict[str, Any], message: str) -> None:
    claim = {"arm": "no_lrn", "metric": "eval/top1_error", "difference": 0.014, "ratio": None, "margin": 0.007}
    analysis.check_claim(claim, ["lrn", "no_lrn"])
    with pytest.raises(ValueError, match=re.escape(message)):
        analysis.check_claim(claim | changes, ["lrn", "no_lrn"])


def test_arms_may_have_names_like_numbers(make_study: MakeStudy, tmp_path: Path) -> None:
    """And like missing values: in the files that are kept of a study, too."""
    study = make_study({"0.010": [0.1, 0.2], "0.1": [0.2, 0.4], "None": [0.3, 0.2]})
    kept = StudyDir(tmp_path / "kept")
    kept.path.mkdir()
    shutil.copy(StudyDir(study).study_file, kept.study_file)
    analysis.load_runs(study).to_csv(kept.results_file, index=False)
    compared = analysis.compare(analysis.load_runs(kept.path))
    assert compared["pairs"].to_dict() == {"0.010": 0, "0.1": 2, "None": 2}


def test_study_without_claims_has_no_verdicts(make_study: MakeStudy) -> None:
    assert analysis.verdicts(make_study(claims=[])).empty


def test_files_kept_of_a_study_give_the_same_tables_as_its_runs(study: Path, tmp_path: Path) -> None:
    kept = StudyDir(tmp_path / "kept")
    kept.path.mkdir()
    shutil.copy(StudyDir(study).study_file, kept.study_file)
    analysis.load_runs(study).to_csv(kept.results_file, index=False)
    analysis.load_curves(study).to_csv(kept.curves_file, index=False)
    for metric in ("eval/top1_error", "epochs_to_25"):
        pd.testing.assert_frame_equal(
            analysis.table(analysis.load_runs(kept.path), metric), analysis.table(analysis.load_runs(study), metric)
        )
    pd.testing.assert_frame_equal(analysis.verdicts(kept.path), analysis.verdicts(study))
    pd.testing.assert_frame_equal(analysis.load_curves(kept.path), analysis.load_curves(study), check_dtype=False)


def test_claims_of_older_studies_have_default_margins(study: Path) -> None:
    description = analysis.load_study(study)
    verdicts = analysis.verdicts(study)
    for claim in description["claims"]:
        claim.pop("margin")
    write_json(StudyDir(study).study_file, description)
    pd.testing.assert_frame_equal(analysis.verdicts(study), verdicts)


def test_size_notes_list_what_differs_from_the_first_arm(make_study: MakeStudy) -> None:
    sizes = {
        "lrn": {"parameters": 7, "maps": {"conv1": "5x5x2", "logits": "10"}},
        "no_lrn": {"parameters": 1234, "maps": {"conv1": "4x4x2", "conv2": "3x3x2", "logits": "9"}},
    }
    note = "parameters 7 to 1,234; conv1 5x5x2 to 4x4x2; conv2 none to 3x3x2"
    assert analysis.size_notes(make_study(sizes=sizes)) == {"lrn": "", "no_lrn": note}


@pytest.mark.parametrize(
    ("chosen", "scores", "note"),
    [
        (None, {"0.1": None, "0.2": None}, f"rate: {analysis.NONE_FOUND}. Tuned by METRIC (SCORES)"),
        (0.01, {"0.001": 0.2, "0.01": 0.1, "0.1": None}, "rate = 0.01. Tuned by METRIC (SCORES)"),
        (0.1, {"0.001": 0.2, "0.01": 0.3, "0.1": 0.1}, f"rate = 0.1, {analysis.AT_EDGE}. Tuned by METRIC (SCORES)"),
    ],
)
def test_tuning_notes_report_values_at_the_edge_of_the_grid(
    make_study: MakeStudy, chosen: float | None, scores: dict[str, float | None], note: str
) -> None:
    tuned: dict[str, Any] = {"chosen": chosen, "scores": scores, "at_edge": chosen == 0.1}
    tuning = {"key": "rate", "metric": "validation/top1_error", "arms": {"lrn": tuned}}
    shown = ", ".join(f"{value}: {'failed' if s is None else f'{100 * s:.2f} %'}" for value, s in scores.items())
    expected = note.replace("METRIC", "validation/top1_error").replace("SCORES", shown)
    assert analysis.tuning_notes(make_study(tuning=tuning)) == {"lrn": expected}


def test_tuning_notes_of_epochs_say_which_values_never_reached_the_error(make_study: MakeStudy) -> None:
    tuned = {"chosen": 0.01, "scores": {"0.001": None, "0.01": 14.0, "0.1": 23.0}, "at_edge": False}
    study = make_study(tuning={"key": "rate", "metric": "epochs_to_25", "arms": {"lrn": tuned}})
    expected = "rate = 0.01. Tuned by epochs_to_25 (0.001: never reached or failed, 0.01: 14, 0.1: 23)"
    assert analysis.tuning_notes(study) == {"lrn": expected}


def test_studies_that_tuned_nothing_have_no_tuning_notes(study: Path) -> None:
    assert json.loads(StudyDir(study).study_file.read_text())["tuning"] is None
    assert analysis.tuning_notes(study) == {}


def test_folder_without_study_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no study\.json"):
        analysis.load_runs(tmp_path)
