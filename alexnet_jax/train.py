"""One run, from a config to a result: setup, state, training step, and the loop."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import Array, lax
from ml_collections import ConfigDict, FrozenConfigDict

from alexnet_jax import figures, model, optim, processes, stop, weights
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.config import SECTIONS, as_json, validate
from alexnet_jax.data import augment, datasets, statistics
from alexnet_jax.data.datasets import Arrays, Dataset, Resident, origin
from alexnet_jax.data.loader import keep_in_memory, resident_train_batches, train_batches
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.evaluate import Outcomes, evaluate, make_predictor, per_example_metrics
from alexnet_jax.metrics import MetricWriter, Progress, Timer, profiled
from alexnet_jax.parallel import DATA, TOWER, Executor, global_positions, instruction_set, make_executor
from alexnet_jax.run_dir import RunDir, atomic_write, environment, write_json

STEPS_PER_DISPATCH = 25  # on accelerators


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

    @functools.cached_property
    def steps_per_epoch(self) -> float:
        """Steps in which as many images are seen as the training set has; need not be whole."""
        return len(self.dataset.train) / self.config.train.batch_size

    @functools.cached_property
    def steps(self) -> int:
        """Steps of the whole run."""
        return max(1, round(self.config.train.epochs * self.steps_per_epoch))

    @property
    def images_on_devices(self) -> jax.Array | None:
        """The images that training selects from, uint8, if they are on the devices."""
        arrays = origin(self.dataset.train)
        return arrays.on_devices if isinstance(arrays, Resident) else None

    @property
    def steps_per_dispatch(self) -> int:
        """Most steps in one program: several are faster on GPUs, and slower on CPUs (`train.steps_per_dispatch`)."""
        if self.images_on_devices is None:
            return 1
        on_cpu = self.executor.platform == "cpu"
        return self.config.train.steps_per_dispatch or (1 if on_cpu else STEPS_PER_DISPATCH)

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
            f"data.augment.colour.noise={config.data.augment.colour.noise}: must be 0 for the images of "
            f"{config.data.name}, which have {dataset.channels} channel(s)"
        )
    model.shapes(config.model, dataset.classes, (config.data.crop, config.data.crop, dataset.channels))
    parts = config.model.towers if config.train.layout == "one_weird_trick" else 1  # of a shard of the batch
    executor = make_executor(config.train.executor, config.model.towers, config.train.batch_size, parts)
    setup = Setup(config, dataset, executor)
    if setup.steps >= 2**31:  # steps are counted in int32
        raise ValueError(
            f"train.epochs={config.train.epochs}: must be fewer than 2**31 steps, not {setup.steps}; train for fewer "
            "epochs, or with a larger train.batch_size"
        )
    return setup


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
    """Return the compiled training step `(state, batch, statistics, seed, step, peak) -> state`.

    Runs whose configs differ only in their seed or learning rate share one program. The step donates its state. Crops,
    flips, colour noise and dropout are functions of (seed, step), where the first step is 1; learning rates of the step
    and of `peak`, the base learning rate without its schedule (`optim.peak_learning_rate`).
    """
    return _compile_step(*_step_arguments(setup), setup.executor)


def make_resident_steps(setup: Setup) -> Callable[..., State]:
    """Return several steps as one program: `(images, state, batch, statistics, seed, step, peak) -> state`.

    It selects its batches from images on the devices (`Setup.images_on_devices`), as `loader.resident_train_batches`
    says; `step` is the first one. Otherwise it is as `make_train_step`.
    """
    return _compile_resident_steps(*_step_arguments(setup), setup.executor)


def _step_arguments(setup: Setup) -> tuple[FrozenConfigDict, int, float, int]:
    """Return all that a training step depends on but for its arguments: the arguments of `_tower_step`."""
    sections = {section: setup.config[section].to_dict() for section in SECTIONS}
    del sections["optim"]["learning_rate"]
    return FrozenConfigDict(sections), setup.dataset.classes, setup.steps_per_epoch, setup.steps


@functools.lru_cache(maxsize=32)
def _compile_step(
    config: FrozenConfigDict, classes: int, steps_per_epoch: float, steps: int, executor: Executor
) -> Callable[..., State]:
    in_axes = (TOWER, DATA, None, None, None, None)
    tower_step = _tower_step(config, classes, steps_per_epoch, steps)
    return executor.map(tower_step, in_axes=in_axes, out_axes=TOWER, donate_argnums=(0,))


@functools.lru_cache(maxsize=32)
def _compile_resident_steps(
    config: FrozenConfigDict, classes: int, steps_per_epoch: float, steps: int, executor: Executor
) -> Callable[..., State]:
    tower_step = _tower_step(config, classes, steps_per_epoch, steps)

    def tower_steps(
        images: Array,
        state: State,
        batch: dict[str, Array],
        statistics: Statistics,
        seed: Array,
        first: Array,
        peak: Array,
    ) -> State:
        def one_step(state: State, scanned: tuple[Array, Array, Array]) -> tuple[State, None]:
            step, positions, labels = scanned
            selected = {"image": images.at[positions].get(mode="clip"), "label": labels}
            return tower_step(state, selected, statistics, seed, step, peak), None

        count = batch["label"].shape[1]
        scanned = (first + jnp.arange(count), batch["position"].T, batch["label"].T)
        if count == 1:  # convolutions in a loop are slow on CPUs
            return one_step(state, jax.tree.map(lambda array: array[0], scanned))[0]
        return lax.scan(one_step, state, scanned)[0]

    in_axes = (None, TOWER, DATA, None, None, None, None)
    return executor.map(tower_steps, in_axes=in_axes, out_axes=TOWER, donate_argnums=(1,))


def _tower_step(config: FrozenConfigDict, classes: int, steps_per_epoch: float, steps: int) -> Callable[..., State]:
    """Return what one tower computes in a step; arguments and result are those of `make_train_step`."""
    network = model.AlexNet(config.model, classes)
    optimizer = optim.make_optimizer(config.optim, config.model.layers, steps_per_epoch, steps)
    noise_until = config.data.augment.code2012.noise_until_epoch

    @jax.default_matmul_precision(config.train.matmul_precision)
    def tower_step(
        state: State, batch: dict[str, Array], statistics: Statistics, seed: Array, step: Array, peak: Array
    ) -> State:
        views_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        noise_on = noise_until is None or step - 1 < round(noise_until * steps_per_epoch)
        positions = global_positions(len(batch["label"]))
        images = augment.random_inputs(batch["image"], positions, config.data, statistics, views_key, noise_on)
        batch_size = len(batch["label"]) * lax.axis_size(DATA)

        def tower_loss(params: Any) -> tuple[Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, batch_stats = model.forward(network, config.train.layout, variables, images, dropout_key)
            metrics = per_example_metrics(logits, batch["label"], config.train.label_smoothing)
            # Gradients are summed over towers, and each tower has computed the whole loss.
            return metrics["loss"].sum() / batch_size / lax.axis_size(TOWER), (metrics, batch_stats)

        gradients, (metrics, batch_stats) = jax.grad(tower_loss, has_aux=True)(state.params)
        totals = {name: values.sum() for name, values in metrics.items()}
        totals["images"] = jnp.float32(len(batch["label"]))
        gradients, totals = lax.psum((gradients, totals), DATA)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, peak=peak)
        return State(
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            sums={name: state.sums[name] + total for name, total in totals.items()},
        )

    return tower_step


def make_evaluator(setup: Setup) -> Callable[[State, Statistics], dict[str, Outcomes]]:
    """Return the function that evaluates a state on every part of `Setup.evaluated`; its program is shared, too."""
    predictor = make_predictor(setup.config, setup.dataset.classes, setup.executor)

    def evaluate_all(state: State, statistics: Statistics) -> dict[str, Outcomes]:
        predict = functools.partial(predictor, state.variables, statistics)
        evaluated = setup.evaluated.items()
        return {part: evaluate([predict], images, setup.config, setup.executor) for part, images in evaluated}

    return evaluate_all


def train_and_evaluate(config: ConfigDict, workdir: Path | str, labels: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train a network, or resume training it, and evaluate it.

    The processes of a job (`processes.py`) call it together; process 0 alone writes into the folder, but for
    checkpoints, and has the records.

    Args:
      config: of one run (`config.run_config`).
      workdir: the run's folder. An interrupted run of the same config in it is resumed.
      labels: names of the run in TensorBoard's hparams tab, such as its arm and seed.

    Returns:
      The contents of result.json: the last metrics (errors are fractions of 1), steps, parameters, seconds.

    Raises:
      ValueError: the config cannot run, or the folder holds a run of another config or on other images.
      FloatingPointError: a metric or a parameter is not finite.
      stop.Stopped: SIGINT, SIGTERM or SIGHUP asked to stop; a checkpoint was saved first.
    """
    run = RunDir(workdir)
    run.check(as_json(config))
    if run.result is not None:
        return run.result
    setup = open_run(config)
    run.check_dataset(setup.dataset.metadata(config.data))
    weights.check_initial(run, config, setup.dataset)
    in_memory = keep_in_memory(setup.dataset, config.data, setup.executor)
    setup = dataclasses.replace(setup, dataset=in_memory)
    with processes.first_alone("statistics"):
        measured = statistics.load_or_measure(run.statistics_file, setup.dataset, config.data)
    with contextlib.ExitStack() as stack:
        records = run if processes.is_first() else RunDir(stack.enter_context(tempfile.TemporaryDirectory()))
        return _train(run, records, setup, measured, labels)


