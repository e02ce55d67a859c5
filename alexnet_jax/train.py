"""One run, from a config to a result: ``train_and_evaluate``."""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from ml_collections import ConfigDict

from alexnet_jax import augment, batches, data, evaluate, kernels, model, optim, pixels, records
from alexnet_jax.checkpoint import Checkpoints, Weights
from alexnet_jax.config import as_json, validate
from alexnet_jax.logs import Logs
from alexnet_jax.pixels import Pixels
from alexnet_jax.progress import Clock, Progress, traced
from alexnet_jax.towers import DATA, TOWER, Executor, own_rows, row_numbers


class State(flax.struct.PyTreeNode):
    """What a step changes. Outside the mapped step every array has a leading tower axis.

    Attributes:
      params: of the net.
      opt_state: of the update rule.
      sums: loss and errors of all images since they were last logged, and how many images these were.
    """

    params: Any
    opt_state: Any
    sums: dict[str, Any]


def prepare(config: ConfigDict) -> tuple[data.DataSet, Executor]:
    """Opens what a run needs and checks that it can run, before anything expensive.

    Raises:
      ValueError: a value, the data set, the devices or the shapes do not fit; the message says what to do.
    """
    validate(config)
    dataset = data.load(config.data, validation=config.eval.validation or config.optim.stall.evaluations > 0)
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
            f"data.augment.colour.noise={config.data.augment.colour.noise}: must be 0 for images without colours, "
            f"and those of {config.data.name} have {dataset.channels} channel(s)"
        )
    model.shapes(config.model, dataset.classes, (config.data.crop, config.data.crop, dataset.channels))
    return dataset, Executor(config.train.executor, config.model.towers)


def steps_per_epoch(config: ConfigDict, dataset: data.DataSet) -> float:
    """Steps in which as many images are seen as there are to train on; need not be whole."""
    return len(dataset.train) / config.train.batch_size


def count_steps(config: ConfigDict, dataset: data.DataSet) -> int:
    """Of the whole run."""
    return max(1, round(config.train.epochs * steps_per_epoch(config, dataset)))


def init_state(config: ConfigDict, dataset: data.DataSet) -> State:
    """The state before the first step: a function of the config's seed."""
    shape = (config.data.crop, config.data.crop, dataset.channels)
    return start(config, model.init(config.model, dataset.classes, shape, config.seed))


def start(config: ConfigDict, params: Any) -> State:
    """The state of a net with these parameters before the first step, on the host: ``Executor.place`` it."""
    opt_state = jax.eval_shape(jax.vmap(optim.sgd(config.optim, config.model.layers).init), params)
    velocities = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), opt_state)
    return State(params, velocities, no_sums(config.model.towers))


def no_sums(towers: int) -> dict[str, np.ndarray]:
    """``State.sums`` when they were just logged."""
    return {name: np.zeros(towers, np.float32) for name in ("loss", "top1_error", "top5_error", "images")}


