"""Records of a run (metrics.jsonl, TensorBoard, progress bar, train.log) and its timing."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from etils import epy
from ml_collections import ConfigDict
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from alexnet_jax.data.loader import Batch
from alexnet_jax.events import EVENTS, EventFile, PatientFile, read_events
from alexnet_jax.optim import Plateau
from alexnet_jax.run_dir import DamagedFileError, RunDir, write_text

with epy.lazy_imports():  # it imports PyTorch where that is installed, which takes seconds
    import tensorboardX

TOLERABLE_WAIT = 0.1  # fraction of the training time
COMPILING_SPANS = 2  # first spans of steps of a run, which a profile leaves out

# Charts of all runs together, in TensorBoard's custom scalars tab.
LAYOUT = {
    "errors": {
        "held-out images, top-1": ["Multiline", ["^eval/top1_error$"]],
        "held-out images, top-5": ["Multiline", ["^eval/top5_error$"]],
        "training images, evaluated as held-out ones": ["Multiline", ["^train_eval/top1_error$"]],
        "training batches": ["Multiline", ["^train/top1_error$"]],
    },
    "losses": {
        "held-out images": ["Multiline", ["^eval/loss$"]],
        "training batches": ["Multiline", ["^train/loss$"]],
    },
    "speed": {"images per second": ["Multiline", ["^images_per_second$"]]},
}


def write_layout(study: Path) -> None:
    """Write the layout of TensorBoard's charts into a study's folder, once."""
    if not list(study.glob(f"{EVENTS}.*")):
        events = EventFile(study)
        events.add(tensorboardX.summary.custom_scalars(LAYOUT))
        events.close()


@dataclasses.dataclass
class Progress:
    """Progress of a run: with the state, all it needs to resume."""

    step: int = 0  # finished steps
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # the last value of each
    plateau: Plateau = dataclasses.field(default_factory=Plateau)
    images: int = 0  # trained on during `training_seconds`
    training_seconds: float = 0.0  # without compilation, evaluation and checkpoints
    waiting_seconds: float = 0.0  # the part of them in which no batch was ready
    seconds: float = 0.0  # in all

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the progress that `dataclasses.asdict` made a dictionary of."""
        return cls(**values | {"plateau": Plateau(**values["plateau"])})


