"""Files of runs and studies are complete or absent, and say which run they belong to."""

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alexnet_jax import run_dir
from alexnet_jax.config import FREE, as_json, flatten
from alexnet_jax.run_dir import (
    DamagedFileError,
    RunDir,
    StudyDir,
    atomic_write,
    complete_lines,
    read_json,
    write_json,
    write_text,
)
from support import FREELY_CHANGED, REPOSITORY, run_config, run_script


def test_atomic_write_makes_folders_and_files_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "arm" / "seed_0" / "result.json"
    write_json(path, {"steps": 12})
    assert read_json(path) == {"steps": 12}
    reference = tmp_path / "reference"
    reference.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "filters.npy"
    write_text(path, "old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_write(tmp_path / "result.json"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/result.json'"):
        write()


def test_file_and_its_name_are_on_disk_when_a_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def record_sync(handle: int) -> None:
        done.append("file" if stat.S_ISREG(os.fstat(handle).st_mode) else "folder")
        sync(handle)

    def record_replace(old: Path, new: Path) -> None:
        done.append("rename")
        replace(old, new)

    monkeypatch.setattr(run_dir.os, "fsync", record_sync)
    monkeypatch.setattr(run_dir.os, "replace", record_replace)
    write_text(tmp_path / "result.json", "{}")
    assert done == ["file", "rename", "folder"]


def test_two_processes_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    """A reader always finds a complete file of one of them."""
    path, size = tmp_path / "statistics.npz", 500_000
    write_text(path, "x" * size)
    script = (
        "from pathlib import Path; from alexnet_jax.run_dir import write_text\n"
        "for _ in range(200): write_text(Path({path!r}), {letter!r} * {size})"
    )
    commands = [
        [sys.executable, "-c", script.format(path=str(path), letter=letter, size=size)] for letter in ("a", "b")
    ]
    contents = set()
    writers = [subprocess.Popen(command) for command in commands]
    while None in [writer.poll() for writer in writers]:
        text = path.read_text()
        assert len(text) == size
        contents |= set(text)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert contents <= {"x", "a", "b"}
    assert contents & {"a", "b"}
    assert list(tmp_path.iterdir()) == [path]


def test_complete_lines_leave_out_what_a_killed_process_wrote_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert complete_lines(path) == []
    path.write_text('{"step": 2}\n{"step": 4}\n{"st')
    assert complete_lines(path) == [b'{"step": 2}', b'{"step": 4}']
    assert RunDir(tmp_path).metrics() == [{"step": 2}, {"step": 4}]


def test_status_follows_from_the_files(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "no_lrn" / "seed_0")
    assert (run.name, run.status, run.result) == ("no_lrn/seed_0", "not started", None)
    write_json(run.config_file, {})
    assert run.status == "unfinished"
    write_json(run.failure_file, {"error": "disk full"})
    assert run.status == "failed"
    write_json(run.result_file, {"steps": 12})
    assert run.status == "damaged"
    write_text(run.metrics_file, '{"step": 12}\n')
    assert (run.status, run.result) == ("finished", {"steps": 12})


def test_name_of_a_run_has_the_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lrn").mkdir()
    monkeypatch.chdir(tmp_path / "lrn")
    assert RunDir("seed_0").name == "lrn/seed_0"
    study = StudyDir(tmp_path)
    write_json(study.study_file, {})
    assert study.run("lrn", 0).name == "lrn/seed_0"
    assert study.trial("lrn", "optim.learning_rate", 0.01, 1000).name == "lrn/learning_rate_0.01/seed_1000"


def test_check_accepts_a_free_folder_and_the_same_config(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), as_json(run_config())
    run.check(config)
    write_json(run.config_file, config)
    run.check(config)


