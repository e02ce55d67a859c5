"""A study runs what is missing, and starts nothing where something cannot run."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import TINY
from ml_collections import ConfigDict

from alexnet_jax import study
from configs import ablation_lrn

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def tiny_study(**changes: object) -> ConfigDict:
    config = ablation_lrn.get_config()
    config.update_from_flattened_dict(TINY | {"train.epochs": 0.004, "seeds": (0,), **changes})
    return config


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_seed_is_added_to_the_runs_there_are(tmp_path: Path) -> None:
    study.run_study(tiny_study(), tmp_path)
    results = {path: content for path, content in files(tmp_path).items() if path.name == "result.json"}
    assert len(results) == 2
    study.run_study(tiny_study(seeds=(0, 1)), tmp_path)
    assert files(tmp_path).items() >= results.items()
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(zip(table["arm"], table["seed"], strict=True)) == [
        ("lrn", 0),
        ("lrn", 1),
        ("no_lrn", 0),
        ("no_lrn", 1),
    ]
    assert (table["status"] == "finished").all()

    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"seed_0 holds a run of another config \(optim.momentum was 0.9, is 0.8\)"):
        study.run_study(tiny_study(**{"seeds": (0, 1, 2), "optim.momentum": 0.8}), tmp_path)
    assert files(tmp_path) == before


def test_nothing_starts_where_one_arm_cannot_run(tmp_path: Path) -> None:
    config = tiny_study()
    config.arms = ConfigDict({"lrn": {}, "wide": {"model": {"pool": {"window": 30}}}})
    with pytest.raises(ValueError, match="pooling window of 30x30 does not fit"):
        study.run_study(config, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_arms_of_a_seed_are_run_together() -> None:
    runs = study.plan(tiny_study(seeds=(3, 4)), Path("study"))
    assert [(run.arm, run.seed) for run in runs] == [("lrn", 3), ("no_lrn", 3), ("lrn", 4), ("no_lrn", 4)]
    assert runs[1].workdir == Path("study/no_lrn/seed_3")
    assert runs[1].config.seed == 3