def train_step(config: ConfigDict, dataset: data.DataSet, seen: Pixels, executor: Executor) -> Callable[..., State]:
    """The compiled step ``(state, batch, seed, step, stalls) -> state``, which donates the state it is given.

    Crops, flips, colours and dropout are a function of (seed, step), where the first step is 1. Rates are one of
    (step, stalls), where stalls is how often the validation error has stalled.
    """
    net = model.AlexNet(config.model, dataset.classes)
    rule = optim.sgd(config.optim, config.model.layers)
    epoch_steps = steps_per_epoch(config, dataset)
    until = config.data.augment.colour.until_epoch

    def tower_step(
        state: State, batch: dict[str, jax.Array], seed: jax.Array, step: jax.Array, stalls: jax.Array
    ) -> State:
        views_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        colours = until is None or ~optim.reached(until, step - 1, epoch_steps)
        count, own = len(batch["image"]), jax.tree.map(own_rows, batch)
        positions = row_numbers(len(own["image"]))
        images = augment.random_inputs(own["image"], positions, config.data, seen, views_key, colours)
        rngs = {"dropout": jax.random.fold_in(dropout_key, lax.axis_index(TOWER))}
        counts = (positions < count).astype(jnp.float32)  # not what a share is filled up with

        def loss_share(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            logits: Any = net.apply({"params": params}, images, train=True, rngs=rngs)
            metrics = evaluate.per_image(logits, own["label"])
            # Each tower's gradient is that of the sum over towers, and each has computed the whole loss.
            return (counts * metrics["loss"]).sum() / count / lax.axis_size(TOWER), metrics

        gradients, metrics = jax.grad(loss_share, has_aux=True)(state.params)
        metrics["images"] = counts
        totals = {name: (counts * values).sum() for name, values in metrics.items()}
        gradients, totals = lax.psum((gradients, totals), DATA)
        rates = optim.learning_rates(config.optim, config.model.layers, step - 1, epoch_steps, stalls)
        updates, opt_state = rule.update(gradients, state.opt_state, state.params, rates=rates)
        sums = {name: state.sums[name] + total for name, total in totals.items()}
        return State(optax.apply_updates(state.params, updates), opt_state, sums)

    return executor.map(tower_step, in_axes=(0, None, None, None, None), out_axes=0, donate_argnums=(0,))


def save_start(weights: Weights, workdir: Path) -> None:
    """Makes a new folder a run that has done no step: ``train_and_evaluate`` goes on from these weights.

    Raises:
      ValueError: the folder is there already.
    """
    if workdir.exists():
        raise ValueError(f"{workdir}: is there already; name a new folder, or delete it")
    records.write_json(workdir / "config.json", as_json(weights.config))
    records.write_json(workdir / "dataset.json", {"classes": weights.classes})
    if weights.pixels is not None:
        pixels.write(workdir / pixels.FILE, weights.pixels)
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(0, start(weights.config, weights.params), dataclasses.asdict(Progress()))


def train_and_evaluate(config: ConfigDict, workdir: Path | str, labels: dict[str, Any] | None = None) -> dict[str, Any]:
    """Trains one net, or goes on with training it, and evaluates it.

    Args:
      config: of one run (``config.run_config``).
      workdir: the run's folder. Where it holds an interrupted run of the same config, that is gone on with.
      labels: what the run is called by in TensorBoard's hparams tab, such as its arm and seed.

    Returns:
      The result, as in ``result.json``: the last metrics (errors are fractions of 1), steps, parameters, seconds.

    Raises:
      ValueError: the config cannot run, or the folder holds a run of another config.
      FloatingPointError: the loss is not finite any more.
      KeyboardInterrupt: a signal asked to stop; a checkpoint was saved first.
    """
    workdir = Path(workdir)
    records.check_config(workdir, as_json(config))
    if finished := records.result(workdir):
        return finished
    dataset, executor = prepare(config)
    records.write_json(workdir / "config.json", as_json(config))
    records.write_json(workdir / "dataset.json", _about(config, dataset))
    seen = pixels.of_run(workdir, dataset, config.data)
    devices = [str(device) for device in executor.devices]
    records.write_json(workdir / "env.json", records.environment() | {"executor": executor.name, "devices": devices})

    first_layer = config.model.order[0]
    epoch = steps_per_epoch(config, dataset)
    steps = count_steps(config, dataset)
    run_step = train_step(config, dataset, seen, executor)
    predict = evaluate.predictor(config, dataset.classes, seen, executor)
    evaluated = {"eval": dataset.evaluation, "train_eval": data.evenly(dataset.train, config.eval.train_images)}
    evaluated |= {"validation": dataset.validation} if dataset.validation else {}

    with Checkpoints(workdir / "checkpoints", config.train.keep_checkpoints) as checkpoints, _stop_asked() as stop:
        state = executor.place(init_state(config, dataset))
        progress = Progress()
        if restored := checkpoints.restore(state):
            state, progress = restored[0], Progress.from_json(restored[1])
        with Logs(workdir, start=progress.step, stop=steps) as logs:
            logs.say(f"{executor.name} on {', '.join(devices)}: from step {progress.step} to {steps}")
            logs.say(
                f"trained on {len(dataset.train):,} images of {config.data.name}; eval/ is on the "
                f"{len(dataset.evaluation):,} of {config.data.eval_split}"
                + (f", validation/ on {len(dataset.validation):,} that are kept apart" if dataset.validation else "")
            )
            clock = Clock(progress)
            read = batches.train_batches(dataset.train, config, seed=config.seed, start=progress.step, stop=steps)
            read = traced(clock.waiting(read), config.train.profile, workdir)
            for step, batch in enumerate(read, progress.step + 1):
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state = run_step(
                        state, batch, np.uint32(config.seed), np.int32(step), np.int32(progress.stall.cuts)
                    )
                clock.count(config.train.batch_size, state)
                progress.step = step
                logs.progress(step)
                last = step == steps
                if last or step % config.train.log_every == 0:
                    with clock.paused(state):
                        rate = optim.learning_rate(config.optim, step - 1, epoch, progress.stall.cuts)
                        metrics = _means(state, step) | {"learning_rate": float(rate)}
                        progress.metrics |= logs.write(step, {"epoch": step / epoch, **metrics, **clock.lap()})
                        if complaint := clock.complaint(config.data):
                            logs.say(complaint)
                        state = state.replace(sums=executor.place(no_sums(config.model.towers)))
                if last or _passes(step, epoch * config.eval.every_epochs):
                    with clock.paused(state):
                        outcomes = {
                            part: evaluate.outcomes([partial(predict, state.params)], source, config)
                            for part, source in evaluated.items()
                        }
                        first_kernels = jax.device_get(state.params[first_layer]["kernel"])
                        found = {f"{part}/{k}": v for part, each in outcomes.items() for k, v in each.means().items()}
                        found |= kernels.colour_metrics(first_kernels)
                        progress.metrics |= logs.write(step, {"epoch": step / epoch, **found})
                        if "validation" in evaluated:
                            progress.stall = progress.stall.after(found["validation/top1_error"], config.optim.stall)
                        logs.image(step, f"{first_layer}/kernels", kernels.picture(first_kernels))
                    if last:
                        from alexnet_jax import panels  # what it draws with would keep the first step waiting

                        mistakes = panels.mistakes(outcomes["eval"], dataset, config.data.image_size)
                        logs.image(step, "eval/mistakes", mistakes)
                        _keep(workdir, first_kernels, outcomes["eval"], dataset)
                if last or step % config.train.checkpoint_every == 0 or stop.is_set():
                    with clock.paused(state):
                        _means(state, step)  # a net that has diverged is not saved
                        checkpoints.save(step, state, dataclasses.asdict(progress))
                if stop.is_set() and not last:
                    raise KeyboardInterrupt(f"{workdir}: stopped at step {step} of {steps}, which is saved")

            result = {
                "steps": steps,
                "epochs": steps / epoch,
                "parameters": model.count_parameters(state.params),
                **{name: value for name, value in progress.metrics.items() if "/" in name},
                "data/wait_fraction": clock.wait_fraction(),
                "images_per_second": progress.images / max(progress.training_seconds, 1e-9),
                "seconds": progress.seconds,
            }
            logs.hparams(labels or {"seed": config.seed}, {k: v for k, v in result.items() if k.startswith("eval/")})
    records.write_json(workdir / "result.json", result)
    return result


def _keep(workdir: Path, kernels: np.ndarray, outcomes: evaluate.Outcomes, dataset: data.DataSet) -> None:
    """What the report shows of a trained net: its first kernels, and its errors by class."""
    with records.whole(workdir / "kernels.npy") as unfinished, unfinished.open("wb") as file:
        np.save(file, kernels)
    images = np.bincount(outcomes.labels, minlength=dataset.classes)
    wrong = np.bincount(outcomes.labels, weights=outcomes.metrics["top1_error"], minlength=dataset.classes)
    errors = [float(error) if n else None for error, n in zip(wrong / np.maximum(images, 1), images, strict=True)]
    records.write_json(workdir / "by_class.json", {"class": list(dataset.class_names), "top1_error": errors})


def _about(config: ConfigDict, dataset: data.DataSet) -> dict[str, Any]:
    """What is to be known of a run's images where they are not."""
    return {
        "name": config.data.name,
        "classes": dataset.classes,
        "class_names": list(dataset.class_names),
        "train_images": len(dataset.train),
        "validation_images": len(dataset.validation or ()),
        "eval_split": config.data.eval_split,
        "eval_images": len(dataset.evaluation),
    }


def _means(state: State, step: int) -> dict[str, float]:
    """Mean loss and errors of training since they were last logged; nothing, if they just were.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    totals = {name: float(total[0]) for name, total in jax.device_get(state.sums).items()}
    images = totals.pop("images")
    if not math.isfinite(totals["loss"]):
        raise FloatingPointError(
            f"train/loss is {totals['loss']} by step {step}: the net has diverged; lower --config.optim.learning_rate"
        )
    return {f"train/{name}": total / images for name, total in totals.items()} if images else {}


def _passes(step: int, period: float) -> bool:
    """Whether a multiple of the period lies within this step."""
    return step // period > (step - 1) // period


@contextlib.contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; asked twice, they act as they always do."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield asked
        return
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