def test_check_names_every_difference(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    changed = {"optim.learning_rate": 0.5, "model.layers.conv1.then": ("activation",)}
    write_json(run.config_file, as_json(run_config()))
    with pytest.raises(ValueError, match="holds a run of another config") as refused:
        run.check(as_json(run_config(seed=1, **changed)))
    assert str(refused.value) == (
        f"{run.path} holds a run of another config (model.layers.conv1.then was ['activation', 'lrn', 'max_pool'], is "
        "['activation']; optim.learning_rate was 0.004, is 0.5; seed was 0, is 1): choose another --workdir, or "
        "delete that folder to start again"
    )


def test_fields_that_do_not_decide_what_is_learned_may_change(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path / "run"), flatten(as_json(run_config()))
    write_json(run.config_file, as_json(run_config()))
    assert set(FREE) < config.keys()
    changed = run_config(**FREELY_CHANGED)
    assert {key for key, value in flatten(as_json(changed)).items() if value != config[key]} == set(FREE)
    run.check(as_json(changed))


def test_run_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    """An earlier version trained as the defaults of later fields do."""
    run, config = RunDir(tmp_path / "run"), as_json(run_config())
    earlier = as_json(run_config())
    del earlier["train"]["init_from"]
    write_json(run.config_file, earlier)
    run.check(config)
    with pytest.raises(ValueError, match=r"train\.init_from was '', is 'weights\.npy'"):
        run.check(as_json(run_config(**{"train.init_from": "weights.npy"})))


def test_crashes_are_starts_without_an_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.crashes == 0
    write_json(run.starts_file, {"starts": 2})
    assert run.crashes == 2


def test_config_is_read_back_equal(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), run_config(**{"optim.biases.decay_epochs": (1.0, 2.0)})
    assert run.read_config() is None
    write_json(run.config_file, as_json(config))
    assert run.read_config() == config


def test_config_of_version_0_1_is_refused_in_one_line(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path / "run"), as_json(run_config())
    for layer in config["model"]["layers"].values():
        layer["crosses"] = layer.pop("sees") == "all"
    write_json(run.config_file, config)
    with pytest.raises(ValueError, match=r"0\.1") as refused:
        run.read_config()
    assert str(refused.value) == (
        f"{run.config_file}: the config is of alexnet_jax 0.1, whose fields have other names; "
        "use that version or train again"
    )


@pytest.fixture
def study(tmp_path: Path) -> StudyDir:
    """Return the folder of a study of two arms, with seeds 1 and 0."""
    folder = StudyDir(tmp_path / "study")
    arms: dict[str, Any] = {"relu": {}, "no_lrn": {}}
    write_json(folder.study_file, {"name": "s", "reported": "mnist5k", "arms": arms, "seeds": [1, 0], "claims": []})
    return folder


def test_runs_are_in_the_studys_order_then_seeds_on_disk(study: StudyDir) -> None:
    write_json(study.run("no_lrn", 10).config_file, {})
    write_json(study.run("relu", 7).config_file, {})
    write_json(study.trial("relu", "optim.learning_rate", 0.01, 1000).config_file, {})
    runs = study.runs()
    assert [(arm, seed) for arm, seed, _ in runs] == [(arm, n) for arm in ("relu", "no_lrn") for n in (1, 0, 7, 10)]
    assert [folder.path for *_, folder in runs] == [study.path / arm / f"seed_{seed}" for arm, seed, _ in runs]


def test_trials_have_folders_of_their_own(study: StudyDir) -> None:
    trial = study.trial("relu", "optim.learning_rate", 0.01, 1000)
    assert trial.path == study.path / "relu" / "learning_rate_0.01" / "seed_1000"


def test_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a study's folder: it has no study.json; give one like runs/"):
        StudyDir(tmp_path).read()


def finished_run(path: Path) -> tuple[RunDir, Callable[..., dict[str, Any]]]:
    """Return a finished run of 4 epochs, and the function that returns its config with changes."""
    run = RunDir(path)

    def config(**changes: Any) -> dict[str, Any]:
        return as_json(run_config(**changes))

    write_json(run.config_file, config())
    write_text(run.metrics_file, '{"step": 4000}\n')
    write_json(run.result_file, {"steps": 4000})
    return run, config


def test_finished_run_is_extended_by_saying_so(tmp_path: Path) -> None:
    run, config = finished_run(tmp_path)
    longer = config(**{"train.epochs": 6.0, "optim.decay_epochs": (5.0,)})
    with pytest.raises(ValueError, match=r"train.epochs was 4.0, is 6.0\): .* give --extend to train it further"):
        run.check(longer)
    run.check(longer, extend=True)
    assert run.status == "finished"
    run.extend(longer)
    assert run.status == "unfinished"
    run.check(longer)
    changes = {"train.epochs": [4.0, 6.0], "optim.decay_epochs": [[3.0], [5.0]]}
    assert run.read_extensions() == [{"changes": changes, "result": {"steps": 4000}}]
    run.extend(longer)
    assert len(run.read_extensions()) == 1


def test_extension_that_crashed_begins_again(tmp_path: Path) -> None:
    """The result is gone, the config is not yet the new one."""
    run, config = finished_run(tmp_path)
    run.extend(config(**{"train.epochs": 6.0}))
    write_json(run.config_file, config())
    with pytest.raises(ValueError, match="give --extend"):
        run.check(config(**{"train.epochs": 6.0}))
    run.extend(config(**{"train.epochs": 6.0}))
    run.check(config(**{"train.epochs": 6.0}))
    assert len(run.read_extensions()) == 1


@pytest.mark.parametrize(
    ("changes", "finished"),
    [
        ({"train.epochs": 3.0}, True),
        ({"optim.learning_rate": 0.1}, True),
        ({"train.epochs": 6.0, "optim.momentum": 0.8}, True),
        ({"train.epochs": 6.0}, False),
    ],
    ids=["fewer epochs", "no more epochs", "another field", "unfinished"],
)
def test_only_longer_finished_runs_are_extended(tmp_path: Path, changes: dict[str, Any], finished: bool) -> None:
    run, config = finished_run(tmp_path)
    if not finished:
        run.result_file.unlink()
    with pytest.raises(ValueError, match=r"start again$"):
        run.check(config(**changes))
    with pytest.raises(ValueError, match="start again; --extend takes finished runs and more epochs, and may change"):
        run.extend(config(**changes))


def test_variables_that_change_numbers_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("SECRET", "1")
    variables = run_dir.environment()["variables"]
    assert (variables["JAX_ENABLE_X64"], variables["NVIDIA_TF32_OVERRIDE"]) == ("1", "0")
    assert "SECRET" not in variables


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    script = (
        f"from pathlib import Path; from alexnet_jax import run_dir; run_dir.write_text(Path({str(path)!r}), chr(177))"
    )
    done = run_script(script, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == "\u00b1".encode()


def test_other_classes_are_named_by_the_first_difference(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_json(run.dataset_file, {"classes": 3, "class_names": ["cat", "dog", "owl"], "fingerprint": "a"})
    metadata = {"name": "pets", "classes": 3, "class_names": ["cat", "cow", "owl"], "fingerprint": "a"}
    with pytest.raises(ValueError, match=r"\(class_names: class 1 was 'dog', is 'cow'\)"):
        run.check_dataset(metadata)
    write_json(run.dataset_file, {"classes": 1000})
    with pytest.raises(ValueError, match=r"\(classes: was 1000, is 3\): take images of its classes, or .* --new_head"):
        run.check_dataset(metadata)


def test_environments_of_a_run_are_kept(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.record_environment({"jax": "1", "cores": 2}) == {}
    assert run.record_environment({"jax": "1", "cores": 2}) == {}
    assert run.record_environment({"jax": "2", "cores": 2}) == {"jax": ["1", "2"]}
    assert run.record_environment({"jax": "2", "python": "3"}) == {"cores": [2, None], "python": [None, "3"]}
    first, second = {"jax": "1", "cores": 2}, {"jax": "2", "cores": 2}
    assert run.read_environment() == {"jax": "2", "python": "3", "earlier": [first, second]}


def test_environment_names_versions_and_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = run_dir.environment()
    assert json.loads(json.dumps(environment)) == environment
    assert {"alexnet_jax", "python", "jax", "numpy", "machine", "cores"} <= environment.keys()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert environment["commit"] == head.stdout.strip()
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert run_dir.environment() == environment | {"commit": "", "uncommitted_changes": False}


def test_environment_of_an_installed_package_names_no_commit_of_the_repository_around_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
    for arguments in (["init", "--quiet"], [*identity, "commit", "--quiet", "--allow-empty", "--message=theirs"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    installed = tmp_path / ".venv" / "run_dir.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(run_dir, "__file__", str(installed))
    environment = run_dir.environment()
    assert (environment["commit"], environment["uncommitted_changes"]) == ("", False)


@pytest.fixture
def complete(tmp_path: Path) -> RunDir:
    """Return the folder of a finished run."""
    run = RunDir(tmp_path / "lrn" / "seed_0")
    write_json(run.config_file, as_json(run_config()))
    write_json(run.dataset_file, {"classes": 2, "class_names": ["cat", "dog"]})
    write_json(run.environment_file, {"jax": "0.0"})
    write_text(run.metrics_file, '{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": NaN}\n')
    np.save(run.filters_file, np.ones((2, 5, 5, 1, 4), np.float32))
    write_json(run.by_class_file, {"class": ["cat", "dog"], "top1_error": [0.5, None]})
    write_json(run.result_file, {"steps": 2, "eval/loss": 1.0})
    write_json(run.failure_file, {"error": "disk full", "traceback": ""})
    return run


def test_undamaged_run_has_no_damages(complete: RunDir) -> None:
    assert complete.damages() == []
    assert complete.status == "finished"


@pytest.mark.parametrize(
    ("file", "without_numbers"),
    [
        ("config.json", False),
        ("dataset.json", False),
        ("metrics.jsonl", True),
        ("filters.npy", False),
        ("by_class.json", False),
        ("result.json", True),
        ("failure.json", False),
    ],
)
@pytest.mark.parametrize(
    "content", [b"\n", b"[1, 2]\n", b'{"step": 1, "other": "fields"}\n', b'{"steps": 1\n', b"\xff\xfe\x00\n"]
)
def test_damaged_file_is_named(complete: RunDir, file: str, without_numbers: bool, content: bytes) -> None:
    (complete.path / file).write_bytes(content)
    (damage,) = complete.damages()
    assert damage.startswith(str(complete.path / file))
    assert "must be " in damage
    assert complete.status == ("damaged" if without_numbers else "finished")


def test_metrics_that_end_early_are_named(complete: RunDir) -> None:
    first, _ = complete.metrics_file.read_text().splitlines(keepends=True)
    complete.metrics_file.write_text(first)
    assert complete.status == "damaged"
    (damage,) = complete.damages()
    assert damage.startswith(f"{complete.metrics_file}: must end with step 2, as result.json does")


def test_file_that_cannot_be_read_is_named(complete: RunDir) -> None:
    complete.by_class_file.unlink()
    complete.by_class_file.mkdir()
    assert complete.undamaged(RunDir.read_by_class) is None
    (damage,) = complete.damages()
    assert str(complete.by_class_file) in damage


def test_checkpoint_that_was_set_aside_is_named(complete: RunDir) -> None:
    (complete.checkpoints / "damaged_6").mkdir(parents=True)
    assert complete.damages() == [f"{complete.checkpoints}/damaged_6: could not be read, and was set aside; delete it"]


def test_array_of_any_size_in_a_damaged_header_is_not_allocated(complete: RunDir) -> None:
    content = complete.filters_file.read_bytes()
    complete.filters_file.write_bytes(content.replace(b"(2, 5, 5, 1, 4), }", b"(2, 99999999999),}"))
    with pytest.raises(DamagedFileError, match=r"filters.npy: cannot be read"):
        complete.read_filters()


def test_damaged_study_is_named_with_its_remedy(study: StudyDir) -> None:
    study.study_file.write_text(study.study_file.read_text().replace("seeds", "seedz"))
    with pytest.raises(DamagedFileError, match=r"study.json: must be the description of a study; re-run the study's"):
        study.read()


def test_only_folders_of_seeds_are_runs(study: StudyDir) -> None:
    for name in ("seed_5_backup", "seed_", "seed_08", "seed_x", "seed_7"):
        (study.path / "relu" / name).mkdir(parents=True)
    assert [seed for arm, seed, _ in study.runs() if arm == "relu"] == [1, 0, 7]


def test_workdir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="run: must be a folder, and is a file; choose another --workdir"):
        RunDir(tmp_path / "run").check({})
