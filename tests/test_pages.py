"""The pages of results say what their studies' files say."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from alexnet_jax.run_dir import StudyDir, write_json
from alexnet_jax.studies import analysis
from experiments import pages
from experiments.figure3 import figure3
from experiments.initialisation import trained


def cells(table: str) -> list[list[str]]:
    """Return the rows of a table in Markdown without its headings."""
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


def test_short_list_of_results_has_the_numbers_of_the_studies() -> None:
    """And the notebook of the contributions says what the verdicts are."""
    said = " ".join((figure3.HERE.parent / "README.md").read_text().split())

    def effects(study: str) -> dict[Any, Any]:
        frame = analysis.claim_effects(figure3.HERE.parent / study)
        return {(row.arm, row.metric): row for row in frame.itertuples() if row.pairs}

    def error_of(study: str, arm: str) -> float:
        """Return the mean difference of the top-1 error."""
        runs = analysis.load_runs(figure3.HERE.parent / study)
        return float(analysis.paired_effects(runs, arm, "eval/top1_error").mean())

    ratios = [effects(f"figure1/{name}")["tanh", "train_eval_epochs_to_25"].effect for name in ("code2012", "fan_in")]
    of_2012, by_fan_in = (f"{ratio:.1f} times as many" for ratio in ratios)
    assert f"tanh takes {of_2012} epochs to 25 % training error with the initial weights of 2012, {by_fan_in}" in said
    found = effects("contributions/cifar10")
    lrn, overlap = found["no_lrn", "eval/top1_error"], found["no_overlap", "eval/top1_error"]
    column = found["one_column", "eval/top1_error"]
    crops, dropout = (found[arm, "generalisation_gap"] for arm in ("no_crops_nor_flips", "no_dropout"))
    assert f"fewer parameters, has {100 * column.effect:.1f} points more test error" in said
    assert f"lowers the test error by {100 * lrn.effect:.1f} points, a third of" in said
    assert lrn.effect / lrn.paper == pytest.approx(1 / 3, abs=0.05)
    (of_2012,) = pd.read_csv(figure3.HERE.parent / "published.csv").query(
        "arm == 'no_lrn' and metric == 'eval/top1_error' and by == '2012 runs'"
    )["effect"]
    relative = 100 * lrn.effect / lrn.reference, 100 * of_2012 / 0.40664  # of run 145
    assert "of the error that is {:.1f} %, where the runs of 2012 had {:.1f} %".format(*relative) in said
    assert f"lower without dropout, by {-100 * error_of('contributions/cifar10', 'no_dropout'):.1f} points" in said
    assert f"{-100 * error_of('contributions/cifar10_5000', 'no_dropout'):.1f} on a tenth" in said
    assert f"{-100 * error_of('dropout', 'no_dropout'):.1f} on digits, and without crops on digits by" in said
    assert f"on digits by {-100 * error_of('augmentation', 'no_crops'):.1f}" in said
    assert f"does not lower the error: without overlap it is {-100 * overlap.effect:.1f} points lower" in said
    assert overlap.high < 0
    assert f"test and training error is {100 * crops.effect:.1f} points larger" in said
    runs = analysis.load_runs(figure3.HERE.parent / "contributions" / "cifar10")
    errors = analysis.compare(runs).loc["no_dropout"]
    assert errors["effect_high"] < 0
    gap_and_error = (
        f"{100 * dropout.effect:.1f} points larger, and the test error {-100 * errors['effect']:.1f} points lower"
    )
    assert f"without it the gap is {gap_and_error}" in said
    tenth = effects("contributions/cifar10_5000")["no_dropout", "generalisation_gap"]
    assert f"With a tenth of the images, and four seeds, the gap is {100 * tenth.effect:.1f} points larger" in said
    assert tenth.pairs == 4
    assert {row.pairs for row in (lrn, overlap, column, crops, dropout)} == {10}
    sizes = analysis.load_study(figure3.HERE.parent / "contributions" / "cifar10")["sizes"]
    fewer = 1 - sizes["one_column"]["parameters"] / sizes["full"]["parameters"]
    assert f"in conv1 to conv4 and {100 * fewer:.0f} % fewer parameters" in said
    digits = effects("pooling")["no_overlap", "eval/top1_error"]
    assert f"On digits overlap lowers the error, by {100 * digits.effect:.1f} points" in said
    photos = effects("contributions/imagenette_small")
    without_crops, without_dropout = (photos[arm, "generalisation_gap"] for arm in ("no_crops_nor_flips", "no_dropout"))
    error = error_of("contributions/imagenette_small", "no_crops_nor_flips")
    gap_and_error = (
        f"{100 * without_crops.effect:.1f} points larger without crops and flips, and the error {100 * error:.1f}"
    )
    assert f"three of five planned seeds) the gap is {gap_and_error} points" in said
    assert f"without dropout the gap is {100 * without_dropout.effect:.1f} points larger, and no change of" in said
    photo_runs = analysis.compare(analysis.load_runs(figure3.HERE.parent / "contributions" / "imagenette_small"))
    for arm in ("no_dropout", "no_colour"):
        low, high, pairs = photo_runs.loc[arm, ["effect_low", "effect_high", "pairs"]].to_numpy(float)
        assert low < 0 < high
        assert pairs == 3
    notebook = (figure3.HERE.parent / "contributions" / "notebook.ipynb").read_text()
    assert f"without them it is {100 * error:.1f} points higher" in notebook
    assert "**LRN** helps, by less than half" in notebook
    assert lrn.verdict == analysis.SMALL_EFFECT
    assert "**Overlapping pooling** does not help" in notebook
    assert overlap.verdict == "contradicted"
    assert "**Dropout** reduces the gap between test and training error, but not the test error" in notebook
    assert dropout.verdict == "reproduced"
    assert "**Two towers** help" in notebook
    assert column.verdict == "reproduced"


def test_committed_page_of_figure_3_is_current() -> None:
    text = (figure3.HERE / "README.md").read_text()
    said = " ".join(text.split())
    assert pages.insert(text, figure3.tables()) == text, "run experiments/figure3/figure3.py"
    small = figure3.read().query("study == @figure3.SMALL")
    clear, expected = (small["p"] < figure3.LEVEL).sum(), figure3.LEVEL * len(small)
    assert f"clearly so in {clear} of {len(small)} runs, where {expected:.1f} are expected by chance" in said
    assert "the towers differ more than by chance on average" in said
    assert float(figure3.over_arms().partition("95 % CI ")[2].split(" to ")[0]) > 0
    more = (small["tower_0"] > small["tower_1"]).groupby(small["seed"]).mean()
    assert "with seed 5 tower 0 has more colour in every arm, with seed 1 tower 1" in said
    assert (more[5], more[1]) == (1, 0)
    assert small[small["seed"].isin([1, 5])]["p"].lt(figure3.LEVEL).sum() == 8
    excess = (small["tower_0"] - small["tower_1"]).abs() - small["by_chance"]
    others = [values for seed, values in excess.groupby(small["seed"]) if seed != 5]
    result = stats.f_oneway(*others)
    assert f"without it F(8, 36) = {result.statistic:.1f}, p = {result.pvalue:.2f}" in said
    paper: dict[Any, Any] = {
        (row.arm, row.seed): row for row in figure3.read().query("study == @figure3.PAPERS").itertuples()
    }
    quarter = figure3.read().query("study == 'Imagenette, a quarter of the paper\\'s filters'")
    assert (len(quarter), (quarter["p"] < figure3.LEVEL).sum()) == (12, 0)
    assert "of the 12 runs with a quarter of its filters, none" in said
    assert "one seed of two has a tower that specialises in colour, with either initial weights" in said
    assert "it is tower 1 from the weights of the text, tower 0 from those of the code" in said
    for arm, tower in (("text", 1), ("code2012", 0)):
        assert paper[arm, 0].p > 0.5
        assert paper[arm, 1].p < 0.01
        assert (paper[arm, 1].tower_0 > paper[arm, 1].tower_1) == (tower == 0)
        assert min(paper[f"{arm}_scaled", seed].p for seed in (0, 1)) > 0.4


def test_colours_are_those_of_the_studies() -> None:
    """The excess of each run is that of its results.csv, but for the number of shuffles."""
    kept = figure3.read().query("arm == 'text'").set_index("seed")
    runs = analysis.load_runs(trained.STUDY).query("arm == 'text' and status == 'finished'").set_index("seed")
    excess = (kept["tower_0"] - kept["tower_1"]).abs() - kept["by_chance"]
    assert excess.to_numpy() == pytest.approx(runs["colour/excess"].to_numpy(), abs=0.01)


def test_tower_of_coloured_filters_has_a_small_p_value(tmp_path: Path) -> None:
    """And towers of which each has some of them have a large one. One column is left out."""
    generator = np.random.default_rng(0)
    grey, coloured = np.repeat(generator.normal(size=(5, 5, 1, 16)), 3, axis=2), generator.normal(size=(5, 5, 3, 16))
    mixed = np.concatenate([grey, coloured], axis=3)[..., generator.permutation(32)]
    for study in figure3.STUDIES:
        folder = StudyDir(tmp_path / study)
        arms: dict[str, Any] = {"apart": {}, "mixed": {}, "one_column": {}}
        described = {"name": study, "reported": "test", "arms": arms, "seeds": [0], "claims": []}
        write_json(folder.study_file, described)
        for arm, filters in {
            "apart": [grey, coloured],
            "mixed": np.split(mixed, 2, axis=3),
            "one_column": [grey],
        }.items():
            run = folder.run(arm, 0)
            write_json(run.result_file, {"steps": 1})
            np.save(run.filters_file, np.stack(filters).astype(np.float32))
    apart, split, *others = figure3.measure(tmp_path)
    assert [run["arm"] for run in others] == 2 * ["apart", "mixed"]  # of the other studies
    assert apart["tower_0"] == pytest.approx(0, abs=1e-6)
    assert apart["tower_1"] > 0.5
    assert apart["p"] == pytest.approx(1 / (1 + figure3.SHUFFLES))
    assert split["p"] > 0.05
    assert split["by_chance"] == pytest.approx(apart["by_chance"], abs=0.02)  # of the same filters


def test_committed_page_of_the_initial_weights_is_current() -> None:
    text = (trained.HERE / "README.md").read_text()
    assert pages.insert(text, trained.table()) == text, "run experiments/initialisation/trained.py"
    counts = {arm.strip("`"): (n, train) for arm, n, train, *_ in cells(trained.table())}
    assert counts.pop("text_scaled") == ("2", "0")
    assert set(counts.values()) == {("2", "2")}
    curves = analysis.load_curves(trained.STUDY).dropna(subset=[trained.ERROR])
    third = curves[curves["epoch"].between(2.9, 3.1)].groupby("arm")[trained.ERROR]
    assert "after three epochs the training error is still above 80 %, with raw pixels about 50 %" in " ".join(
        text.split()
    )
    assert third.min()["code2012_scaled"] > 0.8
    assert third.mean()["code2012"] == pytest.approx(0.5, abs=0.05)
