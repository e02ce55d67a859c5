"""Metrics are recorded once, under the same names everywhere."""

import contextlib
import errno
import io
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexnet_jax import events, metrics
from alexnet_jax.metrics import LAYOUT, MetricWriter, write_layout
from alexnet_jax.run_dir import DamagedFileError, RunDir


def points(run: RunDir, name: str) -> list[tuple[int, float]]:
    """Return the steps and values that TensorBoard shows."""
    return [(event.step, round(event.value, 3)) for event in EventAccumulator(str(run.path)).Reload().Scalars(name)]


def record(run: RunDir, *steps: int, start: int = 0) -> MetricWriter:
    """Record a loss of a tenth of the step after each step, without closing the files: as if killed."""
    writer = MetricWriter(run, start=start, stop=100)
    for step in steps:
        writer.write(step, {"epoch": step / 10, "train/loss": step / 10})
    return writer


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(0, []), (1, [range(6, 9)]), (4, [range(6, 9), range(9, 12)]), (99, [range(6, 9), range(9, 12), range(12, 13)])],
)
def test_profile_has_the_requested_steps_or_the_rest_of_their_span(
    steps: int, expected: list[range], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first spans, which compile, are left out."""
    recording: list[bool] = [False]

    @contextlib.contextmanager
    def trace(*_: Any, **__: Any) -> Iterator[None]:
        recording[0] = True
        yield
        recording[0] = False

    monkeypatch.setattr(metrics.jax.profiler, "trace", trace)
    spans = [range(3), range(3, 6), range(6, 9), range(9, 12), range(12, 13)]
    assert [span for span, _ in metrics.profiled(spans, spans, steps, tmp_path) if recording[0]] == expected
    assert not recording[0]


class Disk:
    """A disk with some room, and then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.room = math.inf
        self._write = os.write
        monkeypatch.setattr(events.os, "write", self.write)

    def write(self, file: int, content: bytes) -> int:
        if content and self.room < 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(file, content[: int(min(self.room, len(content)))])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 30, 100, 1000])
def test_full_disk_neither_stops_a_run_nor_loses_a_point_once_it_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: int
) -> None:
    disk, run = Disk(monkeypatch), RunDir(tmp_path)
    with record(run, 1, 2) as writer:
        disk.room = room
        for step in range(3, 50):
            writer.write(step, {"train/loss": step / 10})
            writer.flush()
        writer.image(49, "filters", np.zeros, (4, 4, 3))
        disk.room = math.inf
        writer.write(50, {"train/loss": 5.0})
    expected = [(step, step / 10) for step in range(1, 51)]
    assert [(line["step"], line["train/loss"]) for line in run.metrics()] == expected
    assert points(run, "train/loss") == expected
    assert len(EventAccumulator(str(run.path)).Reload().Images("filters")) == 1
    log = run.log_file.read_text()
    assert [log.count(f"step {step}/100 ") for step in range(1, 51)] == [1] * 50
    printed = capsys.readouterr().out
    for file in (run.log_file.name, run.metrics_file.name, "events.out.tfevents"):
        assert len(re.findall(rf"{file}.*: cannot be written now \(No space left on device\)", printed)) == 1


def test_disk_that_stays_full_loses_the_last_records_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, run = Disk(monkeypatch), RunDir(tmp_path)
    with record(run, 1, 2) as writer:
        disk.room = 0
        writer.write(3, {"train/loss": 0.3})
        assert not writer.flush()
    assert [line["step"] for line in run.metrics()] == [1, 2]
    assert "metrics.jsonl: lacks its last 31 bytes, which could not be written" in capsys.readouterr().out


