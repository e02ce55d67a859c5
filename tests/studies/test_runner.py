"""A study runs what is missing, tunes its arms on images of their own, and starts nothing where an arm cannot run."""

import argparse
import errno
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import filelock
import jax
import pandas as pd
import pytest
from markupsafe import Markup
from ml_collections import ConfigDict

from alexnet_jax import model, stop, train
from alexnet_jax.__main__ import run_verb
from alexnet_jax.checkpoint import TrainedNetwork, save_run
from alexnet_jax.config import as_json
from alexnet_jax.configs import ablation_lrn, base
from alexnet_jax.data import prepare, sources
from alexnet_jax.data.loader import train_batches
from alexnet_jax.evaluate import evaluate_runs
from alexnet_jax.run_dir import RunDir, StudyDir, read_json, write_json, write_text
from alexnet_jax.studies import analysis, report, runner
from alexnet_jax.tools import predict, summary
from support import SHALLOW, run_config


@pytest.mark.parametrize(
    ("spec", "name"),
    [("configs/ablation_lrn.py", "ablation_lrn"), ("configs/ablation_lrn.py:cifar10", "ablation_lrn_cifar10")],
)
def test_scales_of_a_study_have_folders_of_their_own(spec: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[argparse.Namespace] = []
    monkeypatch.setattr(runner, "main", called.append)
    run_verb("run", [f"--config={spec}"])
    assert [arguments.config_name for arguments in called] == [name]


def tiny_study(**changes: Any) -> ConfigDict:
    config = ablation_lrn.get_config()
    config.update_from_flattened_dict(SHALLOW | {"train.epochs": 0.004, "seeds": (0,), **changes})
    return config


def tuned_study(*choices: float, **changes: Any) -> ConfigDict:
    """Return a study of two arms without claims that tunes the learning rate."""
    tuning = {"tuning.key": "optim.learning_rate", "tuning.choices": choices, "tuning.epochs": 0.002}
    config = tiny_study(**tuning | changes)
    config.arms = ConfigDict({"relu": {}, "tanh": {"model": {"activation": "tanh"}}}, sort_keys=False)
    config.claims = ()
    return config


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Replace training by a function that takes no time; its calls are (arm, folder).

    The nearer a learning rate is to 0.02, the lower the error, and the earlier it reaches 25 % training error: at one
    epoch for each 0.01 of distance, except that rates under 0.005 never do. Tanh is best at half the rate. Seed 1001
    has an error of 0.1 more. A learning rate of more than 1 fails.
    """
    calls: list[tuple[str, Path]] = []

    def train_and_evaluate(config: ConfigDict, workdir: Path, labels: dict[str, Any]) -> None:
        folder = RunDir(workdir)
        folder.check(as_json(config))
        if folder.result:
            return
        calls.append((labels["arm"], workdir))
        rate = config.optim.learning_rate
        if rate > 1:
            raise FloatingPointError("train/loss is nan")
        write_json(folder.config_file, as_json(config))
        distance = abs(rate - (0.01 if config.model.activation == "tanh" else 0.02))
        records = [{"step": 1, "epoch": 0.0, "train/top1_error": 0.9}]
        if rate >= 0.005:
            records.append({"step": 2, "epoch": 100 * distance, "train/top1_error": 0.25})
        write_text(folder.metrics_file, "".join(json.dumps(record) + "\n" for record in records))
        error = distance + 0.1 * (config.seed == 1001)
        validation = {"validation/top1_error": error, "validation/loss": 1.0} if config.data.validation_split else {}
        result = {
            "eval/top1_error": 1 - error,
            "eval/top5_error": 0.0,
            "steps": len(records),
            "epochs": config.train.epochs,
        }
        write_json(folder.result_file, result | validation)

    monkeypatch.setattr(runner.train, "train_and_evaluate", train_and_evaluate)
    monkeypatch.setattr(report, "_svg", lambda *_: Markup(""))  # test_report.py has the plots
    return calls


@pytest.mark.slow
def test_seeds_are_added_to_finished_runs(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    runner.run_study(tiny_study(), tmp_path, only=["lrn"])
    results = {path: content for path, content in files(tmp_path).items() if path.name == "result.json"}
    assert [path.parent for path in results] == [tmp_path / "lrn" / "seed_0"]
    assert runner.run_study(tiny_study(seeds=(0, 1)), tmp_path, only=["lrn", "no_lrn"]) == []
    assert len(trained) == 4
    assert files(tmp_path).items() >= results.items()
    table = pd.read_csv(tmp_path / "results.csv")
    rows = {(arm, seed): status for arm, seed, status in table[["arm", "seed", "status"]].itertuples(index=False)}
    arms = {"lrn": "finished", "no_lrn": "finished", "lrn_after_pooling": "not started"}
    assert rows == {(arm, seed): status for arm, status in arms.items() for seed in (0, 1)}


@pytest.mark.slow
def test_another_config_is_refused_before_anything_is_written(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    runner.run_study(tiny_study(), tmp_path, only=["lrn"])
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"seed_0 holds a run of another config \(optim.momentum was 0.9, is 0.8\)"):
        runner.run_study(tiny_study(**{"seeds": (0, 1, 2), "optim.momentum": 0.8}), tmp_path)
    assert files(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("selected", [{"only": ["no_lrn"]}, {"seeds": (1, 2)}])
def test_runs_of_another_config_are_refused_beside_those_that_are_not_selected(
    selected: dict[str, Any], trained: list[tuple[str, Path]], tmp_path: Path
) -> None:
    """Otherwise a study would compare arms, or pair seeds, of different configs."""
    runner.run_study(tiny_study(), tmp_path, only=["lrn"])
    study = tiny_study(**{"optim.momentum": 0.8, "seeds": selected.get("seeds", (0,))})
    with pytest.raises(
        ValueError, match=r"lrn/seed_0 holds a run of another config \(optim.momentum was 0.9, is 0.8\)"
    ):
        runner.run_study(study, tmp_path, selected.get("only", ["lrn"]))
    assert len(trained) == 1


@pytest.mark.slow
def test_grid_of_one_arm_is_extended_beside_finished_runs(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    config = tuned_study(0.01, 0.02)
    assert runner.run_study(config, tmp_path) == []
    config.tuning.choices_by_arm = ConfigDict({"tanh": (0.01, 0.02, 0.005)})
    assert runner.run_study(config, tmp_path, ["tanh"]) == []
    config.tuning.choices_by_arm = ConfigDict({"relu": (0.01, 0.02, 0.03), "tanh": (0.01, 0.02, 0.005)})
    assert runner.run_study(config, tmp_path, ["tanh"]) == []
    assert len(trained) == 4 + 2 + 1


@pytest.mark.slow
def test_trials_are_not_extended(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    """Without a length of their own, they would have that of the runs, and could choose anew."""
    config = tuned_study(0.01, 0.02, **{"tuning.epochs": None})
    assert runner.run_study(config, tmp_path) == []
    trained.clear()
    config.train.epochs = 0.008
    with pytest.raises(ValueError, match=r"must come with --config\.tuning\.epochs=N"):
        runner.run_study(config, tmp_path, extend=True)
    config.tuning.epochs = 0.004
    assert runner.run_study(config, tmp_path, extend=True) == []
    assert [folder for _, folder in trained] == [tmp_path / arm / "seed_0" for arm in ("relu", "tanh")]


@pytest.mark.parametrize("name", ["a/b", "a,b", ""])
def test_arm_that_names_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    study = tiny_study()
    study.arms = ConfigDict({"lrn": {}, name: {}}, sort_keys=False)
    with pytest.raises(ValueError, match="must be the name of a folder"):
        runner.run_study(study, tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_claim_that_cannot_be_decided_is_refused_before_training(tmp_path: Path) -> None:
    study = tiny_study()
    study.claims = (base.claim("no_lrn", "eval/top1", "my notes", difference=0.01),)
    with pytest.raises(ValueError, match="metric='eval/top1' must be one of"):
        runner.run_study(study, tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_finished_runs_are_extended(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    """And those that have not begun run to the same end."""
    runner.run_study(tiny_study(), tmp_path, only=["lrn"])
    longer = tiny_study(**{"train.epochs": 0.008})
    with pytest.raises(ValueError, match="give --extend"):
        runner.run_study(longer, tmp_path, only=["lrn", "no_lrn"])
    trained.clear()
    assert runner.run_study(longer, tmp_path, only=["lrn", "no_lrn"], extend=True) == []
    assert [arm for arm, _ in trained] == ["lrn", "no_lrn"]
    results = [StudyDir(tmp_path).run(arm, 0).result or {} for arm in ("lrn", "no_lrn")]
    assert [result["epochs"] for result in results] == [0.008, 0.008]
    assert "train.epochs was 0.004, is 0.008, from step 1 on" in StudyDir(tmp_path).report_file.read_text()


def test_workdir_that_is_a_run_is_refused(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    write_json(RunDir(tmp_path).config_file, as_json(run_config()))
    before = files(tmp_path)
    for run in (runner.run_study, runner.print_plan):
        with pytest.raises(ValueError, match=f"is a run; give another one, and --init_from={tmp_path} to start from"):
            run(tiny_study(), tmp_path)
    assert (trained, files(tmp_path)) == ([], before)


def test_workdir_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.train, "open_run", None)
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(
            ValueError, match=r"must be a folder that can be written, and .*file is a file; name another"
        ):
            runner.run_study(tiny_study(), workdir)
    monkeypatch.setattr(runner.os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=f"and {tmp_path} cannot be written"):
        runner.run_study(tiny_study(), tmp_path / "new" / "runs")


@pytest.mark.slow
def test_study_starts_from_weights_and_says_so(
    trained: list[tuple[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_source(classes: int) -> None:
        config, source = run_config(**SHALLOW), RunDir(tmp_path / "source")
        shutil.rmtree(source.path, ignore_errors=True)
        variables = model.init(config.model, classes, (23, 23, 1), 3)
        save_run(source, TrainedNetwork(config, classes, variables), train.new_state(config, variables), {})

    make_source(10)
    monkeypatch.chdir(tmp_path)
    flags = ["--workdir=study", "--only=lrn", "--init_from=source", "--config", ""]

    def main(*more: str) -> None:
        parser = argparse.ArgumentParser()
        runner.add_arguments(parser)
        arguments = parser.parse_args([*flags, *more])
        arguments.config, arguments.config_name = tiny_study(seeds=(0, 1)), "study"
        runner.main(arguments)

    main("--new_head")
    study = StudyDir(tmp_path / "study")
    assert [folder for _, folder in trained] == [Path("study/lrn/seed_0"), Path("study/lrn/seed_1")]
    for seed in (0, 1):
        of_run = study.run("lrn", seed).read_config()
        assert of_run is not None
        assert (of_run.train.init_from, of_run.train.new_head) == (str(tmp_path / "source"), True)
    assert (
        f"Every run starts from the weights of {tmp_path / 'source'}; the last layer" in study.report_file.read_text()
    )
    with pytest.raises(ValueError, match=r"train.new_head was True, is False"):
        main()
    make_source(3)
    flags[0] = "--workdir=other"
    with pytest.raises(ValueError, match="must have a last layer of the 10 classes of mnist5k"):
        main()
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_failed_run_is_recorded_and_the_others_run(
    trained: list[tuple[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_study(seeds=(0, 1))
    config.arms = ConfigDict({"wild": {"optim": {"learning_rate": 1e9}}, "tame": {}}, sort_keys=False)
    config.claims = ()
    write_json(tmp_path / "tame" / "seed_0" / "failure.json", {"error": "no power", "traceback": ""})
    failed = runner.run_study(config, tmp_path)
    assert [run.name for run in failed] == ["wild/seed_0", "wild/seed_1"]
    assert not (tmp_path / "tame" / "seed_0" / "failure.json").exists()
    assert [arm for arm, _ in trained] == ["wild", "tame", "wild", "tame"]
    assert "wild/seed_0 failed: train/loss is nan" in capsys.readouterr().out
    failure = read_json(tmp_path / "wild" / "seed_0" / "failure.json")
    assert failure is not None
    assert failure["error"] == "train/loss is nan"
    assert "FloatingPointError" in failure["traceback"]
    runs = analysis.load_runs(tmp_path).set_index(["arm", "seed"])["status"]
    assert runs.to_dict() == {
        (arm, seed): status for arm, status in (("wild", "failed"), ("tame", "finished")) for seed in (0, 1)
    }

    trained.clear()
    assert len(runner.run_study(config, tmp_path)) == 2
    assert [arm for arm, _ in trained] == ["wild", "wild"]  # failed runs are tried again, finished ones are not


@pytest.mark.slow
def test_each_arm_chooses_its_learning_rate_on_validation_images(
    trained: list[tuple[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trials hold images out and have seeds of their own; the runs that follow train on all images."""
    rates, trial_seeds = (0.018, 0.01, 5.0), (1000, 1001)
    failed = runner.run_study(tuned_study(*rates, seeds=(0, 1), **{"tuning.seeds": trial_seeds}), tmp_path)
    assert [run.name for run in failed] == [
        f"{arm}/learning_rate_5.0/seed_{seed}" for seed in trial_seeds for arm in ("relu", "tanh")
    ]
    trials = [
        (arm, tmp_path / arm / f"learning_rate_{rate}" / f"seed_{seed}")
        for seed in trial_seeds
        for rate in rates
        for arm in ("relu", "tanh")
    ]
    assert trained == trials + [(arm, tmp_path / arm / f"seed_{seed}") for seed in (0, 1) for arm in ("relu", "tanh")]

    trial = RunDir(tmp_path / "tanh" / "learning_rate_0.01" / "seed_1001").read_config()
    final = RunDir(tmp_path / "tanh" / "seed_1").read_config()
    assert trial is not None
    assert final is not None
    assert (trial.seed, trial.train.epochs, trial.data.validation_split) == (1001, 0.002, "1/20")
    assert (final.seed, final.train.epochs, final.data.validation_split) == (1, 0.004, "")
    assert final.optim.learning_rate == 0.01

    described = StudyDir(tmp_path).read()
    assert described["arms"]["relu"] == {"optim.learning_rate": 0.018}
    assert described["arms"]["tanh"] == {"model.activation": "tanh", "optim.learning_rate": 0.01}
    tuning = described["tuning"]
    assert tuning["metric"] == "validation/top1_error"
    # Means over two seeds, the second of which has 0.1 more. The edge is the smallest or the largest rate.
    assert tuning["arms"]["tanh"]["scores"] == pytest.approx({"0.018": 0.058, "0.01": 0.05, "5.0": None})
    assert {arm: tuned["at_edge"] for arm, tuned in tuning["arms"].items()} == {"relu": False, "tanh": True}
    note = (
        f"optim.learning_rate = 0.01, {analysis.AT_EDGE}. Tuned by validation/top1_error (0.018: 5.80 %, 0.01: 5.00 %"
    )
    assert note in (tmp_path / "report.html").read_text()
    printed = capsys.readouterr().out
    assert f"tanh: {note}" in printed
    assert "relu: optim" not in printed


@pytest.mark.slow
def test_arm_can_be_tuned_on_epochs_to_25(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    """As in the paper's figure 1. A rate that does not reach 25 % training error in some trial has no score."""
    config = tuned_study(0.001, 0.01, 0.015, **{"tuning.metric": "epochs_to_25", "tuning.seeds": (1000, 1001)})
    assert runner.run_study(config, tmp_path, only=["relu"]) == []
    choices = runner.chosen_values(config, tmp_path)
    assert list(choices) == ["relu"]
    assert choices["relu"]["chosen"] == 0.015
    assert choices["relu"]["scores"] == pytest.approx({"0.001": None, "0.01": 1.0, "0.015": 0.5})
    final = StudyDir(tmp_path).run("relu", 0).read_config()
    assert final is not None
    assert final.optim.learning_rate == 0.015

    StudyDir(tmp_path).trial("relu", "optim.learning_rate", 0.015, 1001).metrics_file.write_text('{"step": 2}\n')
    relu = runner.chosen_values(config, tmp_path)["relu"]
    assert relu == {
        "chosen": 0.01,
        "scores": pytest.approx({"0.001": None, "0.01": 1.0, "0.015": None}),
        "at_edge": False,
    }


@pytest.mark.slow
def test_trials_of_speed_train_on_all_images(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    """Nothing is held out for a metric of the training images; an arm may have values of its own."""
    config = tuned_study(0.01, 0.015, **{"tuning.metric": "epochs_to_25"})
    config.tuning.choices_by_arm = ConfigDict({"tanh": (0.015, 0.02)})
    assert [(run.arm, run.value) for run in runner.trials(config, tmp_path)] == [
        *(("relu", 0.01), ("tanh", 0.015), ("relu", 0.015), ("tanh", 0.02))
    ]
    assert runner.run_study(config, tmp_path) == []
    assert {run.config.data.validation_split for run in runner.trials(config, tmp_path)} == {""}
    chosen = runner.chosen_values(config, tmp_path)
    assert {arm: list(choice["scores"]) for arm, choice in chosen.items()} == {
        "relu": ["0.01", "0.015"],
        "tanh": ["0.015", "0.02"],
    }
    assert chosen["tanh"]["at_edge"]


@pytest.mark.slow
def test_arm_whose_trials_all_failed_is_not_run(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    failed = runner.run_study(tuned_study(2.0, 5.0), tmp_path, only=["tanh"])
    assert [run.value for run in failed] == [2.0, 5.0]
    assert {folder.name for _, folder in trained} == {"seed_1000"}
    scores = {"2.0": None, "5.0": None}
    assert StudyDir(tmp_path).read()["tuning"]["arms"] == {"tanh": {"chosen": None, "scores": scores, "at_edge": False}}


@pytest.mark.slow
def test_arm_whose_trials_never_reach_25_is_named(
    trained: list[tuple[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tuned_study(0.001, 0.002, **{"tuning.metric": "epochs_to_25"})
    assert runner.run_study(config, tmp_path) == []
    expected = (
        f"relu: optim.learning_rate: {analysis.NONE_FOUND}. Tuned by epochs_to_25 (0.001: never reached or failed"
    )
    assert expected in " ".join(capsys.readouterr().out.split())
    assert analysis.NONE_FOUND in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_only_a_number_is_at_the_edge_of_its_grid(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    config = tuned_study(**{"tuning.key": "optim.schedule", "tuning.choices": ("step", "cosine")})
    assert runner.run_study(config, tmp_path) == []
    assert not any(choice["at_edge"] for choice in runner.chosen_values(config, tmp_path).values())


def test_arm_chooses_only_after_its_last_trial(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    config = tuned_study(0.001, 0.01)
    first, second = runner.trials(config, tmp_path, ["relu"])
    write_json(first.folder.result_file, {"steps": 2, "validation/top1_error": 0.5})
    write_text(first.folder.metrics_file, '{"step": 2}\n')
    assert runner.chosen_values(config, tmp_path) == {}
    write_json(second.folder.failure_file, {"error": "", "traceback": ""})
    assert runner.chosen_values(config, tmp_path)["relu"]["chosen"] == 0.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning.key": "optim.learning_rat", "tuning.choices": (1.0,)}, "did you mean optim.learning_rate"),
        ({"tuning.choices": ()}, r"tuning.choices=\(\), tuning.seeds=\(1000,\): must be values of optim.learning_rate"),
        ({"tuning.seeds": ()}, r"tuning.seeds=\(\): must be"),
        ({"tuning.seeds": (0, 1000)}, r"seeds other than the study's \(0,\)"),
        ({"tuning.metric": "eval/top1_error"}, "tuning.metric='eval/top1_error': must be one of validation/top1_error"),
    ],
)
def test_study_that_cannot_tune_raises(
    changes: dict[str, Any], message: str, trained: list[tuple[str, Path]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        runner.run_study(tuned_study(1.0, **changes), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_dataset_that_was_prepared_anew_is_refused(photos: Path, tmp_path: Path) -> None:
    """One image has changed: by a finished and by an interrupted run, in the study, in evaluation and prediction."""

    def prepare_again(folder: Path) -> None:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        prepare.prepare(sources.folder(folder), 32, str(tmp_path / "data"))

    changes = {
        "data.name": "photos",
        "data.data_dir": str(tmp_path / "data"),
        "data.eval_split": "validation",
        "train.epochs": 0.1,
    }
    study = base.study("cifar10", {"a": {}}, changes=SHALLOW | changes, seeds=(0,))
    prepare_again(photos)
    assert runner.run_study(study, tmp_path / "study") == []
    run = StudyDir(tmp_path / "study").run("a", 0)
    other = shutil.copytree(photos, tmp_path / "other" / "photos")
    changed = other / "train" / "cat" / "0.jpg"
    shutil.copy(other / "train" / "cat" / "1.jpg", changed)
    prepare_again(other)
    refused = r"a/seed_0 holds a run on other images \(fingerprint: was \w+, is \w+\): prepare photos from"
    with pytest.raises(ValueError, match=refused):
        runner.run_study(study, tmp_path / "study")
    with pytest.raises(ValueError, match=refused):
        evaluate_runs([run.path])
    with pytest.raises(ValueError, match=refused):
        predict.predict(run.path, [changed], neighbours=1)
    run.result_file.unlink()
    with pytest.raises(ValueError, match=refused):
        train.train_and_evaluate(runner.plan(study, tmp_path / "study")[0].config, run.path)
    prepare_again(photos)
    assert runner.run_study(study, tmp_path / "study") == []
    assert run.status == "finished"


@pytest.mark.slow
def test_run_that_failed_meanwhile_in_another_process_is_not_tried_again(
    trained: list[tuple[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_and_evaluate = train.train_and_evaluate

    def train_while_another_process_fails(*arguments: Any) -> Any:
        write_json(StudyDir(tmp_path).run("no_lrn", 0).failure_file, {"error": "nan", "traceback": ""})
        return train_and_evaluate(*arguments)

    monkeypatch.setattr(train, "train_and_evaluate", train_while_another_process_fails)
    (failed,) = runner.run_study(tiny_study(), tmp_path, only=["lrn", "no_lrn"])
    assert failed.arm == "no_lrn"
    assert [arm for arm, _ in trained] == ["lrn"]


@pytest.mark.slow
def test_run_that_crashed_three_times_is_left_to_the_end(
    trained: list[tuple[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A crash, as of a process without memory, leaves the count of starts behind; an end, even a failure, does not."""
    crashing = StudyDir(tmp_path).run("lrn", 0)
    train_and_evaluate = train.train_and_evaluate
    counts: list[int] = []

    def count(*arguments: Any) -> Any:
        counts.append(crashing.crashes)
        return train_and_evaluate(*arguments)

    monkeypatch.setattr(train, "train_and_evaluate", count)
    write_json(crashing.starts_file, {"starts": 3})
    assert runner.run_study(tiny_study(), tmp_path, only=["lrn", "no_lrn"]) == []
    assert [arm for arm, _ in trained] == ["no_lrn", "lrn"]
    assert counts == [3, 4]
    assert crashing.crashes == 0
    assert "lrn/seed_0 has crashed 3 times: it is left to the end" in capsys.readouterr().out


@pytest.mark.slow
def test_signal_at_the_end_of_a_run_stops_the_study(
    trained: list[tuple[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_and_evaluate = train.train_and_evaluate

    def train_and_signal(*arguments: Any) -> dict[str, Any]:
        try:
            return train_and_evaluate(*arguments)
        finally:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "train_and_evaluate", train_and_signal)
    with pytest.raises(stop.Stopped, match="stopped before no_lrn/seed_0") as stopped:
        runner.run_study(tiny_study(), tmp_path, only=["lrn", "no_lrn"])
    assert stopped.value.exit_status == 143
    assert [arm for arm, _ in trained] == ["lrn"]
    monkeypatch.setattr(train, "train_and_evaluate", train_and_evaluate)
    assert runner.run_study(tiny_study(), tmp_path, only=["lrn", "no_lrn"]) == []
    assert [arm for arm, _ in trained] == ["lrn", "no_lrn"]


HOLDER = """
import sys, time
import filelock
with filelock.FileLock(sys.argv[1], timeout=0):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_run_of_another_process_is_left_alone_until_that_ends(
    trained: list[tuple[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However it ends: here it is killed."""
    config = tiny_study()
    lock = tmp_path / "no_lrn" / ".seed_0.lock"
    lock.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert runner.run_study(config, tmp_path, only=["lrn", "no_lrn"]) == []
        finally:
            holder.kill()
    assert [arm for arm, _ in trained] == ["lrn"]
    assert "being run by another process: no_lrn/seed_0" in capsys.readouterr().out
    runner.run_study(config, tmp_path, only=["lrn", "no_lrn"])
    assert [arm for arm, _ in trained] == ["lrn", "no_lrn"]


@pytest.mark.slow
def test_trials_of_another_process_are_waited_for(
    trained: list[tuple[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "relu" / "learning_rate_0.001" / ".seed_1000.lock"
    lock.parent.mkdir(parents=True)
    held = filelock.FileLock(lock, is_singleton=False)
    held.acquire()
    waits: list[float] = []

    def wait(_: stop.Request, seconds: float) -> None:
        waits.append(seconds)
        held.release()

    monkeypatch.setattr(stop.Request, "wait", wait)
    runner.run_study(tuned_study(0.001, 0.01), tmp_path, only=["relu"])
    assert waits == [runner.POLL_SECONDS]
    assert [str(path.relative_to(tmp_path / "relu")) for _, path in trained] == [
        "learning_rate_0.01/seed_1000",
        "learning_rate_0.001/seed_1000",
        "seed_0",
    ]


@pytest.mark.slow
def test_dry_run_prints_every_run_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuning = {"tuning.key": "optim.learning_rate", "tuning.choices": (0.5,), "tuning.epochs": 0.002}
    finished = StudyDir(tmp_path).run("no_lrn", 0)
    write_json(finished.result_file, {"steps": 4})
    write_text(finished.metrics_file, '{"step": 4}\n')
    before, paths = files(tmp_path), set(tmp_path.rglob("*"))
    runner.print_plan(tiny_study(**tuning), tmp_path, ["lrn", "no_lrn"])
    printed = capsys.readouterr().out
    size = summary.sizes(run_config(**SHALLOW), 10, 1)
    numbers = rf"{size['parameters']:,} │ +{size['multiply_adds']:,}"
    for name, status, steps in (
        ("lrn/learning_rate_0.5/seed_1000", "not started", 2),
        ("no_lrn/learning_rate_0.5/seed_1000", "not started", 2),
        ("lrn/seed_0", "not started", 4),
        ("no_lrn/seed_0", "finished", 4),
    ):
        assert re.search(rf"│ {name} +│ {status} +│ +{numbers} │ +{steps} │", printed)
    assert "4 runs" in printed
    assert files(tmp_path) == before
    assert set(tmp_path.rglob("*")) == paths


def test_seeds_are_a_range_or_a_list() -> None:
    assert runner.parse_seeds("0:5") == (0, 1, 2, 3, 4)
    assert runner.parse_seeds("3,1") == (3, 1)
    assert runner.parse_seeds("7") == (7,)
    for text in ("0-5", "", "1,", "a"):
        with pytest.raises(ValueError, match=rf"^--seeds={text}: must be a range as 0:5"):
            runner.parse_seeds(text)


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_plan_needs_different_seeds(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^arms=\['lrn', 'no_lrn', 'lrn_after_pooling'\], seeds=.* without repeats"):
        runner.plan(tiny_study(seeds=seeds), Path("study"))


def test_unknown_arm_raises_with_the_arms() -> None:
    with pytest.raises(ValueError, match=r"--only=lrm: must be among the arms lrn, no_lrn, lrn_after_pooling"):
        runner.plan(tiny_study(), Path("study"), ["lrm"])


def test_nothing_starts_where_one_arm_cannot_run(trained: list[tuple[str, Path]], tmp_path: Path) -> None:
    config = tiny_study()
    config.arms = ConfigDict({"lrn": {}, "wide": {"model": {"pool": {"window": 30}}}}, sort_keys=False)
    config.claims = ()
    with pytest.raises(ValueError, match=r"model\.pool\.window=30: must fit its feature map"):
        runner.run_study(config, tmp_path / "study", only=["lrn"])
    assert not trained
    assert not (tmp_path / "study").exists()


def test_arms_of_a_seed_run_together() -> None:
    runs = runner.plan(tiny_study(seeds=(3, 4)), Path("study"))
    arms = ("lrn", "no_lrn", "lrn_after_pooling")
    assert [(run.arm, run.seed) for run in runs] == [(arm, seed) for seed in (3, 4) for arm in arms]
    assert runs[1].folder.path == Path("study/no_lrn/seed_3")
    assert runs[1].config.seed == 3
    assert runs[1].labels["model.lrn.enabled"] is False
    assert runs[0].labels["model.lrn.enabled"] is True  # a label wherever some arm differs


def test_arms_of_a_seed_start_alike_and_see_the_same_images() -> None:
    """Paired by seed, arms differ in what they change and in nothing else."""

    def start(run: runner.Run) -> tuple[Any, list[Any]]:
        setup = train.open_run(run.config)
        batches = train_batches(setup.dataset.train, run.config, seed=run.seed, start=0, stop=3)
        return train.init_state(setup).params, list(batches)

    lrn, no_lrn, lrn_of_another_seed, _ = map(start, runner.plan(tiny_study(seeds=(0, 1)), Path(), ["lrn", "no_lrn"]))
    chex.assert_trees_all_equal(lrn, no_lrn)
    for ours, others in zip(lrn, lrn_of_another_seed, strict=True):
        assert any((one != other).any() for one, other in zip(*map(jax.tree.leaves, (ours, others)), strict=True))


@pytest.mark.parametrize("file", ["config.json", "result.json"])
def test_damaged_run_fails_alone(trained: list[tuple[str, Path]], tmp_path: Path, file: str) -> None:
    study = tiny_study()
    runner.run_study(study, tmp_path)
    damaged = StudyDir(tmp_path).run("lrn", 0)
    (damaged.path / file).write_text("{")
    (StudyDir(tmp_path).run("no_lrn", 0).result_file).unlink()
    trained.clear()
    (failed,) = runner.run_study(study, tmp_path)
    assert failed.arm == "lrn"
    assert [arm for arm, _ in trained] == ["no_lrn"]
    assert str(damaged.path / file) in StudyDir(tmp_path).report_file.read_text()


def test_failure_that_cannot_be_written_is_printed(
    trained: list[tuple[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, value: Any) -> None:
        if path.name == "failure.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr(runner, "write_json", full)
    study = tiny_study(**{"optim.learning_rate": 2.0})
    assert len(runner.run_study(study, tmp_path)) == 3
    printed = capsys.readouterr().out
    assert printed.count("failed: train/loss is nan") == printed.count("No space left on device") == 3
