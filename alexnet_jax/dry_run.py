"""What a study would run, how large it is and how long it takes, before it runs."""

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from alexnet_jax import batches, pixels, records, study, summary, train
from alexnet_jax.data import DataSet

TIMED_STEPS = 3


def print_plan(config: ConfigDict, workdir: Path, only: Sequence[str] = ()) -> None:
    """Prints every run with its state, its parameters and steps, and how long it is likely to take.

    Args:
      config: of a file in ``configs/``.
      workdir: the study's folder; nothing is written there.
      only: arms; none of them means all.

    Raises:
      ValueError: some run cannot run as configured.
    """
    runs = study.candidates(config, workdir, only) + study.plan(config, workdir, only)
    table = Table(title=f"{len(runs)} runs in {workdir}", title_justify="left")
    for column in ("run", "state", "parameters", "multiply-adds", "steps", "time"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right")
    # Images are trained on and evaluated in proportion to the multiply-adds: one arm is timed for all.
    seconds_per_multiply_add = 0.0
    total = 0.0
    for run in runs:
        dataset, _ = train.prepare(run.config)
        size = summary.sizes(run.config, dataset.classes, dataset.channels)
        steps = train.count_steps(run.config, dataset)
        status = records.status(run.workdir)
        seconds = 0.0
        if status != "finished":
            images = _images(run.config, dataset, steps)
            if not seconds_per_multiply_add:
                seconds_per_multiply_add = _seconds_per_image(run.config) / size["multiply_adds"]
            seconds = images * size["multiply_adds"] * seconds_per_multiply_add
        total += seconds
        printed = (f"{size['parameters']:,}", f"{size['multiply_adds']:,}", f"{steps:,}", _readable(seconds))
        table.add_row(run.name, status, *printed)
    table.add_section()
    table.add_row("all", "", "", "", "", _readable(total))
    Console(width=max(Console().width, 100)).print(table)
    print(
        f"Times are estimates for this machine, from {TIMED_STEPS} steps of the first run that is not finished and the "
        "multiply-adds of the others; what an unfinished run has done already is not taken off."
    )


def _images(config: ConfigDict, dataset: DataSet, steps: int) -> float:
    """How many images a run trains on, and evaluates: each view of these a third of the work, having no gradient."""
    sources = [dataset.evaluation, dataset.validation or ()]
    evaluated = sum(map(len, sources)) + min(config.eval.train_images, len(dataset.train))
    times = max(1.0, config.train.epochs / config.eval.every_epochs)
    return steps * config.train.batch_size + evaluated * times * config.eval.views / 3


def _seconds_per_image(config: ConfigDict) -> float:
    """Of training, by doing some steps; the mean image is not measured for it."""
    dataset, executor = train.prepare(config)
    size = config.data.image_size
    zeros = pixels.Pixels(
        np.zeros((size, size, dataset.channels), np.float32),
        np.zeros(dataset.channels, np.float32),
        np.eye(dataset.channels, dtype=np.float32),
    )
    step = train.train_step(config, dataset, zeros, executor)
    state = executor.place(train.init_state(config, dataset))
    began = 0.0
    for number, batch in enumerate(batches.train_batches(dataset.train, config, seed=0, start=0, stop=TIMED_STEPS + 1)):
        state = jax.block_until_ready(step(state, batch, np.uint32(0), np.int32(number + 1), np.int32(0)))
        began = began or time.monotonic()  # the first step compiles
    return (time.monotonic() - began) / TIMED_STEPS / config.train.batch_size


def _readable(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds else ""
