"""The scripts of experiments/gpu, dry-run on the CPU: what they measure is of no matter here."""

import csv
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from alexnet_jax import layers
from alexnet_jax.config import load_study
from alexnet_jax.run_dir import complete_lines
from alexnet_jax.studies import runner
from support import REPOSITORY, SHALLOW, assert_close

SCRIPTS = REPOSITORY / "experiments" / "gpu"


def load(name: str) -> ModuleType:
    """Import a script, which may import those of experiments/speed."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "experiments" / "speed"))
        spec.loader.exec_module(module)
    return module


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_measurements_are_appended_and_done_once(tmp_path: Path) -> None:
    output = tmp_path / "results.csv"
    arguments = ("--tiny", f"--output={output}", "--commit=abc", "ceilings")
    first = run_script("measure", *arguments)
    assert first.returncode == 0, first.stderr
    written = rows(output)
    assert list(written[0]) == list(load("measure").COLUMNS)
    assert [row["what"] for row in written] == ["matmul"] * 4 + ["copy", "job ceilings"]
    assert {(row["card"], row["commit"], row["piece"]) for row in written} == {("cpu", "abc", "ceilings")}
    for row in written[:-1]:
        assert 0 < float(row["low"]) <= float(row["value"]) <= float(row["high"])
        assert (row["n"], row["unit"]) == ("2", "GB/s" if row["what"] == "copy" else "TFLOP/s")
    again = run_script("measure", *arguments)
    assert "ceilings: finished before" in again.stdout
    assert rows(output) == written


def test_failed_and_endless_jobs_are_recorded_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = load("measure")
    fake = """import subprocess, sys, time
name = sys.argv[-1]
if name == "endless":
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
sys.exit("no such kernel" if name == "failing" else 0)
"""
    (tmp_path / "pieces.py").write_text(fake)
    monkeypatch.setattr(measure, "HERE", tmp_path)
    monkeypatch.setattr(measure, "JOBS", tuple(measure.Job(name, 2) for name in ("endless", "failing", "good")))
    output = tmp_path / "results.csv"
    monkeypatch.setattr(sys, "argv", ["measure.py", f"--output={output}", "--commit=abc"])
    measure.main()
    assert [(row["what"], row["unit"], row["note"]) for row in rows(output)] == [
        ("job endless", "failed", "did not end within 2 s"),
        ("job failing", "failed", "exit status 1: no such kernel"),
        ("job good", "s", ""),
    ]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "good", "failing"])
    measure.main()
    assert [row["what"] for row in rows(output)[3:]] == ["job failing"]


def test_jobs_are_named_by_their_first_words() -> None:
    measure = load("measure")
    assert [job.name for job in measure.select(["step paper"])] == ["step paper 128", "step paper 512"]
    assert [job.name for job in measure.select(["step small", "kernels pool"])] == ["step small 128", "kernels pool"]
    assert len(measure.select([])) == len(measure.JOBS) == len({job.name for job in measure.JOBS})
    assert all(job.limit < 240 for job in measure.JOBS)
    with pytest.raises(SystemExit, match="JOB=ste: must be one of"):
        measure.select(["ste"])


def test_table_of_targets_is_current() -> None:
    table = load("table")
    text = (SCRIPTS / "README.md").read_text()
    assert table.pages.insert(text, table.table()) == text, "run experiments/gpu/table.py"
    names = {job.name for job in load("measure").JOBS}
    assert all(any(f"{name} ".startswith(f"{target.job} ") for name in names) for target in table.TARGETS)


def test_target_with_an_unmeasured_value_says_so(tmp_path: Path) -> None:
    table = load("table")
    header = "what,network,dtype,batch,unit,value\n"
    row = "time over that of ours: pytorch compile,torchvision,{},128,ratio,{}\n"
    for values, expected in (
        ((1.5,), "not measured yet"),
        ((1.5, 1.25), "1.50 times; 1.25 times"),
        ((1.5, 1.25, 2.0), "2.00 times; 1.25 times"),
    ):
        dtypes = ("tensorfloat32", "bfloat16", "tensorfloat32")
        rows = [row.format(dtype, value) for dtype, value in zip(dtypes, values, strict=False)]
        (tmp_path / "results.csv").write_text(header + "".join(rows))
        (line,) = [line for line in table.table(tmp_path / "results.csv").splitlines() if "torchvision" in line]
        assert line.split(" | ")[2] == expected


def test_largest_value_of_any_network_is_shown(tmp_path: Path) -> None:
    """The same network may be there twice, at full size and with few features."""
    table = load("table")
    whats = (table.LOSS, table.GRADIENTS, table.WORST)
    rows = [f'"{what}",paper,float32,,ratio,{value}' for value in (0.5, 0.125) for what in whats]
    (tmp_path / "results.csv").write_text("\n".join(["what,network,dtype,batch,unit,value", *rows]))
    assert "5.0e-01 and 5.00e-01; worst parameter 5.0e-01" in table.table(tmp_path / "results.csv")


@pytest.mark.parametrize(("statuses", "expected"), [((0, 0), 0), ((0, -9), -9), ((1, 0), 1)])
def test_study_fails_if_one_of_its_processes_does(
    statuses: tuple[int, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process has a negative status."""
    study_queue, ends = load("study_queue"), iter(statuses)

    def start(*_: Any, **__: Any) -> SimpleNamespace:
        status = next(ends)
        return SimpleNamespace(poll=lambda: status)

    monkeypatch.setattr(study_queue.subprocess, "Popen", start)
    assert study_queue.run_study([], time.monotonic() + 60, grace=1, processes=2) == expected


