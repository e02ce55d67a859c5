"""The files of a run and of a study: their names, atomic writes, and the environment of a run. Needs no JAX."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from alexnet_jax import __version__
from alexnet_jax.config import FREE, flatten, from_json

# Fields that may change when a finished run is extended: its length, and its learning rates.
EXTENDABLE = (
    "train.epochs",
    "optim.learning_rate",
    "optim.schedule",
    "optim.warmup_epochs",
    "optim.decay_epochs",
    "optim.decay_factor",
    "optim.biases.decay_epochs",
    "optim.biases.decay_factor",
)
# Beginnings of the names of environment variables that may change numbers.
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "NVIDIA_TF32_OVERRIDE", "CUBLAS_", "CUDNN_", "TF_CUDNN_", "TF_XLA_")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` on success and is deleted on failure; create its folder.

    The temporary name is unique: several machines may write the same file at the same moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_UMASK = os.umask(0)  # the process's file mode mask, which can only be read by setting it
os.umask(_UMASK)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file, or None if the file does not exist."""
    return json.loads(path.read_text()) if path.exists() else None


def complete_lines(path: Path) -> list[str]:
    """Return the lines of a file without a last line that a killed process left incomplete."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class RunDir:
    """The folder of one run."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.name = "/".join(self.path.absolute().parts[-2:])  # such as "lrn/seed_0"
        self.config_file = self.path / "config.json"  # resuming with another config is refused
        self.dataset_file = self.path / "dataset.json"  # name, classes, sizes: for tools that run without the dataset
        self.initial_file = self.path / "initial.json"  # the weights that it started from, with train.init_from
        self.statistics_file = self.path / "statistics.npz"  # what the network's input is normalised with
        self.environment_file = self.path / "env.json"  # versions, machine, devices, git commit
        self.metrics_file = self.path / "metrics.jsonl"  # one JSON object per logged step
        self.log_file = self.path / "train.log"
        self.filters_file = self.path / "filters.npy"  # of the first layer, after training
        self.by_class_file = self.path / "by_class.json"  # the final error of each class
        self.extended_file = self.path / "extended.json"  # what changed each time that a finished run was extended
        self.result_file = self.path / "result.json"  # the final metrics; exists only if the run is finished
        self.failure_file = self.path / "failure.json"  # the error that ended a failed run
        self.starts_file = self.path / "starts.json"  # how often the run was started without an end: by crashes
        self.checkpoints = self.path / "checkpoints"

    @property
    def result(self) -> dict[str, Any] | None:
        """The final metrics of a finished run, else None."""
        return read_json(self.result_file)

    @property
    def status(self) -> str:
        """The state of the run: "finished", "failed", "unfinished" or "not started"."""
        if self.result is not None:
            return "finished"
        if self.failure_file.exists():
            return "failed"
        return "unfinished" if self.path.exists() else "not started"

    def read_config(self) -> ConfigDict | None:
        """Return the run's config, or None; raise ValueError if it is of a version with other fields."""
        values = read_json(self.config_file)
        try:
            return None if values is None else from_json(values)
        except ValueError as error:
            raise ValueError(f"{self.config_file}: {error}") from None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged metrics in order of their steps."""
        return [json.loads(line) for line in complete_lines(self.metrics_file)]

    def check(self, config: dict[str, Any], *, extend: bool = False) -> None:
        """Check that the folder is free for a config, as from `config.as_json`, or belongs to one that learns the same.

        Args:
          extend: whether the config may also be one that `extend` takes.

        Raises:
          ValueError: the folder holds a run of another config, or of a version with other fields.
        """
        self.read_config()
        changed = self._changes(config)
        extends = self._extends(changed)
        if changed and not (extend and extends):
            changes = [f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items()]
            remedy = "choose another --workdir, or delete that folder to start again"
            if extends:
                remedy += "; give --extend to train it further"
            elif extend:
                remedy += f"; --extend takes finished runs and more epochs, and may change only {', '.join(EXTENDABLE)}"
            raise ValueError(f"{self.path} holds a run of another config ({'; '.join(changes)}): {remedy}")

    def extend(self, config: dict[str, Any]) -> None:
        """Make a finished run of fewer epochs an interrupted run of a config, and record what changed.

        A crash on the way changes nothing that the next call does not mend. Do nothing if the config is the run's.
        """
        changed = self._changes(config)
        if not changed:
            return
        self.check(config, extend=True)
        extensions = self.extensions
        if not extensions or extensions[-1]["changes"] != changed:
            extensions.append({"changes": changed, "result": self.result})
            write_json(self.extended_file, {"extensions": extensions})
        self.result_file.unlink(missing_ok=True)
        write_json(self.config_file, config)

    @property
    def extensions(self) -> list[dict[str, Any]]:
        """What changed each time that the run was extended, old and new value by dotted key, and its result before."""
        return (read_json(self.extended_file) or {"extensions": []})["extensions"]

    def _changes(self, config: dict[str, Any]) -> dict[str, list[Any]]:
        """Return the old and the new value of each field in which the run learns otherwise than with a config."""
        old, new = flatten(read_json(self.config_file) or config), flatten(config)
        changed = [key for key in sorted(old | new) if key not in FREE and old.get(key) != new.get(key)]
        return {key: [old.get(key), new.get(key)] for key in changed}

    def _extends(self, changed: dict[str, list[Any]]) -> bool:
        """Return whether changes make a finished run longer; an extension that was interrupted may begin again."""
        epochs, longer = changed.get("train.epochs", [0, 0])
        finished = self.result is not None or (self.extensions and self.extensions[-1]["changes"] == changed)
        return bool(finished) and longer > epochs and set(changed) <= set(EXTENDABLE)

    @property
    def crashes(self) -> int:
        """How often the process has crashed in this run since the run last ended by itself."""
        return (read_json(self.starts_file) or {"starts": 0})["starts"]

    def check_dataset(self, metadata: dict[str, Any]) -> None:
        """Check that the run, if there is one, was of the same images and classes, as from `Dataset.metadata`.

        Raises:
          ValueError: the dataset has changed.
        """
        existing = read_json(self.dataset_file) or {}
        for field in ("classes", "class_names", "fingerprint"):
            if existing.get(field, metadata[field]) != metadata[field]:
                was, now = existing[field], metadata[field]
                changed = first_difference(was, now) if field == "class_names" else f"was {was}, is {now}"
                remedy = f"prepare {metadata['name']} from the same images again, or choose another --workdir"
                if "fingerprint" not in existing:  # of weights from elsewhere
                    remedy = "take images of its classes, or start from it with --init_from and --new_head"
                raise ValueError(f"{self.path} holds a run on other images ({field}: {changed}): {remedy}")


def first_difference(old: Sequence[str], new: Sequence[str]) -> str:
    """Return the first difference of two lists of class names as text, empty if they are equal."""
    for number, (was, now) in enumerate(itertools.zip_longest(old, new)):
        if was != now:
            return f"class {number} was {was!r}, is {now!r}"
    return ""


class StudyDir:
    """The folder of a study, with a folder for each of its runs."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.study_file = self.path / "study.json"  # name, arms, sizes, seeds, claims and tuned values, for the report
        self.results_file = self.path / "results.csv"  # a row for each run
        self.curves_file = self.path / "curves.csv"  # a row for each logged step of each run
        self.report_file = self.path / "report.html"

    def run(self, arm: str, seed: int) -> RunDir:
        """Return the folder of the run of an arm with a seed."""
        return RunDir(self.path / arm / f"seed_{seed}")

    def trial(self, arm: str, key: str, value: Any, seed: int) -> RunDir:
        """Return the folder of a tuning run: an arm with a candidate value of the tuned field."""
        return RunDir(self.path / arm / f"{key.rpartition('.')[2]}_{value}" / f"seed_{seed}")

    def read(self) -> dict[str, Any]:
        """Return the contents of study.json; raise ValueError if there is none."""
        study = read_json(self.study_file)
        if study is None:
            raise ValueError(
                f"{self.path} is not a study's folder: it has no study.json; give one like runs/ablation_lrn"
            )
        return study

    def runs(self) -> list[tuple[str, int, RunDir]]:
        """Return arm, seed and folder of every run in the study's order, including seeds added by other commands."""
        study = self.read()
        on_disk = {int(folder.name.removeprefix("seed_")) for folder in self.path.glob("*/seed_*")}
        seeds = [*study["seeds"], *sorted(on_disk - set(study["seeds"]))]
        return [(arm, seed, self.run(arm, seed)) for arm in study["arms"] for seed in seeds]


def environment() -> dict[str, Any]:
    """Return what a run's numbers depend on besides its config: versions, machine, git commit."""
    return {
        "alexnet_jax": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str:
    """Return git's output for the repository of this file, or "" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
