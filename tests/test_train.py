"""A run is a function of its config: repeated, or interrupted and resumed, it gives the same bits."""

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexnet_jax import evaluate, events, metrics, optim, parallel, stop, train
from alexnet_jax.checkpoint import Checkpoints, load_run
from alexnet_jax.config import as_json
from alexnet_jax.data import datasets, loader, prepare, sources, statistics
from alexnet_jax.data.datasets import Arrays
from alexnet_jax.data.loader import train_batches
from alexnet_jax.metrics import MetricWriter
from alexnet_jax.run_dir import RunDir, read_json
from support import FREELY_CHANGED, SHALLOW, TINY, random_statistics, run_config


@pytest.fixture(autouse=True, scope="module")
def few_held_out_images() -> Iterator[None]:
    """Evaluate 100 of the embedded images, which otherwise take most of a short run's time."""
    load = datasets.load

    def load_fewer(data_config: ConfigDict) -> datasets.Dataset:
        dataset = load(data_config)
        is_embedded = data_config.name == datasets.EMBEDDED
        fewer = datasets.subsample(dataset.evaluation, 100) if is_embedded else dataset.evaluation
        return dataclasses.replace(dataset, evaluation=fewer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", load_fewer)
        yield


STREAMED = {"data.resident_bytes": 0, "data.host_bytes": 0}
TIMES = {"images_per_second", "seconds", "data/wait_fraction"}  # which differ between equal runs


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMES}


