"""A run is a function of its config: twice the same, in one go or in pieces."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from conftest import REPOSITORY, TINY, any_pixels, run_config
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexnet_jax import batches, data, evaluate, logs, originals, panels, pixels, prepare, progress, records, train
from alexnet_jax.batches import train_batches
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.towers import Executor

pytestmark = pytest.mark.usefixtures("quickly_compiled")

TIMES = {"images_per_second", "seconds", "data/wait_fraction"}


def final_state(config: ConfigDict, workdir: Path) -> train.State:
    dataset, _ = train.prepare(config)
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        restored, progress = checkpoints.restore(train.init_state(config, dataset))
    assert progress["step"] == 12
    return jax.device_get(restored)


def metrics(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def result(workdir: Path) -> dict:
    return {name: value for name, value in records.result(workdir).items() if name not in TIMES}


def assert_same_run(config: ConfigDict, one: Path, other: Path) -> None:
    """Bit-equal states, and the same records."""
    chex.assert_trees_all_equal(final_state(config, one), final_state(config, other))
    assert metrics(one) == metrics(other)
    assert result(one) == result(other)


def stop_at(last: int, number: signal.Signals = signal.SIGTERM) -> Callable[[logs.Logs, int], None]:
    """``Logs.progress`` that asks the run to stop after a step."""
    progress = logs.Logs.progress

    def progress_and_stop(self: logs.Logs, step: int) -> None:
        progress(self, step)
        if step == last:
            signal.raise_signal(number)

    return progress_and_stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps in one go."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    train.train_and_evaluate(run_config(**TINY), workdir)
    return workdir


def test_a_run_leaves_its_metrics_under_their_names(whole: Path) -> None:
    recorded = metrics(whole)
    training = {"step", "epoch", "train/loss", "train/top1_error", "train/top5_error", "learning_rate"}
    errors = ("loss", "top1_error", "top5_error")
    evaluation = {"step", "epoch", *(f"{part}/{name}" for part in ("eval", "train_eval") for name in errors)}
    assert [(line["step"], line.keys()) for line in recorded] == [
        *((step, training) for step in (2, 4, 6)),
        (6, evaluation),
        *((step, training) for step in (8, 10, 12)),
        (12, evaluation),
    ]
    assert result(whole) | recorded[-1] | recorded[-2] == {**result(whole), **recorded[-1], **recorded[-2]}
    assert (result(whole)["steps"], result(whole)["epochs"]) == (12, 0.012)
    environment = records.read_json(whole / "env.json")
    assert environment["executor"] == "pmap"
    assert environment["jax"] == jax.__version__
    assert "step 12/12" in (whole / "train.log").read_text()


def test_a_run_leaves_what_the_report_shows_of_its_net(whole: Path, tiny: ConfigDict) -> None:
    state = final_state(tiny, whole)
    np.testing.assert_array_equal(np.load(whole / "kernels.npy"), state.params["conv1"]["kernel"])
    by_class = records.read_json(whole / "by_class.json")
    assert by_class["class"] == [str(digit) for digit in range(10)]
    assert np.mean(by_class["top1_error"]) == pytest.approx(result(whole)["eval/top1_error"])  # 100 images of each
    shown = EventAccumulator(str(whole), {"images": 0}).Reload()
    assert [event.step for event in shown.Images("eval/mistakes")] == [12]
    assert [event.step for event in shown.Images("conv1/kernels")] == [6, 12]


def test_training_images_are_evaluated_as_held_out_ones_are(whole: Path, tiny: ConfigDict) -> None:
    dataset, executor = train.prepare(tiny)
    params = executor.place(final_state(tiny, whole).params)
    predict = evaluate.predictor(tiny, 10, pixels.of_run(whole, dataset, tiny.data), executor)
    positions = np.linspace(0, 3999, tiny.eval.train_images).round().astype(int)
    images = batches.read(dataset.train, positions, 28)
    chosen = data.Arrays(images["image"], images["label"])
    found = evaluate.outcomes([lambda batch: predict(params, batch)], chosen, tiny).means()
    assert found == {name: result(whole)[f"train_eval/{name}"] for name in found}


def test_the_worst_mistakes_are_shown(tiny: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _ = train.prepare(tiny)
    wrong = np.arange(1000) % 100 == 7
    losses = np.where(wrong, np.arange(1000), 2000.0)  # what is right does not count, however large its loss
    labels = np.array([dataset.evaluation[position]["label"] for position in range(1000)])
    outcomes = evaluate.Outcomes({"loss": losses, "top1_error": wrong.astype(float)}, labels, np.full(1000, 9))
    figures = []
    monkeypatch.setattr(panels, "to_pixels", figures.append)
    panels.mistakes(outcomes, dataset, 28)
    (axes,) = figures[0].axes
    assert len(axes.images) == 10
    np.testing.assert_array_equal(axes.images[0].get_array(), dataset.evaluation[907]["image"].squeeze())
    assert [text.get_text() for text in axes.texts] == [f"{digit}\nnot 9" for digit in range(9, -1, -1)]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path, whole: Path, tiny) -> None:
    train.train_and_evaluate(tiny, tmp_path / "again")
    assert_same_run(tiny, whole, tmp_path / "again")
    train.train_and_evaluate(run_config(seed=1, **TINY), tmp_path / "other")
    assert metrics(tmp_path / "other") != metrics(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_equal(
    tmp_path: Path, whole: Path, tiny, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Step 7 is neither logged nor a checkpoint's: the sums of the metrics are saved, too."""
    with monkeypatch.context() as patch:
        patch.setattr(logs.Logs, "progress", stop_at(7, number))
        with pytest.raises(KeyboardInterrupt, match="stopped at step 7 of 12"):
            train.train_and_evaluate(tiny, tmp_path)
    assert records.result(tmp_path) is None
    assert (tmp_path / "checkpoints" / "7").is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train.train_and_evaluate(tiny, tmp_path)
    assert_same_run(tiny, whole, tmp_path)


