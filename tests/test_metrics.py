"""Metrics are recorded once, under the same names everywhere."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexnet_jax import metrics
from alexnet_jax.metrics import LAYOUT, MetricWriter, write_layout
from alexnet_jax.run_dir import RunDir


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