def logged(workdir: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run."""
    return [without_times(line) for line in RunDir(workdir).metrics()]


def result(workdir: Path) -> dict[str, Any]:
    """Return the result of a finished run."""
    finished = RunDir(workdir).result
    assert finished is not None
    return without_times(finished)


def final_state(config: ConfigDict, workdir: Path) -> train.State:
    """Return the last checkpoint of a finished run."""
    setup = train.open_run(config)
    with Checkpoints(RunDir(workdir).checkpoints, keep=2) as checkpoints:
        restored = checkpoints.restore(train.init_state(setup))
    assert restored is not None
    assert restored[1]["step"] == result(workdir)["steps"]
    return jax.device_get(restored[0])


def assert_same_run(config: ConfigDict, first: Path, second: Path) -> None:
    """Assert bit-identical states, metrics and results."""
    chex.assert_trees_all_equal(final_state(config, first), final_state(config, second))
    assert logged(first) == logged(second)
    assert result(first) == result(second)


def send_at(step: int, *signals: signal.Signals) -> Callable[[MetricWriter, int], None]:
    """Return a `MetricWriter.progress` that sends signals to its own process after a step."""
    progress = MetricWriter.progress

    def progress_and_send(self: MetricWriter, finished: int) -> None:
        progress(self, finished)
        if finished == step:
            for number in signals:
                signal.raise_signal(number)

    return progress_and_send


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Yield a list that grows with each program that XLA compiles, or that the compilation cache has."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def default_handlers() -> Iterator[None]:
    """Install Python's handlers of signals: pytest ignores SIGINT where a shell runs it in the background."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run of 12 steps."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    train.train_and_evaluate(run_config(**TINY), workdir)
    return workdir


@pytest.mark.slow
def test_metrics_are_logged_under_their_names(whole: Path) -> None:
    lines = logged(whole)
    errors = ("loss", "top1_error", "top5_error")
    training = {"step", "epoch", "learning_rate", *(f"train/{name}" for name in errors)}
    evaluation = {"step", "epoch", *(f"{part}/{name}" for part in ("eval", "train_eval") for name in errors)}
    assert [(line["step"], set(line)) for line in lines] == [
        *((step, training) for step in (2, 4, 6)),
        (6, evaluation),
        *((step, training) for step in (8, 10, 12)),
        (12, evaluation),
    ]
    environment = read_json(whole / "env.json")
    assert environment["executor"] == "pmap"
    assert environment["jax"] == jax.__version__
    assert environment["instruction_set"] == parallel.instruction_set()
    assert "step 12/12" in (whole / "train.log").read_text()


@pytest.mark.slow
def test_training_metrics_are_means_since_the_last_ones(tmp_path: Path, whole: Path) -> None:
    train.train_and_evaluate(run_config(**TINY | {"train.log_every": 1}), tmp_path)
    for name in ("train/loss", "train/top1_error", "train/top5_error"):
        every_step, every_two = (
            np.array([line[name] for line in logged(folder) if name in line]) for folder in (tmp_path, whole)
        )
        np.testing.assert_allclose(every_step.reshape(6, 2).mean(axis=1), every_two, rtol=1e-6)


def test_result_holds_the_last_metrics(whole: Path) -> None:
    *_, training, evaluation = logged(whole)
    last = {name: value for name, value in (training | evaluation).items() if "/" in name}
    parameters = sum(leaf.size for leaf in jax.tree.leaves(load_run(whole).variables["params"]))
    assert result(whole) == last | {"steps": 12, "epochs": 0.012, "parameters": parameters}
    assert RunDir(whole).result.keys() - result(whole).keys() == TIMES  # type: ignore[union-attr]


def test_filters_and_errors_of_each_class_are_written(whole: Path, tiny: ConfigDict) -> None:
    state = final_state(tiny, whole)
    np.testing.assert_array_equal(np.load(whole / "filters.npy"), state.params["conv1"]["kernel"])
    by_class = read_json(whole / "by_class.json")
    assert by_class["class"] == [str(digit) for digit in range(10)]
    assert np.mean(by_class["top1_error"]) == pytest.approx(result(whole)["eval/top1_error"])  # 100 images of each
    events = EventAccumulator(str(whole), {"images": 0}).Reload()
    assert [event.step for event in events.Images("eval/most_confident_errors")] == [12]
    assert [event.step for event in events.Images("conv1/filters")] == [6, 12]


@pytest.mark.slow
def test_training_images_are_evaluated_as_held_out_ones_are(whole: Path, tiny: ConfigDict) -> None:
    setup, network = train.open_run(tiny), load_run(whole)
    variables = setup.executor.place(network.variables)
    predictor = evaluate.make_predictor(tiny, 10, setup.executor)
    positions = np.linspace(0, 3999, tiny.eval.train_images).round().astype(int)
    batch = loader.read(setup.dataset.train, positions, 28)
    source = Arrays(batch["image"], batch["label"])
    outcomes = evaluate.evaluate(
        [lambda images: predictor(variables, network.known_statistics(), images)], source, tiny
    )
    expected = {name: result(whole)[f"train_eval/{name}"] for name in outcomes.metrics}
    assert outcomes.means() == expected


@pytest.mark.slow
def test_same_seed_gives_the_same_run(tmp_path: Path, whole: Path, tiny: ConfigDict) -> None:
    train.train_and_evaluate(tiny, tmp_path)
    assert_same_run(tiny, whole, tmp_path)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"optim.learning_rate": 0.002}], ids=["seed", "learning_rate"])
def test_another_seed_or_learning_rate_gives_another_run_and_compiles_nothing(
    changes: dict[str, Any], tmp_path: Path, whole: Path
) -> None:
    misses = [cache.cache_info().misses for cache in (train._compile_resident_steps, evaluate._make_predictor)]
    with compilations() as compiled:
        train.train_and_evaluate(run_config(**TINY | changes), tmp_path)
    assert compiled == []
    assert [cache.cache_info().misses for cache in (train._compile_resident_steps, evaluate._make_predictor)] == misses
    assert logged(tmp_path)[0]["train/loss"] != logged(whole)[0]["train/loss"]


