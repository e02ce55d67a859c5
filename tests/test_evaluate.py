"""Evaluation counts every image once, whatever the batch size, and averages probabilities over views and networks."""

import argparse
import dataclasses
import functools
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from alexnet_jax import evaluate, model, train
from alexnet_jax.checkpoint import TrainedNetwork, load_run, save_run
from alexnet_jax.data import augment, datasets, loader
from alexnet_jax.data.datasets import Arrays
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.parallel import TOWER, Executor
from alexnet_jax.run_dir import RunDir, write_json
from support import SHALLOW, TINY, random_statistics, run_config

# Initial weights with which logits differ between images, and probabilities between classes.
SPREAD: dict[str, Any] = SHALLOW | {
    **{f"model.layers.{name}.weight_std": 0.3 for name in ("conv1", "conv3")},
    "model.layers.fc8.weight_std": 0.1,
    "data.subtract": "mean_image",
}
COUNT = 60


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@functools.cache
def reference_forward(model_config: FrozenConfigDict) -> Callable[[Any, jax.Array], jax.Array]:
    """Return the function from variables and inputs to logits, all towers and images at once."""
    network = model.AlexNet(model_config, 10)

    def forward(tower: Any, inputs: jax.Array) -> Any:
        return network.apply(tower, inputs, train=False)

    return jax.jit(jax.vmap(forward, in_axes=(0, None), axis_name=TOWER, out_axes=None))


def reference_probabilities(
    config: ConfigDict, variables: Any, statistics: Statistics, images: np.ndarray, views: int
) -> np.ndarray:
    """Average NumPy's softmax over views."""
    forward = reference_forward(FrozenConfigDict(config.model))
    probabilities = []
    for view in augment.evaluation_views(views, config.data.image_size, config.data.crop):
        logits = forward(variables, augment.inputs(images, view, config.data, statistics))
        probabilities.append(softmax(np.asarray(logits, np.float64)))
    return np.mean(probabilities, axis=0)


def reference_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    of_label = probabilities[np.arange(len(labels)), labels]
    ranks = (probabilities > of_label[:, None]).sum(axis=1)
    return {
        "loss": float(-np.log(of_label).mean()),
        "top1_error": float((ranks >= 1).mean()),
        "top5_error": float((ranks >= 5).mean()),
    }


