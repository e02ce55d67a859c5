"""One run, from a config to a result: setup, state, training step, and the loop."""

import contextlib
import dataclasses
import functools
import math
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from ml_collections import ConfigDict, FrozenConfigDict

from alexnet_jax import figures, model, optim
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.config import SECTIONS, as_json, validate
from alexnet_jax.data import augment, datasets, statistics
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.data.loader import train_batches
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.evaluate import Outcomes, evaluate, make_predictor, per_example_metrics
from alexnet_jax.metrics import MetricWriter, Progress, Timer, profiled
from alexnet_jax.parallel import DATA, TOWER, Executor, global_positions, make_executor
from alexnet_jax.run_dir import RunDir, atomic_write, environment, write_json


class State(flax.struct.PyTreeNode):
    """State of training. Outside the step every array has a leading tower axis."""

    params: Any  # by layer and name
    batch_stats: Any  # running averages of batch normalisation; empty without it
    opt_state: Any
    sums: dict[str, Any]  # loss, errors and number of the images since metrics were last logged

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters and running averages, as the network takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Setup of a run: config, dataset and executor, checked to fit each other."""

    config: ConfigDict
    dataset: Dataset
    executor: Executor

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many images are seen as the training set has; need not be whole."""
        return len(self.dataset.train) / self.config.train.batch_size

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return max(1, round(self.config.train.epochs * self.steps_per_epoch))

    @property
    def evaluated(self) -> dict[str, datasets.Source]:
        """The images that are evaluated, by the prefix of their metrics."""
        train_images = datasets.subsample(self.dataset.train, self.config.eval.train_images)
        validation = {"validation": self.dataset.validation} if self.dataset.validation else {}
        return {"eval": self.dataset.evaluation, "train_eval": train_images, **validation}


def open_run(config: ConfigDict) -> Setup:
    """Open what a run needs, before anything expensive; raise ValueError if config, data and devices do not fit."""
    validate(config)
    dataset = datasets.load(config.data)
    if config.train.batch_size > len(dataset.train):
        raise ValueError(
            f"train.batch_size={config.train.batch_size}: must be at most the {len(dataset.train)} "
            f"training images of {config.data.name}"
        )
    for field in ("mean", "std"):
        if len(config.data[field]) not in (1, dataset.channels):
            raise ValueError(
                f"data.{field}={config.data[field]}: must be one number, or one for each of the {dataset.channels} "
                f"channels of {config.data.name}"
            )
    if config.data.augment.colour.noise and dataset.channels != 3:
        raise ValueError(
            f"data.augment.colour.noise={config.data.augment.colour.noise}: must be 0 for grey images; "
            f"{config.data.name} has {dataset.channels} channel(s)"
        )
    model.shapes(config.model, dataset.classes, (config.data.crop, config.data.crop, dataset.channels))
    return Setup(config, dataset, make_executor(config.train.executor, config.model.towers, config.train.batch_size))


def init_state(setup: Setup) -> State:
    """Return the state before the first step, a function of the config's seed, on the host."""
    config, dataset = setup.config, setup.dataset
    shape = (config.data.crop, config.data.crop, dataset.channels)
    return new_state(config, model.init(config.model, dataset.classes, shape, config.seed))


def new_state(config: ConfigDict, variables: dict[str, Any]) -> State:
    """Return the state of a network before the first step, on the host; `Executor.place` puts it on the devices."""
    optimizer = optim.make_optimizer(config.optim, config.model.layers, steps_per_epoch=1.0, steps=1)
    shapes = jax.eval_shape(jax.vmap(optimizer.init), variables["params"])
    # All optimisers start from zeros, which nothing has to be compiled for.
    opt_state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return State(variables["params"], variables.get("batch_stats", {}), opt_state, _no_sums(config.model.towers))


def _no_sums(towers: int) -> dict[str, np.ndarray]:
    """Return `State.sums` of no images."""
    return {name: np.zeros(towers, np.float32) for name in ("loss", "top1_error", "top5_error", "images")}


def make_train_step(setup: Setup) -> Callable[..., State]:
    """Return the compiled training step `(state, batch, statistics, seed, step, plateau_decays) -> state`.

    Runs whose configs differ only in their seed share one program. The step donates its state. Crops, flips, colour
    noise and dropout are functions of (seed, step), where the first step is 1; learning rates of (step,
    plateau_decays), the number of decays on plateau so far.
    """
    config = FrozenConfigDict({section: setup.config[section] for section in SECTIONS})
    return _train_step(config, setup.dataset.classes, setup.steps_per_epoch, setup.steps, setup.executor)