def test_statistics_are_arguments_of_the_compiled_functions() -> None:
    config = run_config(**SHALLOW)
    setup = train.open_run(config)
    executor, measured = setup.executor, random_statistics(config, 1)
    train_step, predictor = train.make_train_step(setup), evaluate.make_predictor(config, 10, setup.executor)
    batch = next(train_batches(setup.dataset.train, config, seed=0, start=0, stop=1))

    def step_and_predict(stats: statistics.Statistics) -> tuple[np.ndarray, np.ndarray]:
        placed, state = executor.replicate(stats), executor.place(train.init_state(setup))
        logits = predictor(state.variables, placed, batch["image"])
        state = train_step(state, batch, placed, np.uint32(0), np.int32(1), optim.peak_learning_rate(config.optim))
        return jax.device_get((state.params["conv1"]["kernel"], logits))

    first = step_and_predict(measured)
    with compilations() as compiled:
        second = step_and_predict(measured._replace(mean=measured.mean + 9))
    assert compiled == []
    assert all((one != other).any() for one, other in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_resume_after_a_signal_is_bit_identical(
    tmp_path: Path, whole: Path, tiny: ConfigDict, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Step 7 is neither logged nor a multiple of checkpoint_every: the sums of the metrics are saved, too."""
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "progress", send_at(7, number))
        with pytest.raises(stop.Stopped, match="stopped at step 7 of 12"):
            train.train_and_evaluate(tiny, tmp_path)
    assert RunDir(tmp_path).result is None
    assert (tmp_path / "checkpoints" / "7").is_dir()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    train.train_and_evaluate(tiny, tmp_path)
    assert_same_run(tiny, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("default_handlers")
def test_run_resumes_with_other_values_of_the_free_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns the same, up to rounding."""
    config, changed = run_config(**SHALLOW), run_config(**SHALLOW | FREELY_CHANGED)
    train.train_and_evaluate(config, tmp_path / "whole")
    pieces = tmp_path / "pieces"
    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "progress", send_at(7, signal.SIGTERM))
        with pytest.raises(stop.Stopped):
            train.train_and_evaluate(config, pieces)
    finished = train.train_and_evaluate(changed, pieces)
    chex.assert_trees_all_close(
        final_state(changed, pieces).params, final_state(config, tmp_path / "whole").params, rtol=1e-4, atol=1e-6
    )
    assert finished["eval/loss"] == pytest.approx(result(tmp_path / "whole")["eval/loss"], rel=1e-5)
    assert "since the interruption, executor has changed from pmap to vmap" in (pieces / "train.log").read_text()
    environment = read_json(pieces / "env.json")
    assert [environment["executor"], *(former["executor"] for former in environment["earlier"])] == ["vmap", "pmap"]


@pytest.mark.usefixtures("default_handlers")
def test_signal_after_the_last_chance_to_save_waits_for_the_next_step(
    tmp_path: Path, tiny: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run says that a checkpoint is saved only if it is."""
    is_set = stop.Request.is_set
    asked: list[bool] = []

    def ask_and_request(self: stop.Request) -> bool:
        asked.append(is_set(self))
        if len(asked) == 7:
            self.make(signal.SIGTERM)
        return asked[-1]

    monkeypatch.setattr(stop.Request, "is_set", ask_and_request)
    monkeypatch.setattr(train, "_due", lambda *_: train._Due(log=False, evaluate=False, save=False))
    with pytest.raises(stop.Stopped, match="stopped at step 8 of 12; a checkpoint is saved"):
        train.train_and_evaluate(tiny, tmp_path)
    assert [path.name for path in RunDir(tmp_path).checkpoints.iterdir()] == ["8"]


@pytest.mark.usefixtures("default_handlers")
def test_signal_in_the_last_step_is_kept(tmp_path: Path, tiny: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is finished, and whoever called it is told."""
    monkeypatch.setattr(MetricWriter, "progress", send_at(12, signal.SIGTERM))
    with stop.requests() as request:
        assert train.train_and_evaluate(tiny, tmp_path)["steps"] == 12
        assert request.number == signal.SIGTERM


@pytest.mark.slow
def test_run_outside_the_main_thread_handles_no_signals(tmp_path: Path, whole: Path, tiny: ConfigDict) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(train.train_and_evaluate, tiny, tmp_path).result()
    assert result(tmp_path) == result(whole)


def test_run_killed_before_its_result_gets_it_from_the_last_checkpoint(
    tmp_path: Path, whole: Path, tiny: ConfigDict
) -> None:
    killed = shutil.copytree(whole, tmp_path / "killed")
    (killed / "result.json").unlink()
    train.train_and_evaluate(tiny, killed)
    assert_same_run(tiny, whole, killed)
    events = EventAccumulator(str(killed))
    events.Reload()
    assert [event.step for event in events.Images("eval/most_confident_errors")] == [12]


@pytest.mark.slow
def test_run_ends_at_the_evaluation_that_reaches_its_error(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It equals an uninterrupted run up to step 6, also if it is interrupted before that, or killed at the end."""
    errors = {line["step"]: line["train_eval/top1_error"] for line in logged(whole) if "train_eval/top1_error" in line}
    config = run_config(**TINY, **{"train.stop_at_error": errors[6]})
    train.train_and_evaluate(config, tmp_path / "early")
    assert result(tmp_path / "early")["steps"] == 6
    assert result(tmp_path / "early")["train_eval/top1_error"] == errors[6] < 1
    assert logged(tmp_path / "early") == [line for line in logged(whole) if line["step"] <= 6]

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "progress", send_at(4, signal.SIGTERM))
        with pytest.raises(stop.Stopped):
            train.train_and_evaluate(config, tmp_path / "pieces")
    train.train_and_evaluate(config, tmp_path / "pieces")
    assert_same_run(config, tmp_path / "early", tmp_path / "pieces")

    killed = shutil.copytree(tmp_path / "early", tmp_path / "killed")
    (killed / "result.json").unlink()
    monkeypatch.setattr(MetricWriter, "progress", lambda *_: pytest.fail("trains further"))
    train.train_and_evaluate(config, killed)
    assert_same_run(config, tmp_path / "early", killed)


@pytest.mark.slow
def test_run_that_does_not_reach_its_error_has_its_full_length(tmp_path: Path, whole: Path) -> None:
    train.train_and_evaluate(run_config(**TINY, **{"train.stop_at_error": 0.0}), tmp_path)
    assert result(tmp_path) == result(whole)


@pytest.mark.slow
def test_decay_on_plateau_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation every two steps, none with a lower error than the first: decays at the third and the fifth."""
    changes = {
        "train.epochs": 48 / 3800,  # 12 steps: 200 of the 4,000 images are held out
        "eval.every_epochs": 8 / 3800,
        "data.validation_split": "1/20",
        "optim.learning_rate": 1e-9,
        "optim.plateau.patience": 2,
        "train.log_every": 1,
    }
    config = run_config(**SHALLOW | changes)
    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "progress", send_at(7, signal.SIGTERM))
        with pytest.raises(stop.Stopped):
            train.train_and_evaluate(config, tmp_path / "pieces")
    train.train_and_evaluate(config, tmp_path / "pieces")
    train.train_and_evaluate(config, tmp_path / "whole")
    assert_same_run(config, tmp_path / "pieces", tmp_path / "whole")
    rates = [line["learning_rate"] for line in logged(tmp_path / "pieces") if "learning_rate" in line]
    np.testing.assert_allclose(rates, [1e-9] * 6 + [1e-10] * 4 + [1e-11] * 2, rtol=1e-5)


@pytest.mark.slow
def test_run_on_jpegs_with_every_feature_resumes_bit_identical(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JPEGs, mean image, crops, flips, colour noise, held-out images, batch normalisation, AdamW and schedules."""
    prepare.prepare(sources.folder(photos), 32, str(tmp_path))
    changes = {
        "data.name": "photos",
        "data.data_dir": str(tmp_path),
        "data.eval_split": "validation",
        "data.validation_split": "1/20",
        **STREAMED,
        "data.augment.code2012.noise_until_epoch": 0.8,
        "model.layers.conv1.then": ("batch_norm", "activation", "lrn", "max_pool"),
        "optim.name": "adamw",
        "optim.schedule": "cosine",
        "optim.warmup_epochs": 8 / 38,
        "optim.plateau.patience": 2,
        "train.label_smoothing": 0.1,
        "train.epochs": 48 / 38,  # 12 steps: 2 of the 40 images are held out
        "eval.every_epochs": 24 / 38,
        "eval.batch_size": 8,
    }
    config = run_config("cifar10", **SHALLOW | changes)
    batches: list[list[str]] = []  # hashes of the images of each step, for each call

    def hash_batches(*arguments: Any, **keywords: Any) -> Iterator[loader.Batch]:
        batches.append([])
        for batch in train_batches(*arguments, **keywords):
            batches[-1].append(hashlib.sha256(batch["image"].tobytes()).hexdigest())
            yield batch

    monkeypatch.setattr(train, "train_batches", hash_batches)
    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "progress", send_at(7, signal.SIGTERM))
        with pytest.raises(stop.Stopped):
            train.train_and_evaluate(config, tmp_path / "pieces")
    stored = list(tmp_path.glob("photos/**/statistics_*.npz"))
    assert stored
    for path in stored:
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "measure", None)  # the run has its statistics
        train.train_and_evaluate(config, tmp_path / "pieces")
    train.train_and_evaluate(config, tmp_path / "whole")
    assert_same_run(config, tmp_path / "pieces", tmp_path / "whole")
    before, after, uninterrupted = batches
    assert before[:7] + after == uninterrupted
    assert len(set(uninterrupted)) == 12
    assert {"eval/top1_error", "validation/top1_error"} <= logged(tmp_path / "whole")[-1].keys()
    (averages,) = final_state(config, tmp_path / "whole").batch_stats.values()
    assert all(averages["mean"].any(axis=1))  # of both towers
    metadata = read_json(tmp_path / "whole" / "dataset.json")
    assert len(metadata.pop("fingerprint")) == 16
    assert metadata == {
        "name": "photos",
        "classes": 2,
        "class_names": ["cat", "dog"],
        "train_images": 38,
        "validation_images": 2,
        "eval_split": "validation",
        "eval_images": 10,
    }
    log = (tmp_path / "whole" / "train.log").read_text()
    assert "trains on 38 images of photos; eval/ is on the 10 of validation, validation/ on 2 held-out" in log


@pytest.mark.slow
@pytest.mark.parametrize(("executor", "towers"), [("pmap", 2), ("shard_map", 1)])
def test_images_in_memory_give_the_same_bits_as_streamed_ones(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, towers: int
) -> None:
    """Resident on the devices, in the host's memory and streamed: 12 steps with evaluations, and the same again."""
    prepare.prepare(sources.folder(photos), 32, str(tmp_path))
    reads: list[int] = []
    read = loader.read

    def count_reads(source: datasets.Source, positions: np.ndarray, size: int) -> loader.Batch:
        if not isinstance(datasets.origin(source), Arrays):
            reads.extend(positions)
        return read(source, positions, size)

    monkeypatch.setattr(loader, "read", count_reads)
    common = SHALLOW | {
        "data.name": "photos",
        "data.data_dir": str(tmp_path),
        "data.eval_split": "validation",
        "data.validation_split": "1/20",
        "train.executor": executor,
        "model.towers": towers,
        "train.epochs": 48 / 38,
        "eval.every_epochs": 24 / 38,
        "eval.batch_size": 8,
    }
    # 50 images of 3,072 bytes; a CPU's two devices have copies in the same memory.
    needed = 50 * 32 * 32 * 3
    copies = 2
    budgets = {
        "on the devices": {"data.resident_bytes": copies * needed, "data.host_bytes": 0},
        "in memory": {"data.resident_bytes": copies * needed - 1, "data.host_bytes": needed},
        "streamed": {"data.resident_bytes": copies * needed - 1, "data.host_bytes": needed - 1},
    }
    decoded = {}
    for where, budget in budgets.items():
        for seed in (0, 1) if where == "on the devices" else (0,):
            config = run_config("cifar10", seed=seed, **common, **budget)
            train.train_and_evaluate(config, tmp_path / where / str(seed))
        assert f"images: {where}; steps in one program: 1" in (tmp_path / where / "0" / "train.log").read_text()
        decoded[where] = len(reads)
        reads.clear()
    for where in ("on the devices", "in memory"):
        config = run_config("cifar10", **common, **budgets[where])
        assert_same_run(config, tmp_path / "streamed" / "0", tmp_path / where / "0")
    # Once for both runs, and for both kinds of memory; the statistics are stored beside the dataset.
    assert decoded["on the devices"] == 50
    assert decoded["in memory"] == 0
    assert decoded["streamed"] > 12 * 4


@pytest.mark.slow
def test_several_steps_in_one_program_resume_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are logged, evaluated and saved at the same steps as with one step in each program, and agree."""
    changes = {"train.log_every": 8, "train.checkpoint_every": 7, "eval.every_epochs": 0.01}
    together = run_config(**SHALLOW | changes | {"train.steps_per_dispatch": 3})
    ends: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "progress", lambda _, step: ends.append(step))
        train.train_and_evaluate(together, tmp_path / "whole")
    # Something is due at steps 7, 8, 10 and 12: spans of three steps, or of one.
    assert ends == [3, 6, 7, 8, 9, 10, 11, 12]
    for step in (3, 6, 7, 9):
        with monkeypatch.context() as patch:
            patch.setattr(MetricWriter, "progress", send_at(step, signal.SIGTERM))
            with pytest.raises(stop.Stopped, match=f"stopped at step {step} of 12"):
                train.train_and_evaluate(together, tmp_path / str(step))
        train.train_and_evaluate(together, tmp_path / str(step))
        assert_same_run(together, tmp_path / "whole", tmp_path / str(step))
    train.train_and_evaluate(run_config(**SHALLOW | changes), tmp_path / "single")
    for one, other in zip(logged(tmp_path / "single"), logged(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_photographs_train_the_papers_network_on_two_devices(shared_images: Path, tmp_path: Path) -> None:
    """Two steps at 224 pixels, with all augmentation of the paper; few dense neurons."""
    changes = {
        **{f"model.layers.{layer}.features": 64 for layer in ("fc6", "fc7")},
        "data.name": "imagenette_224",
        "data.data_dir": str(shared_images),
        "data.train_split": "train[:32]",
        "data.eval_split": "validation[:16]",
        "train.batch_size": 16,
        "train.epochs": 1.0,
        "train.log_every": 1,
        "train.executor": "pmap",
        "eval.batch_size": 16,
    }
    trained = train.train_and_evaluate(run_config("imagenette", **changes), tmp_path)
    losses = [line["train/loss"] for line in logged(tmp_path) if "train/loss" in line]
    assert abs(losses[0] - np.log(10)) < 0.5
    assert len(losses) == trained["steps"] == 2
    assert np.isfinite(losses).all()
    assert 16 * trained["eval/top1_error"] in range(17)
    measured = statistics.read(RunDir(tmp_path).statistics_file)
    assert measured is not None
    assert 90 < measured.mean.mean() < 140
    # As of ImageNet: the first axis is grey and varies most (cuda-convnet2's deviations are 122, 37, 20).
    assert np.ptp(measured.axes[0]) < 0.1
    assert 90 < measured.deviations[0] < 150
    assert measured.deviations[0] > 2 * measured.deviations[1] > 2 * measured.deviations[2]


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "warns"), [(0.1, False), (0.2, True)])
def test_run_that_waits_for_images_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, warns: bool
) -> None:
    """On a clock by which a step takes one second and its images the given seconds."""
    progress, now = MetricWriter.progress, [0.0]

    def slow_batches(*arguments: Any, **keywords: Any) -> Iterator[loader.Batch]:
        for batch in train_batches(*arguments, **keywords):
            now[0] += seconds
            yield batch

    def slow_progress(self: MetricWriter, step: int) -> None:
        now[0] += 1
        progress(self, step)

    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime))
    monkeypatch.setattr(train, "train_batches", slow_batches)
    monkeypatch.setattr(MetricWriter, "progress", slow_progress)
    trained = train.train_and_evaluate(run_config(**SHALLOW | STREAMED), tmp_path)
    lines = RunDir(tmp_path).metrics()
    fractions = [line["data/wait_fraction"] for line in lines if "data/wait_fraction" in line]
    assert len(fractions) == 6
    # The first batch does not count: its step is compiled.
    assert fractions == pytest.approx([seconds / (2 + seconds), *[seconds / (1 + seconds)] * 5])
    assert (trained["data/wait_fraction"] > 0.1) == warns
    log = (tmp_path / "train.log").read_text()
    assert log.count("waits for images") == warns
    assert ("raise --config.data.threads, now 2, up to the" in log) == warns
    assert ("alexnet-jax prepare mnist5k --size=28" in log) == warns


@pytest.mark.slow
def test_frozen_layer_does_not_change_from_its_epoch_on() -> None:
    """Layer conv1 is frozen from step 9 of 1,000 an epoch."""
    config = run_config(**SHALLOW | {"model.layers.conv1.freeze_epoch": 0.008, "optim.momentum": 0.0})
    setup = train.open_run(config)
    train_step, stats = train.make_train_step(setup), random_statistics(config, 1)
    state = setup.executor.place(train.init_state(setup))
    changed = []
    for step, batch in enumerate(train_batches(setup.dataset.train, config, seed=0, start=0, stop=9), 1):
        before = jax.device_get(state.params)
        state = train_step(state, batch, stats, np.uint32(0), np.int32(step), optim.peak_learning_rate(config.optim))
        after = jax.device_get(state.params)
        changed.append({name for name in before if (before[name]["kernel"] != after[name]["kernel"]).any()})
    assert changed == [set(config.model.order)] * 8 + [set(config.model.order) - {"conv1"}]


@pytest.mark.slow
def test_extended_run_is_bit_identical_to_one_of_its_length(whole: Path, tiny: ConfigDict, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert train.train_and_evaluate(run_config(**TINY | {"train.epochs": 0.006}), run.path)["steps"] == 6
    run.extend(as_json(tiny))
    assert train.train_and_evaluate(tiny, run.path)["steps"] == 12
    assert "was finished after 6 steps and extended: train.epochs was 0.006, is 0.012" in run.log_file.read_text()
    jax.tree.map(np.testing.assert_array_equal, load_run(run.path).variables, load_run(whole).variables)


def test_finished_run_is_not_run_again(whole: Path, tiny: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "open_run", None)
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*"))
    assert train.train_and_evaluate(tiny, whole) == RunDir(whole).result
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*")) == before


def test_folder_of_another_config_is_refused(whole: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a run of another config \(optim.learning_rate was 0.004, is 0.5\)"):
        train.train_and_evaluate(run_config(**TINY, **{"optim.learning_rate": 0.5}), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 4001}, "train.batch_size=4001: must be at most the 4000 training images of mnist5k"),
        ({"data.std": (1.0, 1.0)}, "data.std=(1.0, 1.0): must be one number, or one for each of the 1 channels"),
        ({"data.augment.colour.noise": 0.1}, "noise=0.1: must be 0 for the images of mnist5k, which have 1 channel"),
        ({"model.layers.conv4.kernel": 9}, "conv4.kernel=9: must fit its feature map of 5x5, padded by 1+1; use"),
    ],
)
def test_config_that_does_not_fit_the_dataset_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train.train_and_evaluate(run_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parameters", "evaluation"])
def test_network_that_is_not_finite_is_neither_saved_nor_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also if the loss of the last batch was finite, which was computed before the update."""
    config = run_config(**SHALLOW)
    if name == "parameters":
        update = optax.apply_updates

        def overflow(params: Any, updates: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf * np.inf, update(params, updates))

        monkeypatch.setattr(optax, "apply_updates", overflow)
        config = run_config(**SHALLOW | {"train.checkpoint_every": 1, "optim.momentum": 0.8})  # compiled here
        message = "params/conv1/bias is not finite by step 1: training has diverged"
    else:
        means = evaluate.Outcomes.means
        monkeypatch.setattr(evaluate.Outcomes, "means", lambda self: means(self) | {"loss": np.nan})
        message = "eval/loss is nan by step 6: training has diverged"
    with pytest.raises(FloatingPointError, match=message):
        train.train_and_evaluate(config, tmp_path)
    run = RunDir(tmp_path)
    assert run.result is None
    assert [path.name for path in run.checkpoints.iterdir()] == ([] if name == "parameters" else ["3"])
    assert not any("eval/loss" in line for line in run.metrics())


@pytest.mark.slow
def test_checkpoint_waits_for_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While no record can be written, there is no checkpoint either, which could not be resumed."""
    config = run_config(**SHALLOW)
    train.train_and_evaluate(config, tmp_path / "whole")
    progress, write, full = MetricWriter.progress, events.os.write, False

    def progress_on_full_disk(self: MetricWriter, step: int) -> None:
        nonlocal full
        full = full or step > 4
        progress(self, step)

    def write_with_room(file: int, content: bytes) -> int:
        if full and content:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content)

    run = RunDir(tmp_path / "full")
    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "progress", progress_on_full_disk)
        patch.setattr(events.os, "write", write_with_room)
        with pytest.raises(OSError, match="the records of step 12 cannot be written; free the disk"):
            train.train_and_evaluate(config, run.path)
    assert [path.name for path in run.checkpoints.iterdir()] == ["3"]
    train.train_and_evaluate(config, run.path)
    assert_same_run(config, run.path, tmp_path / "whole")


@pytest.mark.slow
def test_diverging_run_stops_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    changes = SHALLOW | {"optim.learning_rate": 1e14, "train.checkpoint_every": 1, "train.log_every": 4}
    with pytest.raises(
        FloatingPointError, match=r"params/conv1/\w+ is not finite by step 3.*lower --config.optim.learning_rate"
    ):
        train.train_and_evaluate(run_config(**changes), tmp_path)
    assert RunDir(tmp_path).result is None
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}
    assert "stopped: FloatingPointError" in (tmp_path / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["vmap", "pmap", "shard_map"])
def test_nothing_is_compiled_after_the_first_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    """By step 6 there has been one of each: step, log, evaluation, checkpoint."""
    counts: list[int] = []  # of compilations before the end of each step
    progress = MetricWriter.progress
    # No other test has this size: everything is compiled here.
    config = run_config(**SHALLOW, **{"train.executor": executor, "eval.batch_size": 125})
    with compilations() as compiled:

        def count(self: MetricWriter, step: int) -> None:
            counts.append(len(compiled))
            progress(self, step)

        monkeypatch.setattr(MetricWriter, "progress", count)
        train.train_and_evaluate(config, tmp_path)
    assert len(counts) == 12
    assert counts[0] == counts[1] > 0  # the second step needs nothing
    assert counts[6] == len(compiled) > counts[0]


def test_state_is_donated() -> None:
    config = run_config(**SHALLOW)
    setup = train.open_run(config)
    state = setup.executor.place(train.init_state(setup))
    batch = next(train_batches(setup.dataset.train, config, seed=0, start=0, stop=1))
    stats = setup.executor.replicate(random_statistics(config, 1))
    train.make_train_step(setup)(state, batch, stats, np.uint32(0), np.int32(1), optim.peak_learning_rate(config.optim))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_profile_holds_the_requested_steps(tmp_path: Path) -> None:
    train.train_and_evaluate(run_config(**SHALLOW, **{"train.profile": 3}), tmp_path)
    (trace,) = tmp_path.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert sorted(map(int, steps)) == [3, 4, 5]
    assert any(event.get("name") == "wait for images" for event in events)
