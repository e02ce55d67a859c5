"""Every held-out image counts once, whatever the batch size; views and nets are averaged by their probabilities."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, any_pixels, run_config

from alexnet_jax import augment, batches, checkpoint, data, evaluate, model, train
from alexnet_jax.checkpoint import Weights
from alexnet_jax.towers import TOWER, Executor

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def probabilities(config, params, seen, images: np.ndarray, views: int) -> np.ndarray:
    """By NumPy's softmax over views that are all there at once."""
    net = model.AlexNet(config.model, 10)
    forward = jax.jit(
        jax.vmap(
            lambda own, inputs: net.apply({"params": own}, inputs, train=False),
            in_axes=(0, None),
            axis_name=TOWER,
            out_axes=None,
        )
    )
    found = []
    for view in augment.evaluation_views(views, config.data.image_size, config.data.crop):
        logits = forward(params, augment.inputs(images, view, config.data, seen))
        found.append(softmax(np.asarray(logits, np.float64)))
    return np.mean(found, axis=0)


def errors(found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    ranks = (found > found[np.arange(len(labels)), labels][:, None]).sum(axis=1)
    return {
        "loss": float(-np.log(found[np.arange(len(labels)), labels]).mean()),
        "top1_error": float((ranks >= 1).mean()),
        "top5_error": float((ranks >= 5).mean()),
    }


# A net that tells images apart, and of which not all probabilities are alike.
SPREAD = (
    TINY
    | {f"model.layers.{name}.weight_std": 0.3 for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")}
    | {"model.layers.fc8.weight_std": 1.0, "data.subtract": "mean_image"}
)
COUNT = 60


@pytest.fixture(scope="module")
def held_out() -> tuple[np.ndarray, np.ndarray, data.Source]:
    """Images, labels, and both as a source."""
    source = data.load(run_config().data).evaluation
    read = batches.read(source, np.arange(COUNT) * (1000 // COUNT), 28)
    return read["image"], read["label"], data.Arrays(read["image"], read["label"])


@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize(("executor", "batch_size"), [("vmap", 25), ("pmap", COUNT), ("pmap", 64)])
def test_means_are_those_over_all_images_at_once(held_out, executor: str, batch_size: int, views: int) -> None:
    changes = {"eval.batch_size": batch_size, "eval.views": views, "train.executor": executor}
    config = run_config(**SPREAD, **changes)
    params = model.init(config.model, 10, (23, 23, 1), 0)
    seen, towers = any_pixels(config, 1), Executor(executor, 2)
    predict = evaluate.predictor(config, 10, seen, towers)
    images, labels, source = held_out
    outcomes = evaluate.outcomes([partial(predict, towers.place(params))], source, config)
    expected = probabilities(config, params, seen, images, views)
    assert outcomes.means() == pytest.approx(errors(expected, labels), rel=1e-4)
    np.testing.assert_array_equal(outcomes.labels, labels)
    np.testing.assert_array_equal(outcomes.predicted, expected.argmax(axis=-1))


def test_errors_count_the_best_one_and_the_best_five() -> None:
    logits = jnp.array([[0.1, 0.9, 0.3, 0.2, 0.5, 0.6, 0.4]] * 3)
    found = evaluate.per_image(logits, jnp.array([1, 4, 0]))
    assert found["top1_error"].tolist() == [0, 1, 1]
    assert found["top5_error"].tolist() == [0, 0, 1]


class Short:
    """Examples that say they are more than can be read of them."""

    def __init__(self, source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source) + 1

    def __getitem__(self, position: int):
        return self._source[position]


def test_a_missed_image_is_an_error(monkeypatch: pytest.MonkeyPatch, tiny) -> None:
    dataset, _ = train.prepare(tiny)
    read = list(batches.all_batches(dataset.evaluation, tiny))
    monkeypatch.setattr(evaluate.batches, "all_batches", lambda *_: read)
    with pytest.raises(RuntimeError, match="counted 1000 of 1001 held-out images"):
        evaluate.outcomes([lambda images: np.zeros((len(images), 10))], Short(dataset.evaluation), tiny)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nets of the same images: two towers, another seed, and one tower that sees other crops and another mean."""
    folder = tmp_path_factory.mktemp("runs")
    one_tower = {"model.towers": 1, "data.crop": 25, "data.subtract": "central_mean_image"}
    for number, config in enumerate(
        (run_config(**SPREAD), run_config(seed=1, **SPREAD), run_config(seed=1, **SPREAD | one_tower))
    ):
        shape = (config.data.crop, config.data.crop, 1)
        params = model.init(config.model, 10, shape, config.seed)
        train.save_start(Weights(config, 10, params, any_pixels(config, 1)), folder / str(number))
    return [folder / str(number) for number in range(3)]


def test_nets_are_averaged_by_their_probabilities(runs: list[Path], held_out, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, source = held_out
    found_data = dataclasses.replace(data.load(run_config().data), evaluation=source)
    monkeypatch.setattr(evaluate.data, "load", lambda config: found_data)
    found = evaluate.evaluate_runs(runs, views=10)
    assert (found["data"], found["split"], found["images"], found["views"]) == ("mnist5k", "test", COUNT, 10)
    each = []
    for workdir in runs:
        run = checkpoint.read_run(workdir)
        each.append(probabilities(run.config, run.params, run.pixels, images, 10))
        assert found["errors"][str(workdir)] == pytest.approx(errors(each[-1], labels), rel=1e-4)
    average = errors(np.mean(each, axis=0), labels)
    assert found["errors"]["average"] == pytest.approx(average, rel=1e-4)
    assert average["loss"] < np.mean([errors(of_net, labels)["loss"] for of_net in each])
    assert min(of_net.std(axis=0).mean() for of_net in each) > 0.01  # the images tell


def test_nets_of_other_images_are_not_averaged(runs: list[Path], tmp_path: Path) -> None:
    config = json.loads((runs[0] / "config.json").read_text())
    config["data"]["image_size"] = 30
    other = tmp_path / "other"
    other.mkdir()
    for name in ("checkpoints", "dataset.json", "pixels.npz"):
        (other / name).symlink_to(runs[0] / name)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"its data.image_size is 30, that of .* 28; only nets that see the same"):
        evaluate.evaluate_runs([runs[0], other])
    with pytest.raises(ValueError, match="is no run's folder"):
        evaluate.evaluate_runs([tmp_path])


def test_ten_views_take_no_more_memory_than_one() -> None:
    """They come one at a time."""
    params = model.shapes(run_config(**TINY).model, 10, (23, 23, 1))
    images = jax.ShapeDtypeStruct((64, 28, 28, 1), np.uint8)
    memory = []
    for views in (1, 10):
        config = run_config(**TINY, **{"eval.views": views})
        predict = evaluate.predictor(config, 10, any_pixels(config, 1), Executor("vmap", 2))
        memory.append(predict.lower(params, images).compile().memory_analysis().temp_size_in_bytes)
    assert memory[1] < 1.2 * memory[0]