@pytest.mark.slow
def test_a_killed_command_goes_on_bit_equal_when_given_again(tmp_path: Path) -> None:
    """kill -9 on the way: what was recorded after the last checkpoint is done and recorded again."""
    changes = {"train.epochs": 0.12, "train.checkpoint_every": 40, "train.log_every": 5, "eval.every_epochs": 0.06}
    config = run_config(**TINY | changes)
    command = [sys.executable, "-m", "alexnet_jax.main", "--config=configs/base.py:embedded"]
    command += [f"--config.{key}={value}" for key, value in (TINY | changes).items()]
    command += [f"--workdir={tmp_path / 'killed'}"]
    killed, whole = tmp_path / "killed" / "base" / "seed_0", tmp_path / "whole"

    def last_step() -> int:
        lines = records.complete_lines(killed / "metrics.jsonl")
        return json.loads(lines[-1])["step"] if lines else 0

    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as here
    arguments = {"cwd": REPOSITORY, "stdout": subprocess.DEVNULL, "env": environment}
    with subprocess.Popen(command, **arguments) as process:
        while last_step() < 55:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert last_step() < 120
    assert records.result(killed) is None
    subprocess.run(command, check=True, **arguments)
    assert "from step 40 to 120" in (killed / "train.log").read_text()
    train.train_and_evaluate(config, whole)
    assert metrics(killed) == metrics(whole)
    assert result(killed) == result(whole)
    restored = []
    for folder in (killed, whole):
        dataset, _ = train.prepare(config)
        with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
            restored.append(jax.device_get(checkpoints.restore(train.init_state(config, dataset))))
    chex.assert_trees_all_equal(restored[0][0], restored[1][0])


