"""A study runs what is missing, and starts nothing where something cannot run."""

import re
import subprocess
import sys
from pathlib import Path

import filelock
import pandas as pd
import pytest
from conftest import TINY, run_config
from ml_collections import ConfigDict

from alexnet_jax import dry_run, records, report, study, summary
from alexnet_jax.config import as_json
from configs import ablation_lrn

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def tiny_study(**changes: object) -> ConfigDict:
    config = ablation_lrn.get_config()
    config.update_from_flattened_dict(TINY | {"train.epochs": 0.004, "seeds": (0,), **changes})
    return config


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Has a run take no time, and be as good as its rate is near 0.02; where that is more than 1, it fails."""
    calls: list[tuple[str, Path]] = []

    def train(config: ConfigDict, workdir: Path, labels: dict) -> None:
        if records.result(workdir):
            return
        calls.append((labels["arm"], workdir))
        rate = config.optim.learning_rate
        if rate > 1:
            raise FloatingPointError("train/loss is nan")
        records.write_json(workdir / "config.json", as_json(config))
        error = abs(rate - 0.02)
        kept = {"validation/top1_error": error, "validation/loss": 1.0} if config.eval.validation else {}
        result = {"eval/top1_error": error, "eval/top5_error": 0.0, "steps": 1, "epochs": config.train.epochs}
        records.write_json(workdir / "result.json", result | kept)

    monkeypatch.setattr(study.train, "train_and_evaluate", train)
    return calls


def test_another_seed_is_added_to_the_runs_there_are(trained: list, tmp_path: Path) -> None:
    study.run_study(tiny_study(), tmp_path, only=["lrn"])
    results = {path: content for path, content in files(tmp_path).items() if path.name == "result.json"}
    assert [path.parent for path in results] == [tmp_path / "lrn" / "seed_0"]
    assert study.run_study(tiny_study(seeds=(0, 1)), tmp_path, only=["lrn", "no_lrn"]) == []
    assert files(tmp_path).items() >= results.items()
    table = pd.read_csv(tmp_path / "results.csv")
    rows = {(arm, seed): status for arm, seed, status in table[["arm", "seed", "status"]].itertuples(index=False)}
    arms = {"lrn": "finished", "no_lrn": "finished", "lrn_after_pooling": "not started"}
    assert rows == {(arm, seed): status for arm, status in arms.items() for seed in (0, 1)}

    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"seed_0 holds a run of another config \(optim.momentum was 0.9, is 0.8\)"):
        study.run_study(tiny_study(**{"seeds": (0, 1, 2), "optim.momentum": 0.8}), tmp_path)
    assert files(tmp_path) == before


def test_a_failed_run_is_reported_and_the_others_are_run(
    trained: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_study(seeds=(0, 1))
    config.arms = ConfigDict({"wild": {"optim": {"learning_rate": 1e9}}, "tame": {}}, sort_keys=False)
    config.claims = ()
    records.write_json(tmp_path / "tame" / "seed_0" / "failure.json", {"error": "no power", "traceback": ""})
    failed = study.run_study(config, tmp_path)
    assert [run.name for run in failed] == ["wild, seed 0", "wild, seed 1"]
    assert not (tmp_path / "tame" / "seed_0" / "failure.json").exists()
    assert [arm for arm, _ in trained] == ["wild", "tame", "wild", "tame"]
    assert "wild, seed 0 failed: train/loss is nan" in capsys.readouterr().out
    assert "FloatingPointError" in records.read_json(tmp_path / "wild" / "seed_0" / "failure.json")["traceback"]
    runs = report.load_runs(tmp_path).set_index(["arm", "seed"])["status"]
    assert runs.to_dict() == {
        (a, s): {"wild": "failed", "tame": "finished"}[a] for a in ("wild", "tame") for s in (0, 1)
    }
    del trained[:]
    assert len(study.run_study(config, tmp_path)) == 2
    assert [arm for arm, _ in trained] == ["wild", "wild"]  # tried again; what is finished is not


def test_each_arm_chooses_its_rate_on_validation_images(trained: list, tmp_path: Path) -> None:
    config = tiny_study(seeds=(0, 1))
    config.tuning.update(key="optim.learning_rate", choices=(0.001, 0.01, 5.0), epochs=0.002, seed=77)
    config.arms = ConfigDict({"relu": {}, "tanh": {"model": {"activation": "tanh"}}}, sort_keys=False)
    config.claims = ()
    failed = study.run_study(config, tmp_path)
    assert [run.name for run in failed] == ["relu, trying 5.0", "tanh, trying 5.0"]
    names = [workdir.name for _, workdir in trained]
    assert (
        names
        == [f"learning_rate_{rate}" for rate in (0.001, 0.01, 5.0) for _ in "ab"] + ["seed_0"] * 2 + ["seed_1"] * 2
    )
    tried = records.read_json(tmp_path / "tanh" / "learning_rate_0.001" / "config.json")
    assert (tried["seed"], tried["train"]["epochs"], tried["eval"]["validation"]) == (77, 0.002, True)
    final = records.read_json(tmp_path / "tanh" / "seed_1" / "config.json")
    assert (final["optim"]["learning_rate"], final["eval"]["validation"]) == (0.01, False)
    described = report.load_study(tmp_path)
    assert described["arms"]["tanh"] == {"model.activation": "tanh", "optim.learning_rate": 0.01}
    errors = described["tuning"]["arms"]["tanh"]["errors"]
    assert errors == {"0.001": pytest.approx(0.019), "0.01": pytest.approx(0.01), "5.0": None}
    assert "was chosen by the error on validation images (0.001: 1.90 %" in (tmp_path / "report.html").read_text()


def test_a_study_that_cannot_tune_says_so(tmp_path: Path) -> None:
    for changes, message in (
        ({"tuning.key": "optim.learning_rat", "tuning.choices": (1.0,)}, "did you mean optim.learning_rate"),
        ({"tuning.key": "optim.learning_rate"}, r"tuning.choices=\(\)"),
        ({"tuning.key": "optim.learning_rate", "tuning.choices": (1.0,), "tuning.seed": 0}, "none of the study's"),
    ):
        with pytest.raises(ValueError, match=message):
            study.run_study(tiny_study(**changes), tmp_path / "study")
    assert not (tmp_path / "study").exists()


HOLDER = """
import sys, time
import filelock
with filelock.FileLock(sys.argv[1], timeout=0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_that_another_process_has_is_left_to_it_until_that_ends(
    trained: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_study()
    lock = tmp_path / "no_lrn" / ".seed_0.lock"
    lock.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert study.run_study(config, tmp_path, only=["lrn", "no_lrn"]) == []
        assert [arm for arm, _ in trained] == ["lrn"]
        assert "being run elsewhere: no_lrn, seed 0" in capsys.readouterr().out
        holder.kill()
        holder.wait()
    study.run_study(config, tmp_path, only=["lrn", "no_lrn"])
    assert [arm for arm, _ in trained] == ["lrn", "no_lrn"]


def test_what_an_arm_tries_elsewhere_is_waited_for(
    trained: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_study(**{"tuning.key": "optim.learning_rate", "tuning.choices": (0.001, 0.01)})
    lock = tmp_path / "lrn" / ".learning_rate_0.001.lock"
    lock.parent.mkdir()
    held = filelock.FileLock(lock, is_singleton=False)
    held.acquire()
    monkeypatch.setattr(study.time, "sleep", lambda seconds: held.release())
    study.run_study(config, tmp_path, only=["lrn"])
    assert [path.name for _, path in trained] == ["learning_rate_0.01", "learning_rate_0.001", "seed_0"]


def test_a_dry_run_prints_every_run_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_study(**{"tuning.key": "optim.learning_rate", "tuning.choices": (0.5,), "tuning.epochs": 0.002})
    records.write_json(tmp_path / "no_lrn" / "seed_0" / "result.json", {})
    before, paths = files(tmp_path), set(tmp_path.rglob("*"))
    dry_run.print_plan(config, tmp_path, ["lrn", "no_lrn"])
    printed = capsys.readouterr().out
    parameters = f"{summary.sizes(run_config(**TINY), 10, 1)['parameters']:,}"
    for name, status, steps, time in (
        ("lrn, trying 0.5", "not started", 2, "0:0"),
        ("no_lrn, trying 0.5", "not started", 2, "0:0"),
        ("lrn, seed 0", "not started", 4, "0:0"),
        ("no_lrn, seed 0", "finished", 4, " +│"),
    ):
        assert re.search(rf"│ {name} +│ {status} +│ +{parameters} │ +[\d,]+ │ +{steps} │ +{time}", printed)
    assert "4 runs" in printed
    assert files(tmp_path) == before
    assert set(tmp_path.rglob("*")) == paths


def test_seeds_are_a_range_or_a_list() -> None:
    assert study.parse_seeds("0:5") == (0, 1, 2, 3, 4)
    assert study.parse_seeds("3,1") == (3, 1)
    with pytest.raises(ValueError, match=r"--seeds=0-5: must be a range as 0:5"):
        study.parse_seeds("0-5")
    with pytest.raises(ValueError, match=r"--only=lrm: must be among the arms lrn, no_lrn, lrn_after_pooling"):
        study.plan(tiny_study(), Path("study"), ["lrm"])


def test_nothing_starts_where_one_arm_cannot_run(tmp_path: Path) -> None:
    config = tiny_study()
    config.arms = ConfigDict({"lrn": {}, "wide": {"model": {"pool": {"window": 30}}}})
    with pytest.raises(ValueError, match="pooling window of 30x30 does not fit"):
        study.run_study(config, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_arms_of_a_seed_are_run_together() -> None:
    runs = study.plan(tiny_study(seeds=(3, 4)), Path("study"))
    arms = ("lrn", "no_lrn", "lrn_after_pooling")
    assert [(run.arm, run.seed) for run in runs] == [(arm, seed) for seed in (3, 4) for arm in arms]
    assert runs[1].workdir == Path("study/no_lrn/seed_3")
    assert runs[1].config.seed == 3
