"""The files of a run and of a study: their names, how they are read and written, and a run's environment. No JAX."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import __version__
from alexnet_jax.config import FREE, as_json, flatten, from_json

T = TypeVar("T")
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
STUDY_FILE = "study.json"
# Beginnings of the names of environment variables that may change numbers.
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "NVIDIA_TF32_OVERRIDE", "CUBLAS_", "CUDNN_", "TF_CUDNN_", "TF_XLA_")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


class DamagedFileError(ValueError):
    """A file that is there, and whose content cannot be what was written."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` on success and is deleted on failure; create its folder.

    The temporary name is unique: several machines may write the same file at the same moment. When it returns, the
    file is on disk under its name, also after a power failure. An OSError names the file.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes files that only their owner can read
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's error names no file
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_UMASK = os.umask(0)  # the process's file mode mask, which can only be read by setting it
os.umask(_UMASK)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, rule: str = "a JSON object", valid: Callable[[dict[str, Any]], bool] = lambda _: True) -> Any:
    """Return the object in a JSON file, or None if the file does not exist.

    Args:
      rule: what the file must be, and the remedy if it is not, for the message.
      valid: whether an object obeys the rule.

    Raises:
      DamagedFileError: the file has no such object.
    """
    return _parse(path.read_bytes(), path, rule, valid) if path.exists() else None