def test_running_studies_are_packed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that vanishes meanwhile, as old checkpoints do, leaves the archive of before."""
    study_queue, start = load("study_queue"), subprocess.Popen
    monkeypatch.setattr(study_queue, "PACK_SECONDS", 0.02)
    sleep = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    monkeypatch.setattr(study_queue.subprocess, "Popen", lambda *_, **__: start(sleep))
    archive, runs = tmp_path / "queue.tar", tmp_path / "runs"
    (runs / "a").mkdir(parents=True)
    (runs / "a" / "results.csv").write_text("1")
    packed = []

    def keep() -> None:
        study_queue.pack_meanwhile(archive, runs, ["a"])
        packed.append(archive.read_bytes())
        monkeypatch.setattr(study_queue, "units", lambda study: [[study / "results.csv"], [study / "vanished"]])

    assert study_queue.run_study([], time.monotonic() + 60, grace=1, meanwhile=keep) == 0
    assert len(packed) > 2
    assert len(set(packed)) == 1
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["a/results.csv"]


def test_archives_have_all_results_and_unfinished_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_queue = load("study_queue")
    monkeypatch.setattr(study_queue, "PART_BYTES", 10_000)
    contents = {
        "a/results.csv": 10,
        "a/arm/seed_0/result.json": 4000,
        "a/arm/seed_0/events.out.tfevents.1": 10,
        "a/arm/seed_0/checkpoints/12/state/array": 10,
        "a/arm/seed_1/metrics.jsonl": 6000,
        "a/arm/seed_1/checkpoints/9/state/array": 10,
        "a/arm/seed_1/checkpoints/10/state/array": 6000,
        "a/arm/seed_2/metrics.jsonl": 10,
        "a/arm/seed_2/checkpoints/3/state/array": 20_000,
        "a/arm/seed_2/checkpoints/3/progress": 10,
        "elsewhere/results.csv": 10,
    }
    for name, size in contents.items():
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).write_bytes(os.urandom(size))
    archive = tmp_path / "back" / "queue.tar"
    study_queue.pack(archive, tmp_path / "runs", ["a"])
    expected = [
        ["a/results.csv", "a/arm/seed_0/result.json"],
        ["a/arm/seed_1/metrics.jsonl", "a/arm/seed_2/metrics.jsonl"],
        ["a/arm/seed_1/checkpoints/10/state/array"],
    ]
    for number, names in enumerate(expected):
        with tarfile.open(study_queue.part_path(archive, number)) as tar:
            assert sorted(tar.getnames()) == sorted(names)
    assert not study_queue.part_path(archive, len(expected)).exists()
    study_queue.unpack(archive, tmp_path / "new")
    for name in itertools.chain(*expected):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "runs" / name).read_bytes()


def test_queues_of_one_folder_know_their_own_studies(tmp_path: Path) -> None:
    study_queue = load("study_queue")
    files = {study_queue.done_file(tmp_path / f"{name}.tar", tmp_path / "runs") for name in ("lrn", "pooling")}
    assert {file.name for file in files} == {"lrn.json", "pooling.json"}


@pytest.mark.parametrize("name", load("alternatives").LRN)
def test_alternative_forms_of_lrn_equal_ours(name: str) -> None:
    x, cotangent = np.random.default_rng(0).normal(0, 3, (2, 2, 3, 3, 7)).astype(np.float32)
    constants: dict[str, Any] = {"n": 5, "k": 2.0, "alpha": 0.5, "beta": 0.75}
    form, ours = partial(load("alternatives").LRN[name], **constants), partial(layers.lrn, **constants)
    assert_close_leaves(value_and_gradients(form, cotangent, x), value_and_gradients(ours, cotangent, x))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [(15, 11, 4, (0, 3)), (7, 5, 1, (2, 2))])
def test_alternative_convolutions_of_towers_equal_ours(
    size: int, kernel: int, stride: int, padding: tuple[int, int]
) -> None:
    generator, alternatives = np.random.default_rng(0), load("alternatives")
    images = generator.normal(size=(2, 3, size, size, 4)).astype(np.float32)
    kernels = generator.normal(size=(2, kernel, kernel, 4, 5)).astype(np.float32)
    options: dict[str, Any] = {"strides": (stride, stride), "padding": (padding, padding)}
    side = (size + sum(padding) - kernel) // stride + 1
    arguments = (generator.normal(size=(2, 3, side, side, 5)).astype(np.float32), images, kernels)
    expected = value_and_gradients(jax.vmap(partial(layers.conv, **options)), *arguments)
    forms = [jax.vmap(partial(getattr(alternatives, name), **options)) for name in ("conv", "conv_by_patches")]
    for form in (*forms, partial(alternatives.conv_joined, **options)):
        assert_close_leaves(value_and_gradients(form, *arguments), expected)


def value_and_gradients(function: Callable, cotangent: np.ndarray, *arguments: np.ndarray) -> tuple[jax.Array, ...]:
    """Return a function's value, and the gradients of all arguments for a cotangent."""

    @jax.jit
    def both(cotangent: jax.Array, *arguments: jax.Array) -> tuple[jax.Array, ...]:
        value, backward = jax.vjp(function, *arguments)
        return value, *backward(cotangent)

    return both(cotangent, *arguments)


