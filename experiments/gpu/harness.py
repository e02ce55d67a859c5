"""Timing, child processes and compiled training steps for the measurements of pieces.py."""

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import cost
import jax
import jax.numpy as jnp
import numpy as np
from measure import MACHINE, Results
from ml_collections import ConfigDict

from alexnet_jax import optim, parallel, train
from alexnet_jax.tools import summary

PRECISIONS = ("float32", "tensorfloat32", "bfloat16")  # the last: `model.dtype`; the others: `train.matmul_precision`
SMALL = ("small", "cifar", "embedded")  # networks of CIFAR-10's size, whose training images fit on the card
_SETUPS = itertools.count(1)


class Context:
    """Options that all pieces share: the output, the sizes and the command line."""

    def __init__(self, options: argparse.Namespace):
        self.tiny, self.data_dir, self.on_cpu = options.tiny, options.data_dir, options.card == "cpu"
        self.output = Path(options.output)
        self.results = Results(self.output, [getattr(options, field) for field in MACHINE], options.piece)
        self.repetitions = 2 if self.tiny else 7
        self.seconds = 0.0 if self.tiny else 0.3  # of one repetition
        self._arguments = sys.argv[1 : len(sys.argv) - 1 - len(options.arguments)]

    def command(self, *piece: object) -> list[str]:
        """Return the command that starts pieces.py again for another piece."""
        return [sys.executable, str(Path(__file__).with_name("pieces.py")), *self._arguments, *map(str, piece)]

    @contextlib.contextmanager
    def attempt(self, what: str, **labels: Any) -> Iterator[None]:
        """Record the error of a measurement instead of raising it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.results.failed(what, error, **labels)

    def check_backend(self) -> None:
        """Raise RuntimeError if JAX does not use the card."""
        if (jax.default_backend() == "cpu") != self.on_cpu:
            raise RuntimeError(f"JAX runs on {jax.default_backend()} ({jax.devices()}), which is not the card")


class Steps:
    """A function that is called again and again, compiled and ready to be timed.

    Args:
      call: Dispatches the work of one call; its result, if any, is what `wait` is given.
      wait: Waits for the result of a call, and of all calls before.
      per_call: Steps of one call.
      seconds: How long a repetition should take.
    """

    def __init__(self, call: Callable[[], Any], wait: Callable[[Any], Any], per_call: int = 1, seconds: float = 0.3):
        self._call, self._wait, self.per_call, self.calls = call, wait, per_call, 1
        began = time.perf_counter()
        wait(call())
        self.first = time.perf_counter() - began  # with compilation
        for _ in range(2 if seconds else 0):
            wait(call())
        self.calls = max(1, min(1000, round(seconds / max(self.seconds() * per_call, 1e-6))))

    def seconds(self, at_least: float = 0.0) -> float:
        """Return the mean seconds of a step in one repetition, or in as many as take a given time."""
        began, calls, passed = time.perf_counter(), 0, 0.0
        while not calls or passed < at_least:
            for _ in range(self.calls):
                result = self._call()
            self._wait(result)
            calls, passed = calls + self.calls, time.perf_counter() - began
        return passed / calls / self.per_call


def milliseconds(context: Context, function: Callable[..., Any], *arguments: Any) -> list[float]:
    """Return the milliseconds of a call of a JAX function, one value for each repetition."""
    steps = Steps(lambda: function(*arguments), jax.block_until_ready, seconds=context.seconds / 5)
    return [1000 * steps.seconds() for _ in range(context.repetitions)]


class Child:
    """pieces.py as another process, which answers each line with a line of JSON."""

    def __init__(self, context: Context, *piece: object, **environment: str):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(context.command(*piece), env=os.environ | environment, **pipes)

    def send(self, line: str) -> None:
        """Send a line."""
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the answer to the oldest unanswered line; raise RuntimeError if it is an error."""
        line = self._process.stdout.readline()
        while line and not line.startswith("{"):  # a library prints something while it is imported
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"process ended with exit status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and return the answer."""
        self.send(line)
        return self.receive()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def serve(build: Callable[[str], tuple[Steps, dict[str, Any]]]) -> None:
    """Answer "build KEY" with what `build` tells, and "run KEY" or "run KEY SECONDS" with the seconds of a step."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to standard output, too
    built: dict[str, Steps] = {}
    for line in sys.stdin:
        verb, key, *at_least = line.split()
        try:
            answer = {}
            if verb == "build":
                built[key], answer = build(key)
            else:
                answer["seconds"] = built[key].seconds(*map(float, at_least))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")


def configure(context: Context, network: str, batch: int, precision: str) -> ConfigDict:
    """Return the config of a run on one device; the large networks have an eighth of their features if tiny."""
    scaled = f"{network}*0.125" if context.tiny and network not in SMALL else network
    config = baselines.load_config(scaled, 4 if context.tiny else batch)
    config.train.executor = "vmap"
    config.model.dtype = "bfloat16" if precision == "bfloat16" else "float32"
    if "matmul_precision" in config.train:
        config.train.matmul_precision = "tensorfloat32" if precision == "bfloat16" else precision
    return config


def at_precision(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """Return a function whose products of float32 have a precision, wherever it is traced: "default" or `PRECISIONS`.

    A context around the calls would have to be the same for all of them: otherwise `jit` compiles again.
    """

    def precise(*arguments: Any) -> Any:
        if precision == "default":
            return function(*arguments)
        with jax.default_matmul_precision("float32" if precision == "float32" else "tensorfloat32"):
            return function(*arguments)

    return precise


def random_examples(config: ConfigDict, classes: int, count: int) -> dict[str, np.ndarray]:
    """Return random images and labels."""
    generator, size = np.random.default_rng(0), config.data.image_size
    images = generator.integers(0, 256, (count, size, size, 3), np.uint8)
    return {"image": images, "label": generator.integers(0, classes, count).astype(np.int32)}


def our_setup(config: ConfigDict, network: str) -> tuple[train.Setup, Any]:
    """Return the setup of a run on a dataset of random images, and its statistics on the device.

    No two setups share a compiled step, as those of equal configs would: what is traced may differ.
    """
    config = config.copy_and_resolve_references()
    config.train.keep_checkpoints = next(_SETUPS)
    dataset, statistics = baselines.placeholder_dataset(config, network)
    executor = parallel.make_executor("vmap", config.model.towers, config.train.batch_size)
    return train.Setup(config, dataset, executor), executor.replicate(statistics)


def our_step(context: Context, config: ConfigDict, network: str, *, per_dispatch: int = 0) -> Steps:
    """Return our training step: one batch that stays on the device, or several batches a dispatch of resident images.

    It is traced at once, so that contexts that change what is traced matter only during this call.
    """
    setup, statistics = our_setup(config, network)
    state, number = setup.executor.place(train.init_state(setup)), 1
    count = config.train.batch_size
    if per_dispatch:
        count = 200 if context.tiny else 50_000
    examples = setup.executor.replicate(random_examples(config, setup.dataset.classes, count))
    if per_dispatch:
        shape = (config.train.batch_size, per_dispatch)
        positions = np.random.default_rng(0).integers(0, count, shape).astype(np.int32)
        batch = setup.executor.replicate({"position": positions, "label": positions % setup.dataset.classes})
        step = partial(train.make_resident_steps(setup), examples["image"])
    else:
        batch, step = examples, train.make_train_step(setup)

    peak = optim.peak_learning_rate(config.optim)

    def call() -> Any:
        nonlocal state, number
        state = step(state, batch, statistics, np.uint32(0), np.int32(number), peak)
        number += per_dispatch or 1
        return state

    return Steps(call, jax.block_until_ready, per_dispatch or 1, context.seconds)


def flop_per_image(config: ConfigDict, network: str) -> float:
    """Return the FLOPs of a training step for one image, 2 for a multiply-add."""
    rows = summary.rows(config.model, baselines.count_classes(network), (config.data.crop, config.data.crop, 3))
    return cost.total(cost.step(rows, config, 3, 1)).flops / config.train.batch_size


def matmul(context: Context, precision: str) -> tuple[Steps, float]:
    """Return a product of two large square matrices of random numbers, and its FLOPs."""
    side = 256 if context.tiny else 8192
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    left, right = (jax.random.normal(key, (side, side), dtype) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(at_precision(jnp.matmul, precision))
    steps = Steps(lambda: product(left, right), jax.block_until_ready, seconds=context.seconds)
    return steps, 2.0 * side**3


def interleaved(context: Context, timed: dict[Any, Callable[[], float]]) -> dict[Any, list[float]]:
    """Return the seconds of each repetition of each baseline; one that fails is left out and recorded as failed."""
    seconds: dict[Any, list[float]] = {key: [] for key in timed}
    for repetition in range(context.repetitions):
        for key in random.Random(repetition).sample(list(seconds), len(seconds)):
            with context.attempt(f"run {key}"):
                seconds[key].append(timed[key]())
                continue
            del seconds[key]
    return seconds


def report_steps(
    context: Context, seconds: dict[str, list[float]], config: ConfigDict, reference: str, **labels: Any
) -> None:
    """Record milliseconds and images per second of each baseline, and its time over that of the reference."""
    for name, values in seconds.items():
        context.results.samples(f"step: {name}", [1000 * value for value in values], "ms", **labels)
        rates = [config.train.batch_size / value for value in values]
        context.results.samples(f"step: {name}", rates, "images/s", **labels)
        if name != reference and reference in seconds:
            ratios = [value / other for value, other in zip(values, seconds[reference], strict=True)]
            context.results.samples(f"time over that of {reference}: {name}", ratios, "ratio", **labels)
