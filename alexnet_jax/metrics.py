"""What a run says while it goes: metrics.jsonl, TensorBoard, a progress bar, plain lines in train.log."""

import json
import logging
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet_jax import records

# What TensorBoard's custom scalars tab shows of all runs together.
LAYOUT = {
    "errors": {
        "held-out images, top-1": ["Multiline", ["^eval/top1_error$"]],
        "held-out images, top-5": ["Multiline", ["^eval/top5_error$"]],
        "training images, seen as held-out ones are": ["Multiline", ["^train_eval/top1_error$"]],
        "training batches": ["Multiline", ["^train/top1_error$"]],
    },
    "losses": {
        "held-out images": ["Multiline", ["^eval/loss$"]],
        "training batches": ["Multiline", ["^train/loss$"]],
    },
    "speed": {"images a second": ["Multiline", ["^images_per_second$"]]},
}


def quiet_libraries() -> None:
    """Has libraries say errors only: JAX, Orbax and TFDS would drown a command's own lines."""
    logging.getLogger().setLevel(logging.ERROR)


def write_layout(study: Path) -> None:
    """Has TensorBoard arrange the charts of a study's runs; does nothing where that was done."""
    if not list(study.glob("events.out.tfevents.*")):
        with _tensorboard().SummaryWriter(str(study)) as writer:
            writer.add_custom_scalars(LAYOUT)


class Logs:
    """The records of one run; a context manager."""

    def __init__(self, workdir: Path, *, start: int, stop: int):
        """
        Args:
          workdir: the run's folder, whose name and whose parent's name the run goes by on the terminal.
          start: steps that are done already; what was recorded of later ones is forgotten, as they are done again.
          stop: steps of the whole run.
        """
        self._stop = stop
        self._first: tuple[int, float] | None = None  # the first step that was done, and when: before it, XLA compiles
        metrics = workdir / "metrics.jsonl"
        kept = [line for line in records.complete_lines(metrics) if json.loads(line)["step"] <= start]
        records.write_text(metrics, "".join(kept))
        self._metrics = metrics.open("a", buffering=1)
        self._log = (workdir / "train.log").open("a", buffering=1)
        self._tensorboard = _tensorboard().SummaryWriter(
            str(workdir), purge_step=start + 1, filename_suffix=f".from_step_{start}"
        )
        self._name = "/".join(workdir.absolute().parts[-2:])
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}  {task.fields[speed]}"),
            TimeRemainingColumn(),
            disable=not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(self._name, total=stop, completed=start, loss="", speed="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.say(f"stopped: {error!r}")
        self._bar.stop()
        self._tensorboard.close()
        self._metrics.close()
        self._log.close()

    def say(self, text: str) -> None:
        """One line to train.log, and to standard output where that is no terminal, so shows no bar."""
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self._bar.disable:
            print(f"{self._name}: {text}", flush=True)

    def progress(self, step: int) -> None:
        """Moves the bar; call it after every step."""
        self._first = self._first or (step, time.monotonic())
        self._bar.update(self._task, completed=step)

    def write(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Records metrics under the same names everywhere, and returns them.

        Args:
          step: how many steps are done.
        """
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"step {step}/{self._stop}  {values}{self._time_left(step)}")
        if "train/loss" in metrics:
            speed = metrics.get("images_per_second", math.nan)
            self._bar.update(self._task, loss=f"loss {metrics['train/loss']:.3f}", speed=f"{speed:.0f} images/s")
        return metrics

    def _time_left(self, step: int) -> str:
        if self._first is None or step <= self._first[0]:
            return ""
        seconds_per_step = (time.monotonic() - self._first[1]) / (step - self._first[0])
        return f"  {(self._stop - step) * seconds_per_step:.0f} s left"

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture for TensorBoard: (height, width, 3) of floats from 0 to 1."""
        self._tensorboard.add_image(name, pixels, step, dataformats="HWC")

    def hparams(self, values: dict[str, Any], metrics: dict[str, float]) -> None:
        """The run's row in TensorBoard's hparams tab, with its final metrics."""
        flat = {name: v if isinstance(v, int | float | str) else str(v) for name, v in values.items()}
        # The summaries go into the run's own file: SummaryWriter.add_hparams would open a second run for them.
        for summary in _tensorboard().summary.hparams(flat, metrics):
            self._tensorboard.file_writer.add_summary(summary)


def _tensorboard() -> Any:
    """tensorboardX, which imports PyTorch where that is installed: a second that only training is to take."""
    import tensorboardX.summary

    return tensorboardX
