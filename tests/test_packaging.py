"""The wheel is complete: it runs a built-in study and a user's own study from a folder without the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support import REPOSITORY, SHALLOW

OWN_STUDY = '''"""Does a wider first layer help?"""

from alexnet_jax.configs import base

ARMS = {
    "narrow": {},  # the reference: the base config as it is
    "wide": {"model.layers.conv1.features": 12},
}


def get_config(scale="embedded"):
    return base.study(scale, ARMS, seeds=range(1))
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel; Python finds the package in this folder when started there."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([*build, str(REPOSITORY)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alexnet_jax", "run", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_wheel_runs_a_built_in_study(installed: Path) -> None:
    done = run(installed, "--config=configs/ablation_lrn.py", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "9 runs in runs/ablation_lrn" in done.stdout


@pytest.mark.slow
def test_wheel_trains_a_users_own_study(installed: Path, tmp_path: Path) -> None:
    (installed / "wide.py").write_text(OWN_STUDY)
    tiny = [f"--config.{key}={value}" for key, value in SHALLOW.items() if "conv1" not in key]
    done = run(installed, "--config=wide.py", *tiny, f"--workdir={tmp_path}", "--config.model.layers.conv1.features=8")
    assert done.returncode == 0, done.stderr
    assert {path.parent.parent.name for path in tmp_path.glob("*/seed_0/result.json")} == {"narrow", "wide"}
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_wheel_contains_every_config_and_nothing_else_at_the_top(installed: Path) -> None:
    for config in (REPOSITORY / "configs").rglob("*.py"):
        assert (installed / "alexnet_jax" / config.relative_to(REPOSITORY)).read_bytes() == config.read_bytes()
    assert {path.name for path in installed.iterdir() if path.is_dir() and "dist-info" not in path.name} <= {
        "alexnet_jax",
        "runs",
    }