def test_a_stall_cuts_the_rate_and_is_part_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation every two steps, none with a lower error than the first: a cut at the third and the fifth."""
    changes = {
        "train.epochs": 48 / 3800,  # 12 steps; 200 of the 4,000 images are for validation
        "eval.every_epochs": 8 / 3800,
        "optim.learning_rate": 1e-9,
        "optim.stall.evaluations": 2,
        "train.log_every": 1,
    }
    config = run_config(**TINY | changes)
    with monkeypatch.context() as patch:
        patch.setattr(logs.Logs, "progress", stop_at(7))
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(config, tmp_path / "pieces")
    train.train_and_evaluate(config, tmp_path / "pieces")
    train.train_and_evaluate(config, tmp_path / "whole")
    assert_same_run(config, tmp_path / "pieces", tmp_path / "whole")
    rates = [line["learning_rate"] for line in metrics(tmp_path / "pieces") if "learning_rate" in line]
    np.testing.assert_allclose(rates, [1e-9] * 6 + [1e-10] * 4 + [1e-11] * 2, rtol=1e-5)


def test_a_run_on_jpegs_goes_on_bit_equal(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that the pipeline has: squares of photos, mean image, crops, flips, colours, validation images."""
    prepare.prepare(originals.folder(photos), 32, str(tmp_path))
    changes = {
        "data.name": "photos",
        "data.data_dir": str(tmp_path),
        "data.eval_split": "validation",
        "optim.stall.evaluations": 2,
        "train.epochs": 48 / 38,  # 12 steps; 2 of the 40 images are for validation
        "eval.every_epochs": 24 / 38,
        "eval.batch_size": 8,
    }
    config = run_config("cifar10", **TINY | changes)
    seen: list[list[str]] = []
    read = train.batches.train_batches

    def note(*arguments, **more):
        seen.append([])
        for batch in read(*arguments, **more):
            seen[-1].append(hashlib.sha256(batch["image"].tobytes()).hexdigest())
            yield batch

    monkeypatch.setattr(train.batches, "train_batches", note)
    with monkeypatch.context() as patch:
        patch.setattr(logs.Logs, "progress", stop_at(7))
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(config, tmp_path / "pieces")
    for stored in tmp_path.rglob("32px/1.0.0/pixels_*"):
        stored.unlink()  # the run has its own
    monkeypatch.setattr(train.pixels, "measured", None)
    train.train_and_evaluate(config, tmp_path / "pieces")
    monkeypatch.undo()
    monkeypatch.setattr(train.batches, "train_batches", note)
    train.train_and_evaluate(config, tmp_path / "whole")
    assert_same_run(config, tmp_path / "pieces", tmp_path / "whole")
    before, after, whole = seen
    assert before[:7] + after == whole
    assert len(set(whole)) == 12
    recorded = metrics(tmp_path / "whole")[-1]
    assert {"eval/top1_error", "validation/top1_error"} <= recorded.keys()
    described = records.read_json(tmp_path / "whole" / "dataset.json")
    assert described == {
        "name": "photos",
        "classes": 2,
        "class_names": ["cat", "dog"],
        "train_images": 38,
        "validation_images": 2,
        "eval_split": "validation",
        "eval_images": 10,
    }
    said = (tmp_path / "whole" / "train.log").read_text()
    assert "eval/ is on the 10 of validation, validation/ on 2 that are kept apart" in said