def _train(
    run: RunDir, records: RunDir, setup: Setup, measured: Statistics, labels: dict[str, Any] | None
) -> dict[str, Any]:
    """Train and evaluate a network as `train_and_evaluate` does, and write what it records into a folder."""
    config = setup.config
    notes = _start(records, setup)
    stats = setup.executor.replicate(measured)
    executor, steps, steps_per_epoch = setup.executor, setup.steps, setup.steps_per_epoch
    evaluate_all = make_evaluator(setup)
    with (
        Checkpoints(run.checkpoints, config.train.keep_checkpoints) as checkpoints,
        stop.requests(processes.agreement()) as request,
    ):
        state, progress = executor.place(init_state(setup)), Progress()
        if restored := checkpoints.restore(state):
            state, progress = restored[0], Progress.from_json(restored[1])
        elif config.train.init_from:
            initial = weights.initial(config, setup.dataset)
            state, notes = executor.place(new_state(config, initial.variables)), [*notes, *initial.notes]
            write_json(records.initial_file, initial.origin)
        expected = progress.metrics if processes.is_first() else None
        with MetricWriter(records, start=progress.step, stop=steps, expected=expected) as writer:
            _log_start(run, writer, setup, progress.step)
            for note in (*notes, *checkpoints.damaged):
                writer.log(note)
            timer = Timer(progress)
            outcomes: dict[str, Outcomes] = {}
            train_steps, spans, batches = _dispatch(setup, progress.step)
            batches = timer.waiting(batches)
            for span, batch in profiled(spans, batches, config.train.profile, records.path):
                if _reached_error(config, progress):
                    break
                timer.begin(len(span), state)
                with jax.profiler.StepTraceAnnotation("train", step_num=span.stop):
                    decays = progress.plateau.decays
                    peak = optim.peak_learning_rate(config.optim, decays)
                    state = train_steps(state, batch, stats, np.uint32(config.seed), np.int32(span.start + 1), peak)
                timer.count(len(span) * config.train.batch_size, state)
                progress.step = step = span.stop
                writer.progress(step)
                due = _due(setup, step)
                if due.log:
                    with timer.paused(state):
                        learning_rate = optim.learning_rate(config.optim, steps_per_epoch, steps, step - 1, decays)
                        means = _mean_metrics(state) | {"learning_rate": float(learning_rate)}
                        _check_finite(means, step)
                        progress.metrics |= writer.write(
                            step, {"epoch": step / steps_per_epoch, **means, **timer.lap()}
                        )
                        if warning := timer.warning(config.data):
                            writer.log(warning)
                        state = state.replace(sums=executor.place(_no_sums(config.model.towers)))
                if due.evaluate:
                    with timer.paused(state):
                        outcomes = evaluate_all(state, stats)
                        filters = _first_kernel(state, config)
                        scores = {f"{part}/{k}": v for part, each in outcomes.items() for k, v in each.means().items()}
                        scores |= figures.colour_metrics(filters)
                        _check_finite(scores, step)
                        progress.metrics |= writer.write(step, {"epoch": step / steps_per_epoch, **scores})
                        if "validation" in outcomes:
                            error = scores["validation/top1_error"]
                            progress.plateau = progress.plateau.after(error, config.optim.plateau)
                        writer.image(step, f"{config.model.order[0]}/filters", figures.filter_grid, filters)
                last = step == steps or _reached_error(config, progress)
                stopping = request.is_set()  # asked once: a later signal finds no checkpoint of this step
                if last or due.save or stopping:
                    with timer.paused(state):
                        _check_finite(flatten_dict(state.variables, sep="/"), step)
                        # A checkpoint whose records are lost could not be resumed; the one before can.
                        if not processes.any_process(not writer.flush()):
                            checkpoints.save(step, state, dataclasses.asdict(progress))
                        elif last or stopping:
                            raise OSError(
                                f"{records.path}: the records of step {step} cannot be written; free the disk"
                            )
                if stopping and not last:
                    request.obey(f"{run.path}: stopped at step {step} of {steps}; a checkpoint is saved")
            outcomes = outcomes or evaluate_all(state, stats)
            _write_artifacts(records, writer, setup, progress.step, outcomes["eval"], _first_kernel(state, config))
            result = {
                "steps": progress.step,
                "epochs": progress.step / steps_per_epoch,
                "parameters": model.count_parameters(state.params),
                **{name: value for name, value in progress.metrics.items() if "/" in name},
                **timer.totals(),
            }
            writer.hparams(labels or {"seed": config.seed}, {k: v for k, v in result.items() if k.startswith("eval/")})
    write_json(records.result_file, result)
    return result