def _parse(text: bytes, place: object, rule: str, valid: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return a JSON object; raise DamagedFileError, which names its place, if the text is none or not a valid one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise DamagedFileError(f"{place}: cannot be read ({error}); must be {rule}") from None
    with contextlib.suppress(TypeError, KeyError, AttributeError):  # of an object with other fields
        if isinstance(value, dict) and valid(value):
            return value
    raise DamagedFileError(f"{place}: must be {rule}")


def complete_lines(path: Path) -> list[bytes]:
    """Return the lines of a file without a last line that a killed process left incomplete."""
    if not path.exists():
        return []
    *complete, _ = path.read_bytes().split(b"\n")
    return complete


def _are_numbers(values: Iterable[object]) -> bool:
    return all(isinstance(value, int | float) for value in values)


class RunDir:
    """The folder of one run."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
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
        self.starts_file = self.path / "starts.json"  # the number of starts since the last end that was no crash
        self.checkpoints = self.path / "checkpoints"

    @property
    def name(self) -> str:
        """The run within its study, such as "lrn/seed_0"; of a tuning run "lrn/learning_rate_0.01/seed_1000"."""
        path = self.path.absolute()
        is_trial = len(path.parents) > 2 and (path.parents[2] / STUDY_FILE).exists()
        return "/".join(path.parts[-3:] if is_trial else path.parts[-2:])

    @property
    def result(self) -> dict[str, Any] | None:
        """The final metrics of a finished run, else None; raise DamagedFileError if they cannot be read."""
        rule = "an object of numbers; delete it and re-run the study's command to write it from the last checkpoint"
        return read_json(self.result_file, rule, lambda result: "steps" in result and _are_numbers(result.values()))

    def read_dataset(self) -> dict[str, Any] | None:
        """Return the dataset's name, "classes" (their number), "class_names" and sizes; None before the start."""

        def valid(values: dict[str, Any]) -> bool:
            classes, names = values["classes"], values.get("class_names")
            named = names is None or (len(names) == classes and all(isinstance(name, str) for name in names))
            return isinstance(classes, int) and named

        return read_json(self.dataset_file, "an object with classes", valid)

    def read_failure(self) -> dict[str, Any] | None:
        """Return the "error" and "traceback" of a failed run, else None."""
        return read_json(self.failure_file, "an object with an error", lambda values: isinstance(values["error"], str))

    def read_by_class(self) -> dict[str, Any] | None:
        """Return the names of the classes, "class", and their final "top1_error", or None before the end of a run."""

        def valid(values: dict[str, Any]) -> bool:
            names, errors = values["class"], values["top1_error"]
            numbers = _are_numbers(error for error in errors if error is not None)
            return numbers and all(isinstance(name, str) for name in names) and len(names) == len(errors) > 0

        return read_json(self.by_class_file, "an object with an error for each class", valid)

    def read_filters(self) -> np.ndarray | None:
        """Return the first filters (towers, height, width, channels, features), or None before the end of a run."""
        if not self.filters_file.exists():
            return None
        try:
            with self.filters_file.open("rb") as file:
                filters = np.lib.format.read_array(file)
        except (ValueError, TypeError, MemoryError) as error:  # a damaged header may name any size
            raise DamagedFileError(f"{self.filters_file}: cannot be read ({error}); must be an array") from None
        if filters.ndim != 5 or filters.dtype.kind != "f":
            raise DamagedFileError(f"{self.filters_file}: must be floats (towers, height, width, channels, features)")
        return filters

    @property
    def status(self) -> str:
        """The state of the run: "finished", "failed", "unfinished", "not started", or "damaged", without numbers."""
        try:
            if self.result is not None:
                self.check_metrics()
                return "finished"
        except (DamagedFileError, OSError):
            return "damaged"
        if self.failure_file.exists():
            return "failed"
        return "unfinished" if self.path.exists() else "not started"

    def read_config(self) -> ConfigDict | None:
        """Return the run's config, or None; raise ValueError if it is damaged, or of a version with other fields."""
        rule = "a run's config; delete it if the study's config is unchanged, and re-run the study's command"
        values = read_json(self.config_file, rule)
        try:
            return None if values is None else from_json(values)
        except (KeyError, AttributeError, TypeError):  # a section that the config of every version has is missing
            raise DamagedFileError(f"{self.config_file}: must be {rule}") from None
        except ValueError as error:
            raise ValueError(f"{self.config_file}: {error}") from None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged metrics in order of their steps; raise DamagedFileError if a line cannot be read."""

        def valid(line: dict[str, Any]) -> bool:
            return isinstance(line["step"], int) and _are_numbers(line.values())

        rule = "an object of numbers; delete the line to do without it, or the run's folder to train it again"
        return [
            _parse(line, f"{self.metrics_file}, line {number}", rule, valid)
            for number, line in enumerate(complete_lines(self.metrics_file), 1)
        ]

    def check_metrics(self) -> None:
        """Check that the logged metrics are there, to the end of a finished run; raise DamagedFileError if not."""
        metrics, result = self.metrics(), self.result
        if result is not None and (not metrics or metrics[-1]["step"] != result["steps"]):
            raise DamagedFileError(
                f"{self.metrics_file}: must end with step {result['steps']}, as {self.result_file.name} does; delete "
                "the run's folder to train it again"
            )

    def read_environment(self) -> dict[str, Any] | None:
        """Return what the run's numbers depend on besides its config, or None before the start of a run."""
        return read_json(self.environment_file)

    def record_environment(self, current: dict[str, Any]) -> dict[str, list[Any]]:
        """Write what the run's numbers depend on now; what they depended on before is kept in the field "earlier".

        Returns:
          Old and new value of what has changed since the run was interrupted: allowed, but a resumed run may then
          differ from an uninterrupted one.
        """
        former = self.undamaged(RunDir.read_environment) or {}
        earlier = former.pop("earlier", [])
        before = former or current
        changed = {key: [before.get(key), current.get(key)] for key in sorted(before | current)}
        changed = {key: values for key, values in changed.items() if values[0] != values[1]}
        write_json(self.environment_file, current | {"earlier": [*earlier, former] if changed else earlier})
        return changed

    def undamaged(self, read: Callable[["RunDir"], T]) -> T | None:
        """Return what a function reads of the run, or None if a file is damaged, which `damages` says."""
        try:
            return read(self)
        except (DamagedFileError, OSError):
            return None

    def damages(self) -> list[str]:
        """Return a sentence for each damaged file and checkpoint; `statistics_file` and the log are not looked at."""
        sentences = []
        for read in (
            RunDir.read_config,
            RunDir.read_dataset,
            RunDir.read_environment,
            RunDir.check_metrics,
            RunDir.read_filters,
            RunDir.read_by_class,
            RunDir.read_failure,
            RunDir.read_initial,
            RunDir.read_extensions,
        ):
            try:
                read(self)
            except (DamagedFileError, OSError) as error:
                sentences.append(str(error))
            except ValueError:
                pass  # a config of another version
        aside = sorted(self.checkpoints.glob("damaged_*"))
        return sentences + [f"{path}: could not be read, and was set aside; delete it" for path in aside]

    def check(self, config: dict[str, Any], *, extend: bool = False) -> None:
        """Check that the folder has no run, or one of an equivalent config; the config is as from `config.as_json`.

        Args:
          extend: whether the config may also be one that `extend` takes.

        Raises:
          ValueError: the folder is a file, or holds a run of another config, or of a version with other fields.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: must be a folder, and is a file; choose another --workdir")
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
        """Turn a finished run into an unfinished one of a config with more epochs, and record what changed.

        It is safe to repeat after a crash. Do nothing if the config is the run's.
        """
        changed = self._changes(config)
        if not changed:
            return
        self.check(config, extend=True)
        extensions = self.read_extensions()
        if not extensions or extensions[-1]["changes"] != changed:
            extensions.append({"changes": changed, "result": self.result})
            write_json(self.extended_file, {"extensions": extensions})
        self.result_file.unlink(missing_ok=True)
        write_json(self.config_file, config)

    def read_initial(self) -> dict[str, Any] | None:
        """Return the weights that the run started from, "init_from", their "fingerprint" and the "new_layers"."""
        return read_json(self.initial_file, "an object with a fingerprint", lambda values: bool(values["fingerprint"]))

    def read_extensions(self) -> list[dict[str, Any]]:
        """Return what "changes" each extension made, old and new value by dotted key, and the "result" before."""

        def valid(values: dict[str, Any]) -> bool:
            return all({"changes", "result"} <= extension.keys() for extension in values["extensions"])

        return (read_json(self.extended_file, "an object with extensions", valid) or {"extensions": []})["extensions"]

    def _changes(self, config: dict[str, Any]) -> dict[str, list[Any]]:
        """Return old and new value of each field, but those of `FREE`, in which the run differs from a config."""
        stored = self.read_config()
        old, new = flatten(config if stored is None else as_json(stored)), flatten(config)
        changed = [key for key in sorted(old | new) if key not in FREE and old.get(key) != new.get(key)]
        return {key: [old.get(key), new.get(key)] for key in changed}

    def _extends(self, changed: dict[str, list[Any]]) -> bool:
        """Return whether changes make a finished run longer; an extension that was interrupted may begin again."""
        epochs, longer = changed.get("train.epochs", [0, 0])
        extensions = self.read_extensions()
        finished = self.result is not None or (extensions and extensions[-1]["changes"] == changed)
        return bool(finished) and longer > epochs and set(changed) <= set(EXTENDABLE)

    @property
    def crashes(self) -> int:
        """The number of starts in a row that ended in a crash of the process."""

        def valid(values: dict[str, Any]) -> bool:
            return isinstance(values["starts"], int)

        starts = self.undamaged(lambda run: read_json(run.starts_file, valid=valid))
        return starts["starts"] if starts else 0

    def check_dataset(self, metadata: dict[str, Any]) -> None:
        """Check that the run, if there is one, was of the same images and classes, as from `Dataset.metadata`.

        Raises:
          ValueError: the dataset has changed.
        """
        existing = self.read_dataset() or {}
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
        self.study_file = self.path / STUDY_FILE  # name, arms, sizes, seeds, claims and tuned values, for the report
        self.results_file = self.path / "results.csv"  # a row for each run
        self.curves_file = self.path / "curves.csv"  # a row for each logged step of each run
        self.report_file = self.path / "report.html"
        self.lock_file = self.path / ".study.lock"  # of a process that reads the runs and writes a file above

    def run(self, arm: str, seed: int) -> RunDir:
        """Return the folder of the run of an arm with a seed."""
        return RunDir(self.path / arm / f"seed_{seed}")

    def trial(self, arm: str, key: str, value: Any, seed: int) -> RunDir:
        """Return the folder of a tuning run: an arm with a candidate value of the tuned field."""
        return RunDir(self.path / arm / f"{key.rpartition('.')[2]}_{value}" / f"seed_{seed}")

    def read(self) -> dict[str, Any]:
        """Return the contents of study.json; raise ValueError if there is none, or it is damaged."""

        def valid(study: dict[str, Any]) -> bool:
            claims = all(
                {"arm", "metric", "source", "difference", "ratio"} <= claim.keys() for claim in study["claims"]
            )
            sizes = all({"parameters", "maps"} <= size.keys() for size in study.get("sizes", {}).values())
            texts = isinstance(study["name"], str) and isinstance(study["reported"], str)
            seeds = all(isinstance(seed, int) for seed in study["seeds"])
            return claims and sizes and texts and seeds and all(isinstance(arm, dict) for arm in study["arms"].values())

        rule = "the description of a study; re-run the study's command to write it again"
        study = read_json(self.study_file, rule, valid)
        if study is None:
            raise ValueError(
                f"{self.path} is not a study's folder: it has no study.json; give one like runs/ablation_lrn"
            )
        return study

    def runs(self) -> list[tuple[str, int, RunDir]]:
        """Return arm, seed and folder of every run in the study's order, including seeds added by other commands."""
        study = self.read()
        folders = self.path.glob("*/seed_*")
        # A folder like seed_0_backup is no run.
        on_disk = {int(match[1]) for folder in folders if (match := re.fullmatch(r"seed_(0|[1-9]\d*)", folder.name))}
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
    """Return git's output for the repository of this file, or "" if none tracks it, as when it is installed."""
    if arguments[0] != "ls-files" and not _git("ls-files", __file__):
        return ""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