@pytest.mark.slow
def test_photographs_go_through_the_papers_net_on_two_devices(shared_images: Path, tmp_path: Path) -> None:
    """Real ones, at 224 pixels, with everything the paper does to them, for two steps."""
    changes = {
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
    result = train.train_and_evaluate(run_config("imagenette", **changes), tmp_path)
    losses = [line["train/loss"] for line in metrics(tmp_path) if "train/loss" in line]
    assert abs(losses[0] - np.log(10)) < 0.5
    assert len(losses) == result["steps"] == 2
    assert np.isfinite(losses).all()
    assert 16 * result["eval/top1_error"] in range(17)
    seen = train.pixels.read(tmp_path / "pixels.npz")
    assert 90 < seen.mean.mean() < 140
    # As of ImageNet: the first axis is grey and varies most (cuda-convnet2's deviations are 122, 37, 20).
    assert np.ptp(seen.axes[0]) < 0.1
    assert 90 < seen.deviations[0] < 150
    assert seen.deviations[0] > 2 * seen.deviations[1] > 2 * seen.deviations[2]


@pytest.mark.parametrize(("pause", "says"), [(0.1, False), (0.2, True)])
def test_a_run_that_waits_for_images_says_so(tmp_path: Path, monkeypatch, tiny, pause: float, says: bool) -> None:
    """By a clock on which a step takes a second."""
    read, progressed, now = train.batches.train_batches, logs.Logs.progress, [0.0]

    def slowly(*arguments, **more):
        for batch in read(*arguments, **more):
            now[0] += pause
            yield batch

    def progress_in_a_second(self: logs.Logs, step: int) -> None:
        now[0] += 1
        progressed(self, step)

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(train.batches, "train_batches", slowly)
    monkeypatch.setattr(logs.Logs, "progress", progress_in_a_second)
    result = train.train_and_evaluate(tiny, tmp_path)
    said = (tmp_path / "train.log").read_text()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    fractions = [line["data/wait_fraction"] for line in lines if "data/wait_fraction" in line]
    assert len(fractions) == 6
    assert all(0 <= fraction <= 1 for fraction in fractions)
    assert (result["data/wait_fraction"] > 0.1) == says
    assert said.count("waits for images") == says
    if says:
        assert "raise --config.data.threads, now 2, up to the" in said
        assert "python -m alexnet_jax.prepare mnist5k --size=28" in said


def test_a_frozen_layer_stops_at_its_epoch() -> None:
    """In the compiled step, which decides by its number: from step 9 on, with 1,000 steps an epoch."""
    changes = {"model.layers.conv1.freeze_epoch": 0.008, "optim.momentum": 0.0}
    config = run_config(**TINY | changes)
    dataset, _ = train.prepare(config)
    executor = Executor("vmap", 2)
    run_step = train.train_step(config, dataset, any_pixels(config, 1), executor)
    batch = next(train_batches(dataset.train, config, seed=0, start=0, stop=1))
    moved = []
    for step in (8, 9):
        state = train.init_state(config, dataset)
        before = jax.device_get(state.params)
        after = jax.device_get(run_step(state, batch, np.uint32(0), np.int32(step), np.int32(0)).params)
        moved.append({name: not np.array_equal(before[name]["kernel"], after[name]["kernel"]) for name in before})
    assert all(moved[0].values())
    assert moved[1] == {name: name != "conv1" for name in moved[1]}


def test_a_finished_run_is_not_run_again(whole: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train_step", None)
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*"))
    assert train.train_and_evaluate(tiny, whole) == records.result(whole)
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*")) == before


def test_a_folder_of_another_config_is_refused(whole: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a run of another config \(optim.learning_rate was 0.004, is 0.5\)"):
        train.train_and_evaluate(run_config(**TINY, **{"optim.learning_rate": 0.5}), whole)


def test_a_run_that_diverges_says_when_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    changes = TINY | {"optim.learning_rate": 1e20, "train.checkpoint_every": 1, "train.log_every": 4}
    with pytest.raises(FloatingPointError, match=r"train/loss is nan by step 2.*lower --config.optim.learning_rate"):
        train.train_and_evaluate(run_config(**changes), tmp_path)
    assert records.result(tmp_path) is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert "stopped: FloatingPointError" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("executor", ["vmap", "pmap", "shard_map"])
def test_nothing_is_compiled_after_the_first_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    """By step 6 there has been one of all: step, log, evaluation, checkpoint."""
    steps: list[int] = [0]
    compiled: list[int] = []
    progress = logs.Logs.progress

    def note(self: logs.Logs, step: int) -> None:
        steps.append(step)
        progress(self, step)

    def listen(event: str, seconds: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(steps[-1])

    monkeypatch.setattr(logs.Logs, "progress", note)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train.train_and_evaluate(run_config(**TINY, **{"train.executor": executor}), tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert steps[-1] == 12
    assert compiled
    assert max(compiled) <= 6
    assert 1 not in compiled  # the second step is the first one over


def test_the_state_is_donated(tiny) -> None:
    dataset, _ = train.prepare(tiny)
    towers = Executor("pmap", 2)
    state = towers.place(train.init_state(tiny, dataset))
    batch = next(train_batches(dataset.train, tiny, seed=0, start=0, stop=1))
    train.train_step(tiny, dataset, any_pixels(tiny, 1), towers)(state, batch, np.uint32(0), np.int32(1), np.int32(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_profile_holds_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    train.train_and_evaluate(run_config(**TINY, **{"train.profile": 3}), tmp_path)
    (trace,) = tmp_path.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert sorted(map(int, steps)) == [3, 4, 5]
    assert any(event.get("name") == "wait for images" for event in events)
