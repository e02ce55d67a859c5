"""What a net says of pictures is what it says of the same pixels elsewhere."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import any_pixels, run_config
from PIL import Image
from test_evaluate import SPREAD

from alexnet_jax import checkpoint, data, evaluate, model, panels, predict, train
from alexnet_jax.checkpoint import Weights
from alexnet_jax.towers import Executor

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def make_run(folder: Path, **changes: object) -> Path:
    config = run_config(**SPREAD | changes)
    params = model.init(config.model, 10, (23, 23, 1), 3)
    train.save_start(Weights(config, 10, params, any_pixels(config, 1)), folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    batches_that_do_not_come_out_even = {"eval.batch_size": 300}
    return make_run(tmp_path_factory.mktemp("runs") / "run", **batches_that_do_not_come_out_even)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three held-out images as files, in folders called as their classes; the last one's is not a class."""
    source = data.load(run_config().data).evaluation
    files = []
    for position, folder in ((10, None), (555, None), (903, "pictures")):
        example = source[position]
        file = tmp_path_factory.mktemp("digits") / (folder or str(example["label"])) / f"{position}.png"
        file.parent.mkdir()
        Image.fromarray(example["image"].squeeze()).save(file)
        files.append(file)
    return files


@pytest.mark.parametrize("views", [None, 10])
def test_predictions_are_those_of_evaluation(run: Path, digits: list[Path], views: int | None) -> None:
    weights, source = checkpoint.read_run(run), data.load(run_config().data).evaluation
    with weights.config.unlocked():
        weights.config.eval.views = views or 1
    executor = Executor("vmap", 2)
    logits = evaluate.predictor(weights.config, 10, weights.known_pixels(), executor)
    images = np.stack([source[position]["image"] for position in (10, 555, 903)])
    expected = np.asarray(jax.nn.softmax(logits(executor.place(weights.params), images)))
    found = predict.predict(run, digits, views=views)
    for prediction, image, probabilities in zip(found, images, expected, strict=True):
        np.testing.assert_array_equal(prediction.image, image)
        assert prediction.classes == [str(position) for position in np.argsort(-probabilities)[:5]]
        np.testing.assert_allclose(prediction.probabilities, np.sort(probabilities)[:-6:-1], rtol=1e-4)
        assert prediction.neighbours == []
    assert [prediction.truth for prediction in found] == ["0", "5", None]


@pytest.mark.parametrize(
    "changes",
    [
        {"train.executor": "pmap"},
        {"train.executor": "vmap"},
        {"train.executor": "vmap", "model.layers.fc8.crosses": False},
        {"model.towers": 1},
    ],
)
def test_features_are_what_the_last_layer_makes_logits_of(changes: dict, digits: list[Path]) -> None:
    config = run_config(**SPREAD | changes)
    towers = config.model.towers
    seen, executor = any_pixels(config, 1), Executor(config.train.executor, towers)
    params = model.init(config.model, 10, (23, 23, 1), 3)
    source = data.load(config.data).evaluation
    images = np.stack([source[position]["image"] for position in (10, 555)])
    run_on = partial(lambda function: function(config, 10, seen, executor)(executor.place(params), images))
    found, logits = run_on(predict.features), run_on(evaluate.predictor)
    assert found.shape == (2, config.model.layers.fc7.features)
    kernel, bias = (np.asarray(params["fc8"][name]) for name in ("kernel", "bias"))
    inputs = [np.asarray(found)] * towers if config.model.layers.fc8.crosses else np.split(found, towers, axis=1)
    of_towers = [inputs[tower] @ kernel[tower] + bias[tower] for tower in range(towers)]
    np.testing.assert_allclose(np.concatenate(of_towers, axis=1), logits, rtol=1e-3, atol=1e-4)


def test_a_held_out_image_is_its_own_nearest_neighbour(run: Path, digits: list[Path]) -> None:
    for prediction, label in zip(predict.predict(run, digits, neighbours=3), ("0", "5", "9"), strict=True):
        assert len(prediction.neighbours) == 3
        image, name = prediction.neighbours[0]
        np.testing.assert_array_equal(image, prediction.image)
        assert name == label
        assert not np.array_equal(prediction.neighbours[1][0], image)


def test_what_fills_up_a_batch_is_no_neighbour(run: Path, tmp_path: Path) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    (prediction,) = predict.predict(run, [tmp_path / "black.png"], neighbours=1)
    assert prediction.neighbours[0][0].any()


def test_the_drawing_has_pictures_bars_and_neighbours() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    known = predict.Prediction(image, "cat", ["dog", "cat"], np.array([0.7, 0.3]), [(image, "cat"), (image, "fox")])
    unknown = known._replace(truth=None)
    axes = panels.figure_4([known, unknown]).axes
    assert len(axes) == 2 * 4
    assert [of.get_title() for of in axes] == ["cat", "", "cat", "fox", "", "", "cat", "fox"]
    assert [bar.get_width() for bar in axes[1].patches] == [0.7, 0.3]
    dog, cat = (bar.get_facecolor() for bar in axes[1].patches)
    assert dog != cat
    assert {bar.get_facecolor() for bar in axes[5].patches} == {dog}
    assert [text.get_text() for text in axes[1].texts] == ["dog", "cat"]


def test_the_command_prints_and_draws(
    run: Path, digits: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "panel.png"
    predict.main([f"--run={run}", "--neighbours=0", f"--output={output}", str(digits[1])])
    (prediction,) = predict.predict(run, digits[1:2])
    printed = capsys.readouterr().out
    for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
        assert f" {name} " in printed
        assert f"{100 * probability:.2f}" in printed
    assert output.read_bytes().startswith(b"\x89PNG")


def test_slips_are_answered_before_anything_is_drawn(run: Path, digits: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    picture = str(digits[0])
    for arguments, message in (
        ([f"--run={run}", str(text)], "text.jpg: is no picture that can be read"),
        ([f"--run={run}", str(tmp_path / "absent.jpg")], "absent.jpg: is no picture that can be read .*No such file"),
        ([f"--run={tmp_path}", picture], "is no run's folder"),
        ([f"--run={run}", "--neighbours=1001", picture], "must be at most the 1000 held-out images"),
        ([f"--run={run}", "--neighbours=-1", picture], "must be 0 or more"),
    ):
        with pytest.raises(SystemExit, match=message):
            predict.main([*arguments, f"--output={tmp_path / 'panel.png'}"])
    assert not (tmp_path / "panel.png").exists()