def _reached_error(config: ConfigDict, progress: Progress) -> bool:
    """Return whether the last evaluation of the training images ends the run (`train.stop_at_error`)."""
    error = config.train.stop_at_error
    return error is not None and progress.metrics.get("train_eval/top1_error", np.inf) <= error


def _dispatch(setup: Setup, start: int) -> tuple[Callable[..., State], list[range], Iterator[Any]]:
    """Return the training step, or several, the spans of 0-based steps from `start` on, and a batch for each span."""
    config, images, source = setup.config, setup.images_on_devices, setup.dataset.train
    spans, rows = list(_spans(setup, start)), setup.executor.local_rows(config.train.batch_size)
    if images is None:
        batches = train_batches(source, config, seed=config.seed, start=start, stop=setup.steps, rows=rows)
        return make_train_step(setup), spans, batches
    selections = resident_train_batches(source, config, seed=config.seed, spans=spans, rows=rows)
    return functools.partial(make_resident_steps(setup), images), spans, selections


class _Due(NamedTuple):
    """Whether to log, evaluate and save after a step."""

    log: bool
    evaluate: bool
    save: bool


def _due(setup: Setup, step: int) -> _Due:
    """Return whether to log, evaluate and save after a step, counted from 1; all of it after the last one."""
    config, last = setup.config, step == setup.steps
    evaluate = last or _crosses_multiple(step, setup.steps_per_epoch * config.eval.every_epochs)
    may_stop = evaluate and config.train.stop_at_error is not None
    return _Due(
        log=last or may_stop or step % config.train.log_every == 0,
        evaluate=evaluate,
        save=last or step % config.train.checkpoint_every == 0,
    )