@functools.lru_cache(maxsize=32)
def _train_step(
    config: FrozenConfigDict, classes: int, steps_per_epoch: float, steps: int, executor: Executor
) -> Callable[..., State]:
    network = model.AlexNet(config.model, classes)
    optimizer = optim.make_optimizer(config.optim, config.model.layers, steps_per_epoch, steps)
    noise_until = config.data.augment.code2012.noise_until_epoch

    def tower_step(
        state: State, batch: dict[str, Array], statistics: Statistics, seed: Array, step: Array, plateau_decays: Array
    ) -> State:
        views_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        noise_on = noise_until is None or step - 1 < round(noise_until * steps_per_epoch)
        positions = global_positions(len(batch["label"]))
        images = augment.random_inputs(batch["image"], positions, config.data, statistics, views_key, noise_on)
        rngs = {"dropout": jax.random.fold_in(dropout_key, lax.axis_index(TOWER))}
        batch_size = len(batch["label"]) * lax.axis_size(DATA)

        def tower_loss(params: Any) -> tuple[Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = network.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
            metrics = per_example_metrics(logits, batch["label"], config.train.label_smoothing)
            # Gradients are summed over towers, and each tower has computed the whole loss.
            return metrics["loss"].sum() / batch_size / lax.axis_size(TOWER), (metrics, updated)

        gradients, (metrics, updated) = jax.grad(tower_loss, has_aux=True)(state.params)
        totals = {name: values.sum() for name, values in metrics.items()}
        totals["images"] = jnp.float32(len(batch["label"]))
        gradients, totals = lax.psum((gradients, totals), DATA)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, plateau_decays=plateau_decays)
        return State(
            params=optax.apply_updates(state.params, updates),
            batch_stats=updated.get("batch_stats", {}),
            opt_state=opt_state,
            sums={name: state.sums[name] + total for name, total in totals.items()},
        )

    return executor.map(tower_step, in_axes=(TOWER, DATA, None, None, None, None), out_axes=TOWER, donate_argnums=(0,))


def make_evaluator(setup: Setup) -> Callable[[State, Statistics], dict[str, Outcomes]]:
    """Return the function that evaluates a state on every part of `Setup.evaluated`; its program is shared, too."""
    predictor = make_predictor(setup.config, setup.dataset.classes, setup.executor)

    def evaluate_all(state: State, statistics: Statistics) -> dict[str, Outcomes]:
        predict = functools.partial(predictor, state.variables, statistics)
        return {part: evaluate([predict], images, setup.config) for part, images in setup.evaluated.items()}

    return evaluate_all