def test_points_are_in_tensorboard_once_after_several_kills(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    writer = record(run, 1, 2, 3, 4)
    writer.image(2, "filters", np.zeros, (4, 4, 3))
    record(run, 3, 4, 5, start=2)
    for start in (3, 5):
        (file,) = run.path.glob(f"{events.EVENTS}.*")
        file.write_bytes(file.read_bytes()[: -40 * start])  # what was not yet written when the machine stopped
        record(run, *range(start + 1, 8), start=start)
    for name in ("epoch", "train/loss"):
        assert points(run, name) == [(step, step / 10) for step in range(1, 8)]
    assert [event.step for event in EventAccumulator(str(run.path)).Reload().Images("filters")] == [2]
    assert len(list(run.path.glob(f"{events.EVENTS}.*"))) == 1


def test_points_are_in_tensorboard_once_when_two_files_are_left(tmp_path: Path) -> None:
    """The process was killed before it deleted the file that it replaces."""
    run = RunDir(tmp_path)
    record(run, 1, 2, 3)
    (former,) = run.path.glob(f"{events.EVENTS}.*")
    content = former.read_bytes()
    record(run, 3, 4, start=2)
    former.write_bytes(content)
    assert points(run, "train/loss") == [(step, step / 10) for step in range(1, 5)]


def test_name_is_in_tensorboard_once_for_each_step(tmp_path: Path) -> None:
    """Training and evaluation both record the epoch."""
    run = RunDir(tmp_path)
    for start in (0, 1):
        with MetricWriter(run, start=start, stop=2) as writer:
            for name in ("train/loss", "eval/loss"):
                writer.write(start + 1, {"epoch": 0.1 * (start + 1), name: 0.5})
    assert points(run, "epoch") == [(1, 0.1), (2, 0.2)]
    assert points(run, "eval/loss") == [(1, 0.5), (2, 0.5)]


def test_damaged_line_of_the_metrics_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    record(run, 1, 2, 3)
    lines = run.metrics_file.read_text().splitlines()
    run.metrics_file.write_text("\n".join([lines[0], lines[1].replace(":", ";", 1), lines[2], ""]))
    with pytest.raises(DamagedFileError, match=r"metrics.jsonl, line 2: cannot be read .*; delete the line to do with"):
        record(run, start=3)


def test_metrics_that_lack_what_the_checkpoint_says_are_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    record(run, 1, 2).write(2, {"eval/loss": math.nan})
    expected = {"epoch": 0.2, "train/loss": 0.2, "eval/loss": math.nan}
    MetricWriter(run, start=2, stop=4, expected=expected)
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines[:-1]))
    with pytest.raises(DamagedFileError, match=r"metrics.jsonl: must have eval/loss=nan up to step 2, as the checkpoi"):
        MetricWriter(run, start=2, stop=4, expected=expected)


def test_image_that_cannot_be_drawn_is_logged(tmp_path: Path) -> None:
    def draw(text: str) -> np.ndarray:
        raise ValueError(text)

    run = RunDir(tmp_path)
    with record(run, 1) as writer:
        writer.image(1, "errors", draw, "no such glyph")
        writer.write(2, {"train/loss": 0.2})
    assert "errors cannot be drawn: ValueError('no such glyph')" in run.log_file.read_text()
    assert points(run, "train/loss") == [(1, 0.1), (2, 0.2)]


def test_closed_output_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Pipe())
    record(RunDir(tmp_path), 1)
    assert "step 1/100" in RunDir(tmp_path).log_file.read_text()


def test_resumed_run_drops_the_records_of_steps_that_are_trained_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with MetricWriter(run, start=0, stop=6) as writer:
        for step in (2, 4, 6):
            writer.write(step, {"train/loss": step / 10})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 8, "tra')  # killed while it wrote a line
    with MetricWriter(run, start=4, stop=6) as writer:
        assert [line["step"] for line in run.metrics()] == [2, 4]
        writer.write(6, {"train/loss": 0.7})
    assert run.metrics() == [{"step": step, "train/loss": loss} for step, loss in ((2, 0.2), (4, 0.4), (6, 0.7))]
    assert run.metrics_file.read_text().count("\n") == 3
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, round(event.value, 3)) for event in events] == [(2, 0.2), (4, 0.4), (6, 0.7)]


def test_log_has_the_error_that_stopped_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(OSError, match="disk full"), MetricWriter(run, start=0, stop=6):
        raise OSError("disk full")
    assert "stopped: OSError('disk full')" in run.log_file.read_text()


def test_log_has_the_metrics_and_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock by which the first step takes a minute, because XLA compiles, and the others three seconds."""
    run, now = RunDir(tmp_path / "no_lrn" / "seed_0"), [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime))
    with MetricWriter(run, start=0, stop=5) as writer:
        for step, clock, loss in ((1, 60, 1.25), (2, 63, 0.5), (3, 66, 0.25)):
            now[0] = clock
            writer.progress(step)
            writer.write(step, {"train/loss": loss})
    first, _, last = run.log_file.read_text().splitlines()
    assert first.endswith("step 1/5  train/loss 1.25")
    assert last.endswith("step 3/5  train/loss 0.25  6 s left")
    assert "no_lrn/seed_0: step 1/5  train/loss 1.25" in capsys.readouterr().out


class Terminal:
    """A stand-in for a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_terminal_shows_a_bar_with_loss_speed_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with MetricWriter(RunDir(tmp_path / "no_lrn" / "seed_0"), start=0, stop=20) as writer:
        writer.write(10, {"train/loss": 1.25, "images_per_second": 321.0})
        for step in (8, 9, 10):
            writer.progress(step)
            time.sleep(0.1)
    for text in ("no_lrn/seed_0", "10/20", "loss 1.250", "321 images/s", "0:00:0"):
        assert text in terminal.text
    assert "train/loss 1.25" not in terminal.text  # the line of the log


def test_layout_of_charts_is_written_once(tmp_path: Path) -> None:
    write_layout(tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    write_layout(tmp_path)
    assert [(path, path.stat().st_mtime_ns) for path in tmp_path.iterdir()] == [(file, written)]
    assert all(chart.encode() in file.read_bytes() for charts in LAYOUT.values() for chart in charts)
