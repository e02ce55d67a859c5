"""The folder of a study, as its runs leave it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alexnet_jax.configs import base
from alexnet_jax.run_dir import StudyDir, write_json

ERRORS = {"lrn": [0.10, 0.12, 0.11], "no_lrn": [0.13, 0.14, 0.16]}
CLAIMS = (
    base.claim("no_lrn", "eval/top1_error", "section 3.3", difference=0.014),
    base.claim("no_lrn", "epochs_to_25", "<section> 3.1", ratio=6.0),
)


@pytest.fixture
def errors() -> dict[str, list[float]]:
    """Return the top-1 errors of the runs of `study`, by arm and seed."""
    return ERRORS


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a study with a finished run for each error; other runs have not started."""

    def make(errors: dict[str, list[float]] = ERRORS, seeds: int = 3, **description: Any) -> Path:
        folder = StudyDir(tmp_path / "study")
        defaults = {
            "name": "lrn?",
            "reported": "mnist5k, test",
            "arms": {arm: {} if arm == "lrn" else {"model.lrn.enabled": False} for arm in errors},
            "sizes": {arm: {"parameters": 7, "maps": {"conv1": "5x5x2"}} for arm in errors},
            "seeds": list(range(seeds)),
            "claims": list(CLAIMS),
            "tuning": None,
        }
        write_json(folder.study_file, defaults | description)
        for arm, values in errors.items():
            for seed, error in enumerate(values):
                run = folder.run(arm, seed)
                write_json(run.environment_file, {"jax": "0.0"})
                metrics = [
                    {"step": 1, "epoch": 0.1, "eval/top1_error": error, "eval/loss": 1.0},
                    {"step": 2, "epoch": 0.2, "eval/top1_error": error / 2, "eval/loss": 1.0},
                    {"step": 3, "epoch": 0.3 * (1 + (arm != "lrn")) + error, "train/top1_error": 0.25},
                    {"step": 4, "epoch": 1.0, "train/top1_error": 0.2},
                ]
                lines = [json.dumps(line) + "\n" for line in metrics]
                run.metrics_file.write_text("".join(lines) + '{"step": 5, "ep')  # killed while it wrote a line
                result = {"steps": 4, "epochs": 1.0, "parameters": 7, "seconds": 1.5}
                write_json(run.result_file, result | {"eval/top1_error": error, "train_eval/top1_error": error / 2})
        return folder.path

    return make


@pytest.fixture
def study(make_study: Callable[..., Path]) -> Path:
    """Return the folder of a study of two arms with three finished runs each."""
    return make_study()