def _spans(setup: Setup, start: int) -> Iterator[range]:
    """Split the 0-based steps from `start` on into spans, which are dispatched together: of the full length or of one.

    Something may be due at the end of a span only. After a checkpoint, which ends a span, the spans are those of an
    uninterrupted run: programs of other lengths may round otherwise.
    """
    length = setup.steps_per_dispatch
    while start < setup.steps:
        interrupted = any(any(_due(setup, step)) for step in range(start + 1, start + length))
        stop = start + (1 if interrupted else length)
        yield range(start, stop)
        start = stop


def _start(run: RunDir, setup: Setup) -> list[str]:
    """Write the files that describe a run, and return what to log of its environment."""
    config, dataset = setup.config, setup.dataset
    devices = [str(device) for device in setup.executor.devices]
    write_json(run.config_file, as_json(config))
    write_json(run.dataset_file, dataset.metadata(config.data))
    executed = {
        "executor": setup.executor.name,
        "processes": processes.count(),
        "layout": config.train.layout,
        "devices": devices,
        "device_kind": setup.executor.devices[0].device_kind,
        "instruction_set": instruction_set(),  # on which the rounding of first layers depends
        "matmul_precision": config.train.matmul_precision,
    }
    changed = run.record_environment(environment() | executed)
    return [f"since the interruption, {key} has changed from {old} to {new}" for key, (old, new) in changed.items()]