def train_and_evaluate(config: ConfigDict, workdir: Path | str, labels: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train a network, or resume training it, and evaluate it.

    Args:
      config: of one run (`config.run_config`).
      workdir: the run's folder. An interrupted run of the same config in it is resumed.
      labels: names of the run in TensorBoard's hparams tab, such as its arm and seed.

    Returns:
      The contents of result.json: the last metrics (errors are fractions of 1), steps, parameters, seconds.

    Raises:
      ValueError: the config cannot run, or the folder holds a run of another config.
      FloatingPointError: the loss is not finite.
      KeyboardInterrupt: SIGINT or SIGTERM asked to stop; a checkpoint was saved first.
    """
    run = RunDir(workdir)
    run.check(as_json(config))
    if run.result is not None:
        return run.result
    setup = open_run(config)
    stats = setup.executor.replicate(_start(run, setup))
    executor, steps, epoch = setup.executor, setup.steps, setup.steps_per_epoch
    train_step, evaluate_all = make_train_step(setup), make_evaluator(setup)
    with Checkpoints(run.checkpoints, config.train.keep_checkpoints) as checkpoints, _stop_requested() as stop:
        state, progress = executor.place(init_state(setup)), Progress()
        if restored := checkpoints.restore(state):
            state, progress = restored[0], Progress.from_json(restored[1])
        with MetricWriter(run, start=progress.step, stop=steps, expected=progress.metrics) as writer:
            _log_start(writer, setup, progress.step)
            for damaged in checkpoints.damaged:
                writer.log(damaged)
            timer = Timer(progress)
            batches = train_batches(setup.dataset.train, config, seed=config.seed, start=progress.step, stop=steps)
            batches = profiled(timer.waiting(batches), config.train.profile, run.path)
            for step, batch in enumerate(batches, progress.step + 1):
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    decays = np.int32(progress.plateau.decays)
                    state = train_step(state, batch, stats, np.uint32(config.seed), np.int32(step), decays)
                timer.count(config.train.batch_size, state)
                progress.step = step
                writer.progress(step)
                last = step == steps
                if last or step % config.train.log_every == 0:
                    with timer.paused(state):
                        learning_rate = optim.learning_rate(config.optim, epoch, steps, step - 1, decays)
                        means = _mean_metrics(state, step) | {"learning_rate": float(learning_rate)}
                        progress.metrics |= writer.write(step, {"epoch": step / epoch, **means, **timer.lap()})
                        if warning := timer.warning(config.data):
                            writer.log(warning)
                        state = state.replace(sums=executor.place(_no_sums(config.model.towers)))
                if last or _crosses_multiple(step, epoch * config.eval.every_epochs):
                    with timer.paused(state):
                        outcomes = evaluate_all(state, stats)
                        filters = jax.device_get(state.params[config.model.order[0]]["kernel"])
                        scores = {f"{part}/{k}": v for part, each in outcomes.items() for k, v in each.means().items()}
                        scores |= figures.colour_metrics(filters)
                        progress.metrics |= writer.write(step, {"epoch": step / epoch, **scores})
                        if "validation" in outcomes:
                            error = scores["validation/top1_error"]
                            progress.plateau = progress.plateau.after(error, config.optim.plateau)
                        writer.image(step, f"{config.model.order[0]}/filters", figures.filter_grid, filters)
                        if last:
                            _write_artifacts(run, writer, setup, outcomes["eval"], filters)
                if last or step % config.train.checkpoint_every == 0 or stop.is_set():
                    with timer.paused(state):
                        _mean_metrics(state, step)  # a network that has diverged is not saved
                        writer.flush()
                        checkpoints.save(step, state, dataclasses.asdict(progress))
                if stop.is_set() and not last:
                    raise KeyboardInterrupt(f"{run.path}: stopped at step {step} of {steps}; a checkpoint is saved")
            result = {
                "steps": steps,
                "epochs": steps / epoch,
                "parameters": model.count_parameters(state.params),
                **{name: value for name, value in progress.metrics.items() if "/" in name},
                **timer.totals(),
            }
            writer.hparams(labels or {"seed": config.seed}, {k: v for k, v in result.items() if k.startswith("eval/")})
    write_json(run.result_file, result)
    return result


def _start(run: RunDir, setup: Setup) -> Statistics:
    """Write the files that describe a run, and return its dataset statistics."""
    config, dataset = setup.config, setup.dataset
    devices = [str(device) for device in setup.executor.devices]
    metadata = {
        "name": config.data.name,
        "classes": dataset.classes,
        "class_names": list(dataset.class_names),
        "train_images": len(dataset.train),
        "validation_images": len(dataset.validation or ()),
        "eval_split": config.data.eval_split,
        "eval_images": len(dataset.evaluation),
    }
    write_json(run.config_file, as_json(config))
    write_json(run.dataset_file, metadata)
    stats = statistics.load_or_measure(run.statistics_file, dataset, config.data)
    write_json(run.environment_file, environment() | {"executor": setup.executor.name, "devices": devices})
    return stats


def _log_start(writer: MetricWriter, setup: Setup, step: int) -> None:
    """Log where a run starts and which images it trains and evaluates on."""
    config, dataset, executor = setup.config, setup.dataset, setup.executor
    devices = ", ".join(map(str, executor.devices))
    writer.log(f"{executor.name} on {devices}: from step {step} to {setup.steps}")
    validation = f", validation/ on {len(dataset.validation):,} held-out training images" if dataset.validation else ""
    writer.log(
        f"trains on {len(dataset.train):,} images of {config.data.name}; eval/ is on the {len(dataset.evaluation):,} "
        f"of {config.data.eval_split}{validation}"
    )


def _write_artifacts(run: RunDir, writer: MetricWriter, setup: Setup, outcomes: Outcomes, filters: np.ndarray) -> None:
    """Write what the report shows of a trained network: its filters, errors by class, and most confident errors."""
    dataset = setup.dataset
    size = setup.config.data.image_size
    writer.image(setup.steps, "eval/most_confident_errors", figures.confident_errors, outcomes, dataset, size)
    with atomic_write(run.filters_file) as temporary, temporary.open("wb") as file:
        np.save(file, filters)
    images = np.bincount(outcomes.labels, minlength=dataset.classes)
    wrong = np.bincount(outcomes.labels, weights=outcomes.metrics["top1_error"], minlength=dataset.classes)
    by_class = [float(error) if n else None for error, n in zip(wrong / np.maximum(images, 1), images, strict=True)]
    write_json(run.by_class_file, {"class": list(dataset.class_names), "top1_error": by_class})


def _mean_metrics(state: State, step: int) -> dict[str, float]:
    """Return mean training loss and errors since they were last logged; raise FloatingPointError if not finite."""
    totals = {name: float(total[0]) for name, total in jax.device_get(state.sums).items()}
    images = totals.pop("images")
    if not math.isfinite(totals["loss"]):
        raise FloatingPointError(
            f"train/loss is {totals['loss']} by step {step}: training has diverged; lower --config.optim.learning_rate"
        )
    return {f"train/{name}": total / images for name, total in totals.items()} if images else {}


def _crosses_multiple(step: int, period: float) -> bool:
    """Return whether a multiple of the period lies in (step - 1, step]."""
    return step // period > (step - 1) // period


@contextlib.contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set; a second signal acts as it would without this."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield requested
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A signal that is ignored, as SIGINT is in a shell's background job, stays ignored.
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def request(number: int, frame: object) -> None:
        requested.set()
        signal.signal(number, handlers[signal.Signals(number)])

    for number in handlers:
        signal.signal(number, request)
    try:
        yield requested
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
