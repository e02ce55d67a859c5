"""What was recorded is what TensorBoard shows, and is recorded once."""

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexnet_jax import logs


def test_a_resumed_run_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    with logs.Logs(tmp_path, start=0, stop=6) as first:
        for step in (2, 4, 6):
            first.write(step, {"train/loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tra')
    with logs.Logs(tmp_path, start=4, stop=6) as second:
        second.write(6, {"train/loss": 0.7})
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, round(event.value, 3)) for event in shown] == [(2, 0.2), (4, 0.4), (6, 0.7)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "train/loss": 0.2}, {"step": 4, "train/loss": 0.4}, {"step": 6, "train/loss": 0.7}]


def test_the_log_tells_what_stopped_a_run(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), logs.Logs(tmp_path, start=0, stop=6):
        raise OSError("disk full")
    assert "stopped: OSError('disk full')" in (tmp_path / "train.log").read_text()


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


def test_a_terminal_shows_a_bar_with_loss_speed_and_time_left(tmp_path: Path, monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    folder = tmp_path / "no_lrn" / "seed_0"
    folder.mkdir(parents=True)
    with logs.Logs(folder, start=0, stop=20) as run:
        run.write(10, {"train/loss": 1.25, "images_per_second": 321.0})
        for step in (8, 9, 10):
            run.progress(step)
            time.sleep(0.1)
    for text in ("no_lrn/seed_0", "10/20", "loss 1.250", "321 images/s", "0:00:0"):
        assert text in terminal.text
    assert "train/loss 1.25" not in terminal.text  # that is the log's