def assert_close_leaves(actual: tuple[jax.Array, ...], expected: tuple[jax.Array, ...]) -> None:
    """Assert that value and gradients agree within rounding."""
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-5)


def test_study_is_stopped_at_the_deadline(tmp_path: Path) -> None:
    study_queue = load("study_queue")
    began, arguments = time.monotonic(), ["--config=configs/base.py:embedded", f"--workdir={tmp_path}"]
    assert study_queue.run_study(arguments, began + 0.5, grace=30) is None
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_queue_of_studies_resumes_from_its_archive_in_another_folder(tmp_path: Path) -> None:
    """The second study is interrupted; the results are those of runs in one go."""
    tiny: dict[str, Any] = SHALLOW | {"train.log_every": 20, "train.checkpoint_every": 10_000, "eval.every_epochs": 0.5}
    sizes = [f"--config.{key}={value}" for key, value in tiny.items() if key != "train.epochs"]
    arguments = {name: [*sizes, f"--config.train.epochs={value}"] for name, value in (("short", 0.012), ("long", 0.5))}
    specs = [
        f"--config=configs/base.py:embedded {shlex.join(each)} --workdir={name}" for name, each in arguments.items()
    ]
    archive, folders = tmp_path / "queue.tar", [tmp_path / "first", tmp_path / "second"]

    def start(folder: Path) -> subprocess.Popen[str]:
        options = ("--minutes=5", f"--archive={archive}", f"--folder={folder}")
        command = [sys.executable, str(SCRIPTS / "study_queue.py"), *options, *specs]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    with start(folders[0]) as interrupted:
        metrics = folders[0] / "long" / "base" / "seed_0" / "metrics.jsonl"
        while not complete_lines(metrics):
            assert interrupted.poll() is None
            time.sleep(0.02)
        interrupted.terminate()
        output = interrupted.communicate()[0]
    assert interrupted.returncode == 1, output
    assert not (folders[0] / "long" / "results.csv").exists()
    with start(folders[1]) as resumed:
        output = resumed.communicate()[0]
    assert resumed.returncode == 0, output
    assert "short: finished before" in output
    log = (folders[1] / "long" / "base" / "seed_0" / "train.log").read_text()
    (first, second) = re.findall(r": from step (\d+) to 500", log)
    assert int(first) == 0 < int(second), "the checkpoint was not in the archive"
    runner.run_study(load_study("configs/base.py:embedded", arguments["long"]), tmp_path / "whole" / "long")
    for name, whole in (("short", folders[0]), ("long", tmp_path / "whole")):
        tables = [pd.read_csv(folder / name / "results.csv") for folder in (folders[1], whole)]
        actual, expected = (table.drop(columns=["images_per_second", "seconds"]) for table in tables)
        pd.testing.assert_frame_equal(actual, expected, check_exact=True)