def _log_start(run: RunDir, writer: MetricWriter, setup: Setup, step: int) -> None:
    """Log where a run starts and which images it trains and evaluates on."""
    config, dataset, executor = setup.config, setup.dataset, setup.executor
    devices = ", ".join(map(str, executor.devices))
    writer.log(f"{executor.name} on {devices}: from step {step} to {setup.steps}")
    validation = f", validation/ on {len(dataset.validation):,} held-out training images" if dataset.validation else ""
    writer.log(
        f"trains on {len(dataset.train):,} images of {config.data.name}; eval/ is on the {len(dataset.evaluation):,} "
        f"of {config.data.eval_split}{validation}"
    )
    where = {Resident: "on the devices", Arrays: "in memory"}.get(type(origin(dataset.train)), "streamed")
    for extension in run.read_extensions():
        changes = "; ".join(f"{key} was {old}, is {new}" for key, (old, new) in extension["changes"].items())
        writer.log(f"was finished after {extension['result']['steps']} steps and extended: {changes}")
    writer.log(f"images: {where}; steps in one program: {setup.steps_per_dispatch}")


def _write_artifacts(
    run: RunDir, writer: MetricWriter, setup: Setup, step: int, outcomes: Outcomes, filters: np.ndarray
) -> None:
    """Write what the report shows of a trained network: its filters, errors by class, and most confident errors."""
    dataset = setup.dataset
    size = setup.config.data.image_size
    writer.image(step, "eval/most_confident_errors", figures.confident_errors, outcomes, dataset, size)
    with atomic_write(run.filters_file) as temporary, temporary.open("wb") as file:
        np.save(file, filters)
    images = np.bincount(outcomes.labels, minlength=dataset.classes)
    wrong = np.bincount(outcomes.labels, weights=outcomes.metrics["top1_error"], minlength=dataset.classes)
    by_class = [float(error) if n else None for error, n in zip(wrong / np.maximum(images, 1), images, strict=True)]
    write_json(run.by_class_file, {"class": list(dataset.class_names), "top1_error": by_class})


def _first_kernel(state: State, config: ConfigDict) -> np.ndarray:
    """Return the kernel of the first layer, with a leading tower axis."""
    return processes.fetch(state.params[config.model.order[0]]["kernel"])


def _mean_metrics(state: State) -> dict[str, float]:
    """Return mean training loss and errors since they were last logged."""
    totals = {name: float(processes.local_shards(total)[0][1][0]) for name, total in state.sums.items()}
    images = totals.pop("images")
    return {f"train/{name}": total / images for name, total in totals.items()} if images else {}


def _check_finite(values: Mapping[str, Any], step: int) -> None:
    """Raise FloatingPointError if a metric or an array is not finite: it is neither logged nor saved.

    Each process of a job looks at the parts of arrays that it has, and all raise it together.
    """
    parts = ((name, part) for name, value in values.items() for _, part in processes.local_shards(value))
    wrong = next(((name, part) for name, part in parts if not np.isfinite(part).all()), None)
    if processes.any_process(wrong is not None):
        name, value = wrong or ("an array of another process", np.empty(1))
        what = value if np.ndim(value) == 0 else "not finite"
        raise FloatingPointError(
            f"{name} is {what} by step {step}: training has diverged; lower --config.optim.learning_rate"
        )


def _crosses_multiple(step: int, period: float) -> bool:
    """Return whether a multiple of the period lies in (step - 1, step]."""
    return step // period > (step - 1) // period