class MetricWriter:
    """The records of one run under the same names everywhere; a context manager.

    Earlier records of steps after `start` are dropped, because these steps, up to `stop`, are done again. Write
    errors neither stop nor delay the run: they are logged once, and the records are written later if possible.
    """

    def __init__(self, run: RunDir, *, start: int, stop: int, expected: dict[str, float] | None = None):
        """Open the records of a run.

        Args:
          expected: the last value of each metric by step `start`, as the checkpoint has them; None: not known.

        Raises:
          DamagedFileError: a record of metrics.jsonl cannot be read, or the last ones are missing.
        """
        self._stop = stop
        self._first: tuple[int, float] | None = None  # first step and its time: before it, XLA compiles
        self._name = run.name
        values = TextColumn("{task.fields[loss]}  {task.fields[speed]}", markup=False)
        description = TextColumn("{task.description}", markup=False)
        columns = (description, BarColumn(), MofNCompleteColumn(), values, TimeRemainingColumn())
        self._bar = ProgressBar(*columns, disable=not sys.stdout.isatty())
        self._task = self._bar.add_task(self._name, total=stop, completed=start, loss="", speed="")
        self._log = PatientFile(run.log_file, self._print)
        kept = [line for line in run.metrics() if line["step"] <= start]
        last = {name: value for line in kept for name, value in line.items()}
        for name, value in (expected or {}).items():
            if str(last.get(name)) != str(value):  # NaN, too, is itself
                raise DamagedFileError(
                    f"{run.metrics_file}: must have {name}={value} up to step {start}, as the checkpoint says; delete "
                    "the run's folder to train it again"
                )
        write_text(run.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = PatientFile(run.metrics_file, self.log)
        former_events = sorted(run.path.glob(f"{EVENTS}.*"))
        self._events = EventFile(run.path, self.log)
        self._named: tuple[int, set[str]] = 0, set()  # a step, and the names that TensorBoard has of it
        self._replace_events(former_events, kept, start)

    def _replace_events(self, former: list[Path], metrics: list[dict[str, Any]], start: int) -> None:
        """Write the events of former processes up to a step into the new file, and the metrics that they lack."""
        records: dict[tuple[str, int], bytes] = {}  # the last one of each name and step
        for file in former:
            for record in read_events(file):
                event = tensorboardX.proto.event_pb2.Event.FromString(record)
                for value in event.summary.value:
                    if event.step <= start and not value.tag.startswith("_hparams_"):  # which the end of the run adds
                        records[value.tag, event.step] = record
        for record in records.values():
            self._events.add_record(record)
        for line in metrics:
            for name, value in line.items():
                if name != "step" and (name, line["step"]) not in records:
                    self._scalar(line["step"], name, value)
        self._named = start, {name for name, step in records if step == start}  # a run at its end draws again
        if self._events.flush():
            for file in former:
                file.unlink()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        try:
            if error is not None:
                self.log(f"stopped: {error!r}")
        finally:
            self._bar.stop()
            self._events.close()
            self._metrics.close()
            self._log.close()

    def log(self, text: str) -> None:
        """Write a line to train.log, and to standard output unless that is a terminal with a progress bar."""
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode(errors="backslashreplace"))
        if self._bar.disable:
            self._print(text)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the reader of a pipe has ended, or the output is closed
            print(f"{self._name}: {text}", flush=True)

    def progress(self, step: int) -> None:
        """Move the progress bar; call it after every step."""
        self._first = self._first or (step, time.monotonic())
        self._bar.update(self._task, completed=step)

    def write(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Record metrics after a number of finished steps, and return them."""
        self._metrics.write((json.dumps({"step": step, **metrics}) + "\n").encode())
        for name, value in metrics.items():
            self._scalar(step, name, value)
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.log(f"step {step}/{self._stop}  {values}{self._time_left(step)}")
        if "train/loss" in metrics:
            speed = metrics.get("images_per_second", math.nan)
            self._bar.update(self._task, loss=f"loss {metrics['train/loss']:.3f}", speed=f"{speed:.0f} images/s")
        return metrics

    def _scalar(self, step: int, name: str, value: float) -> None:
        if self._is_new(step, name):
            self._events.add(tensorboardX.summary.scalar(name, value), step)

    def _is_new(self, step: int, name: str) -> bool:
        """Return whether TensorBoard has nothing of this name at a step, and remember that it has from now on."""
        known_step, names = self._named
        if step != known_step:
            self._named = step, names = step, set()
        is_new = name not in names
        names.add(name)
        return is_new

    def _time_left(self, step: int) -> str:
        if self._first is None or step <= self._first[0]:
            return ""
        seconds_per_step = (time.monotonic() - self._first[1]) / (step - self._first[0])
        return f"  {(self._stop - step) * seconds_per_step:.0f} s left"

    def flush(self) -> bool:
        """Wait until the records are on disk, which must not lag behind a checkpoint; return whether they are."""
        return all([self._metrics.flush(), self._events.flush()])

    def image(self, step: int, name: str, draw: Callable[..., np.ndarray], *arguments: Any) -> None:
        """Draw an image for TensorBoard, (height, width, 3) of floats from 0 to 1; log the error if that fails."""
        if not self._is_new(step, name):
            return
        try:
            summary = tensorboardX.summary.image(name, draw(*arguments), dataformats="HWC")
        except Exception as error:  # no image is worth a run
            self.log(f"{name} cannot be drawn: {error!r}")
        else:
            self._events.add(summary, step)

    def hparams(self, values: dict[str, Any], metrics: dict[str, float]) -> None:
        """Record the run's row in TensorBoard's hparams tab: its labels and final metrics."""
        flat = {name: v if isinstance(v, int | float | str) else str(v) for name, v in values.items()}
        # SummaryWriter.add_hparams would open a second run for them.
        for summary in tensorboardX.summary.hparams(flat, metrics):
            self._events.add(summary)


def profiled(spans: Iterable[range], batches: Iterable[Any], steps: int, folder: Path) -> Iterator[tuple[range, Any]]:
    """Yield each span of steps with its batch; profile `steps` steps or a few more, for TensorBoard and Perfetto.

    The profile begins after `COMPILING_SPANS` and ends with a span.
    """
    first = None
    with contextlib.ExitStack() as recording:
        for number, (span, batch) in enumerate(zip(spans, batches, strict=True)):
            if number == COMPILING_SPANS and steps:
                first = span.start
                recording.enter_context(jax.profiler.trace(folder, create_perfetto_trace=True))
            if first is not None and span.start >= first + steps:
                recording.close()
            yield span, batch


class Timer:
    """The timing of a run, kept in its `Progress`."""

    def __init__(self, progress: Progress):
        self._progress, self._before, self._start = progress, progress.seconds, time.monotonic()
        self._mark: float | None = None  # up to when training time is booked; None while a program is compiled
        self._lengths: set[int] = set()  # steps of the programs that are compiled
        self._lap = (progress.images, progress.training_seconds, progress.waiting_seconds)
        self._warned = False

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the same batches, and count the time until each is ready as waiting time.

        On an asynchronous device this is the host's waiting, during which the device may still be busy.
        """
        while True:
            start = time.monotonic()
            with jax.profiler.TraceAnnotation("wait for images"):
                batch = next(batches, None)
            if batch is None:
                return
            if self._mark is not None:
                self._progress.waiting_seconds += time.monotonic() - start
            yield batch

    def begin(self, steps: int, state: Any) -> None:
        """Call it before steps are dispatched together; the first dispatch of each length compiles and is not timed."""
        if steps in self._lengths:
            return
        self._lengths.add(steps)
        if self._mark is not None:
            jax.block_until_ready(state)
            self._progress.training_seconds += time.monotonic() - self._mark
            self._mark = None

    def count(self, images: int, state: Any) -> None:
        """Count steps that are finished or, on an asynchronous device, dispatched."""
        if self._mark is None:
            jax.block_until_ready(state)
            self._mark = time.monotonic()
        else:
            self._progress.images += images

    @contextlib.contextmanager
    def paused(self, state: Any) -> Iterator[None]:
        """Exclude a block from the training time, after waiting for the steps that were dispatched."""
        jax.block_until_ready(state)
        now = time.monotonic()
        self._progress.seconds = self._before + now - self._start
        if self._mark is not None:
            self._progress.training_seconds += now - self._mark
        yield
        self._mark = time.monotonic()

    def lap(self) -> dict[str, float]:
        """Return speed and waiting fraction since the last lap, or nothing if only compiling steps were done."""
        now = (self._progress.images, self._progress.training_seconds, self._progress.waiting_seconds)
        images, seconds, waited = (new - old for new, old in zip(now, self._lap, strict=True))
        self._lap = now
        return {"images_per_second": images / seconds, "data/wait_fraction": waited / seconds} if images else {}

    def totals(self) -> dict[str, float]:
        """Return speed, waiting fraction and seconds of the whole run."""
        training_seconds = max(self._progress.training_seconds, 1e-9)
        return {
            "data/wait_fraction": self._progress.waiting_seconds / training_seconds,
            "images_per_second": self._progress.images / training_seconds,
            "seconds": self._progress.seconds,
        }

    def warning(self, config: ConfigDict) -> str | None:
        """Return what to change in the `data` section, the first time that the run has waited too long for images."""
        fraction = self.totals()["data/wait_fraction"]
        if self._warned or fraction <= TOLERABLE_WAIT:
            return None
        self._warned = True
        return (
            f"waits for images {fraction:.0%} of the time: raise --config.data.threads, now {config.threads}, up to "
            f"the {os.cpu_count()} cores; if images are not stored at their final size, prepare them: "
            f"alexnet-jax prepare {config.name} --size={config.image_size}"
        )