@pytest.fixture(scope="module")
def held_out() -> tuple[np.ndarray, np.ndarray, Arrays]:
    """Return images, labels, and both as a source."""
    source = datasets.load(run_config().data).evaluation
    batch = loader.read(source, np.arange(COUNT) * (1000 // COUNT), 28)
    return batch["image"], batch["label"], Arrays(batch["image"], batch["label"])


@pytest.mark.slow
@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize(
    ("executor", "batch_size"),
    [(Executor("vmap", 2), COUNT), (Executor("pmap", 2), 25), (Executor("shard_map", 1, shards=2), 25)],
)
def test_means_equal_those_of_all_images_at_once(
    held_out: tuple[np.ndarray, np.ndarray, Arrays], executor: Executor, batch_size: int, views: int
) -> None:
    changes = {"eval.batch_size": batch_size, "eval.views": views, "model.towers": executor.towers}
    config = run_config(**SPREAD | changes)
    variables, statistics = model.init(config.model, 10, (23, 23, 1), 0), random_statistics(config, 1)
    predictor = evaluate.make_predictor(config, 10, executor)
    images, labels, source = held_out
    predict = functools.partial(predictor, executor.place(variables), statistics)
    outcomes = evaluate.evaluate([predict], source, config)
    expected = reference_probabilities(config, variables, statistics, images, views)
    assert outcomes.means() == pytest.approx(reference_metrics(expected, labels), rel=1e-4)
    np.testing.assert_array_equal(outcomes.labels, labels)
    np.testing.assert_array_equal(outcomes.predicted, expected.argmax(axis=-1))


def test_configs_that_differ_in_seed_or_training_share_a_predictor() -> None:
    executor = Executor("vmap", 2)
    predictor = evaluate.make_predictor(run_config(**TINY), 10, executor)
    assert evaluate.make_predictor(run_config(seed=1, **TINY | {"train.epochs": 3.0}), 10, executor) is predictor
    assert evaluate.make_predictor(run_config(**TINY | {"eval.views": 10}), 10, executor) is not predictor


def test_top1_and_top5_errors_count_the_best_class_and_the_best_five() -> None:
    logits = jnp.array([[0.1, 0.9, 0.3, 0.2, 0.5, 0.6, 0.4]] * 3)
    metrics = evaluate.per_example_metrics(logits, jnp.array([1, 4, 0]))
    assert metrics["top1_error"].tolist() == [0, 1, 1]
    assert metrics["top5_error"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_with_smoothed_targets(smoothing: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (4, 7))
    labels = np.array([0, 3, 6, 3])
    targets = np.eye(7)[labels] * (1 - smoothing) + smoothing / 7
    expected = -(targets * np.log(softmax(logits))).sum(axis=1)
    metrics = evaluate.per_example_metrics(jnp.float32(logits), jnp.array(labels), smoothing)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_gradient_of_the_loss_has_no_scatter() -> None:
    """A scatter is slow and not deterministic on GPUs."""

    def loss(logits: jax.Array) -> jax.Array:
        return evaluate.per_example_metrics(logits, jnp.array([1, 2]))["loss"].sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((2, 7))))
    assert "exp" in program
    assert "scatter" not in program


class Longer:
    """A source that reports one example more than it has."""

    def __init__(self, source: datasets.Source):
        self._source = source
        self.channels = source.channels

    def __len__(self) -> int:
        return len(self._source) + 1

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self._source[position]


def test_missed_image_raises(
    held_out: tuple[np.ndarray, np.ndarray, Arrays], monkeypatch: pytest.MonkeyPatch, tiny: ConfigDict
) -> None:
    *_, source = held_out
    batches = list(loader.all_batches(source, tiny, 25))
    monkeypatch.setattr(loader, "all_batches", lambda *_: batches)
    with pytest.raises(RuntimeError, match=f"counted {COUNT} of {COUNT + 1} images"):
        evaluate.evaluate([lambda images: jnp.zeros((len(images), 10))], Longer(source), tiny)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write runs on the same images: two towers, another seed, and one tower with another crop and mean."""
    folders = []
    one_tower = {"model.towers": 1, "data.crop": 25, "data.subtract": "central_mean_image"}
    for config in (run_config(**SPREAD), run_config(seed=1, **SPREAD), run_config(seed=1, **SPREAD | one_tower)):
        variables = model.init(config.model, 10, (config.data.crop, config.data.crop, 1), config.seed)
        network = TrainedNetwork(config, 10, variables, random_statistics(config, 1))
        folders.append(tmp_path_factory.mktemp("runs") / "run")
        save_run(RunDir(folders[-1]), network, train.new_state(config, variables), {})
    return folders


def test_runs_of_an_executor_that_is_not_here_are_evaluated(runs: list[Path], tmp_path: Path) -> None:
    """A run of four devices, for example, on this machine of two."""
    config, network = run_config(**SPREAD | {"model.towers": 4, "train.executor": "pmap"}), load_run(runs[0])
    variables = model.init(config.model, 10, (23, 23, 1), config.seed)
    moved = network._replace(config=config, variables=variables)
    save_run(RunDir(tmp_path / "run"), moved, train.new_state(config, variables), {})
    assert evaluate.evaluate_runs([tmp_path / "run"])["images"] == 1000


@pytest.mark.slow
def test_ensemble_averages_probabilities(
    runs: list[Path], held_out: tuple[np.ndarray, np.ndarray, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels, source = held_out
    dataset = dataclasses.replace(datasets.load(run_config().data), evaluation=source)
    monkeypatch.setattr(datasets, "load", lambda _: dataset)
    results = evaluate.evaluate_runs(runs, views=10)
    assert {key: results[key] for key in ("data", "split", "images", "views")} == {
        "data": "mnist5k",
        "split": "test",
        "images": COUNT,
        "views": 10,
    }
    probabilities = []
    for run in runs:
        network = load_run(run)
        assert network.statistics is not None
        probabilities.append(reference_probabilities(network.config, network.variables, network.statistics, images, 10))
        assert results["errors"][str(run)] == pytest.approx(reference_metrics(probabilities[-1], labels), rel=1e-4)
    average = reference_metrics(np.mean(probabilities, axis=0), labels)
    assert results["errors"]["average"] == pytest.approx(average, rel=1e-4)
    assert average["loss"] < np.mean([reference_metrics(each, labels)["loss"] for each in probabilities])
    assert min(each.std(axis=0).mean() for each in probabilities) > 0.01  # they depend on the image


def test_ensemble_of_runs_on_other_images_raises(runs: list[Path], tmp_path: Path) -> None:
    config = json.loads(RunDir(runs[0]).config_file.read_text())
    config["data"]["image_size"] = 30
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    for name in ("checkpoints", "dataset.json", "statistics.npz"):
        (other.path / name).symlink_to(runs[0] / name)
    other.config_file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"other: data.image_size=30: must be 28, as in .*; an ensemble averages"):
        evaluate.evaluate_runs([runs[0], other.path])
    with pytest.raises(ValueError, match="must be a run's folder"):
        evaluate.evaluate_runs([tmp_path])


@pytest.mark.slow
def test_split_is_chosen_and_its_classes_are_checked(runs: list[Path], tmp_path: Path) -> None:
    results = evaluate.evaluate_runs(runs[:1], split="train")
    assert (results["split"], results["images"]) == ("train", 4000)
    assert results["errors"] != evaluate.evaluate_runs(runs[:1])["errors"]
    with pytest.raises(ValueError, match="eval_split=val: must be a split of mnist5k; use one of train, test"):
        evaluate.evaluate_runs(runs[:1], split="val")
    named = RunDir(shutil.copytree(runs[0], tmp_path / "run"))
    write_json(named.dataset_file, {"classes": 10, "class_names": [*"012345678", "nine"]})
    with pytest.raises(ValueError, match="class_names: class 9 was 'nine', is '9'"):
        evaluate.evaluate_runs([named.path], split="train")


@pytest.mark.slow
def test_verb_prints_and_writes_the_errors_of_every_run(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    output = tmp_path / "errors.json"
    evaluate.main(parser.parse_args([f"--run={runs[0]}", f"--run={runs[1]}", f"--output={output}"]))
    printed, results = capsys.readouterr().out, json.loads(output.read_text())
    assert "1,000 images" in printed
    assert list(results["errors"]) == [str(runs[0]), str(runs[1]), "average"]
    for name, errors in results["errors"].items():
        assert name in printed
        assert f"{100 * errors['top1_error']:.2f}" in printed


@pytest.mark.slow
def test_ten_views_need_no_more_memory_than_one() -> None:
    """Views are evaluated one at a time."""
    variables = model.shapes(run_config(**TINY).model, 10, (23, 23, 1))
    images = jax.ShapeDtypeStruct((64, 28, 28, 1), np.uint8)

    def memory(views: int) -> int:
        config = run_config(**TINY | {"eval.views": views})
        predictor = evaluate.make_predictor(config, 10, Executor("vmap", 2))
        compiled: Any = inspect.unwrap(predictor, stop=lambda function: hasattr(function, "lower"))
        program = compiled.lower(variables, random_statistics(config, 1), images)
        return program.compile().memory_analysis().temp_size_in_bytes

    assert memory(10) < 1.2 * memory(1)
