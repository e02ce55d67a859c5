"""How far a run is, and how fast."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
from ml_collections import ConfigDict

from alexnet_jax import optim
from alexnet_jax.batches import Batch

TOLERABLE_WAIT = 0.1  # of the training time
COMPILING = 2  # first steps of a run, which are not like the others


@dataclasses.dataclass
class Progress:
    """What a run needs to go on, besides its state.

    Attributes:
      step: steps done.
      metrics: the last of each.
      stall: whether the validation error still falls.
      images: trained on while the clock ran, in ``training_seconds``.
      training_seconds: without compilation, evaluation and checkpoints.
      waiting_seconds: those of them in which there was no batch to train on.
      seconds: all together.
    """

    step: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    stall: optim.Stall = dataclasses.field(default_factory=optim.Stall)
    images: int = 0
    training_seconds: float = 0.0
    waiting_seconds: float = 0.0
    seconds: float = 0.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What ``dataclasses.asdict`` made of one."""
        return cls(**values | {"stall": optim.Stall(**values["stall"])})


def traced(batches: Iterator[Batch], steps: int, folder: Path) -> Iterator[Batch]:
    """The same batches; what is done with some of them is recorded for TensorBoard and Perfetto.

    Args:
      steps: how many, after those that compile; 0 for none.
      folder: for ``plugins/profile/``; what is there stays.
    """
    with contextlib.ExitStack() as recording:
        for number, batch in enumerate(batches):
            if number == COMPILING and steps:
                recording.enter_context(jax.profiler.trace(folder, create_perfetto_trace=True))
            if number == COMPILING + steps:
                recording.close()
            yield batch


class Clock:
    """Keeps the times of a ``Progress``."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._before = progress.seconds
        self._began = time.monotonic()
        self._mark: float | None = None  # since when training has been going on; None until it is compiled
        self._lap = (progress.images, progress.training_seconds, progress.waiting_seconds)
        self._complained = False

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each is there counts as waiting, unless the clock is not running yet.

        On an asynchronous device that is the host's waiting, during which the device may still be busy.
        """
        while True:
            began = time.monotonic()
            with jax.profiler.TraceAnnotation("wait for images"):
                batch = next(batches, None)
            if batch is None:
                return
            if self._mark is not None:
                self._progress.waiting_seconds += time.monotonic() - began
            yield batch

    def count(self, images: int, state: Any) -> None:
        """One more step is done, or, on an asynchronous device, dispatched."""
        if self._mark is None:
            jax.block_until_ready(state)
            self._mark = time.monotonic()
        else:
            self._progress.images += images

    def _settle(self) -> None:
        """Books the time up to now."""
        now = time.monotonic()
        self._progress.seconds = self._before + now - self._began
        if self._mark is not None:
            self._progress.training_seconds += now - self._mark
            self._mark = now

    def lap(self) -> dict[str, float]:
        """Speed and share of waiting since the last lap, where there was a step in it that did not compile."""
        now = (self._progress.images, self._progress.training_seconds, self._progress.waiting_seconds)
        images, seconds, waited = (new - old for new, old in zip(now, self._lap, strict=True))
        self._lap = now
        return {"images_per_second": images / seconds, "data/wait_fraction": waited / seconds} if images else {}

    def wait_fraction(self) -> float:
        """Share of the training time of the whole run in which there was no batch to train on."""
        return self._progress.waiting_seconds / max(self._progress.training_seconds, 1e-9)

    def complaint(self, config: ConfigDict) -> str | None:
        """What to change, the first time that the run has waited too long.

        Args:
          config: the ``data`` section of a config.
        """
        if self._complained or self.wait_fraction() <= TOLERABLE_WAIT:
            return None
        self._complained = True
        return (
            f"waits for images {self.wait_fraction():.0%} of the time: raise --config.data.threads, now "
            f"{config.threads}, up to the {os.cpu_count()} cores; and where images are not stored at their size, "
            f"prepare them: python -m alexnet_jax.prepare {config.name} --size={config.image_size}"
        )

    @contextlib.contextmanager
    def paused(self, state: Any) -> Iterator[None]:
        """For what is not training, once what was dispatched is done."""
        jax.block_until_ready(state)
        self._settle()
        yield
        self._mark = time.monotonic()
