"""Predictions for image files equal those of evaluation for the same pixels; neighbours are nearest in the features."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import evaluate, model, train, weights
from alexnet_jax.checkpoint import TrainedNetwork, load_run, save_run
from alexnet_jax.data import datasets
from alexnet_jax.parallel import Executor
from alexnet_jax.run_dir import RunDir, read_json, write_json
from alexnet_jax.tools import predict
from support import TINY, random_statistics, run_config

# Initial weights with which predictions differ between images.
SPREAD: dict[str, Any] = TINY | {
    **{f"model.layers.{name}.weight_std": 0.3 for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")},
    "model.layers.fc8.weight_std": 1.0,
    "data.subtract": "mean_image",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = run_config(**SPREAD | {"eval.batch_size": 300})  # does not divide the 1,000 held-out images
    variables = model.init(config.model, 10, (23, 23, 1), 3)
    network = TrainedNetwork(config, 10, variables, random_statistics(config, 1))
    save_run(RunDir(folder), network, train.new_state(config, variables), {})
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write three held-out images as files in folders named after their classes, the last one in another folder."""
    source = datasets.load(run_config().data).evaluation
    files = []
    for position, folder in ((10, None), (555, None), (903, "images")):
        example = source[position]
        file = tmp_path_factory.mktemp("digits") / (folder or str(example["label"])) / f"{position}.png"
        file.parent.mkdir()
        Image.fromarray(example["image"].squeeze()).save(file)
        files.append(file)
    return files


def run_verb(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    predict.main(parser.parse_args(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("views", [None, 10])
def test_predictions_equal_those_of_evaluation(run: Path, digits: list[Path], views: int | None) -> None:
    network, source = load_run(run), datasets.load(run_config().data).evaluation
    config, executor = network.config.copy_and_resolve_references(), Executor("vmap", 2)
    config.eval.views = views or 1
    images = np.stack([source[position]["image"] for position in (10, 555, 903)])
    predictor = evaluate.make_predictor(config, 10, executor)
    logits = predictor(executor.place(network.variables), network.known_statistics(), images)
    expected = np.asarray(jax.nn.softmax(logits))
    predictions = predict.predict(run, digits, views=views)
    for prediction, image, probabilities in zip(predictions, images, expected, strict=True):
        np.testing.assert_array_equal(prediction.image, image)
        assert prediction.classes == [str(label) for label in np.argsort(-probabilities)[:5]]
        np.testing.assert_allclose(prediction.probabilities, np.sort(probabilities)[:-6:-1], rtol=1e-4)
        assert prediction.neighbours == []
    assert [prediction.truth for prediction in predictions] == ["0", "5", None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "sees"),
    [
        (Executor("pmap", 2), "all"),
        (Executor("vmap", 2), "own"),
        (Executor("shard_map", 1, shards=2), "all"),
    ],
)
def test_features_are_the_inputs_of_the_last_layer(executor: Executor, sees: str) -> None:
    towers = executor.towers
    config = run_config(**SPREAD | {"model.towers": towers, "model.layers.fc8.sees": sees})
    variables, statistics = model.init(config.model, 10, (23, 23, 1), 3), random_statistics(config, 1)
    source = datasets.load(config.data).evaluation
    images = np.stack([source[position]["image"] for position in (10, 555, 903)])
    features, logits = (
        np.asarray(make(config, 10, executor)(executor.place(variables), statistics, images))
        for make in (predict.features, evaluate.make_predictor)
    )
    assert features.shape == (3, config.model.layers.fc7.features)
    kernel, bias = (variables["params"]["fc8"][name] for name in ("kernel", "bias"))
    inputs = [features] * towers if sees == "all" else np.split(features, towers, axis=1)
    of_towers = [inputs[tower] @ kernel[tower] + bias[tower] for tower in range(towers)]
    np.testing.assert_allclose(np.concatenate(of_towers, axis=1), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_held_out_image_is_its_own_nearest_neighbour(run: Path, digits: list[Path]) -> None:
    for prediction, label in zip(predict.predict(run, digits, neighbours=3), ("0", "5", "9"), strict=True):
        assert len(prediction.neighbours) == 3
        image, name = prediction.neighbours[0]
        np.testing.assert_array_equal(image, prediction.image)
        assert name == label
        assert not np.array_equal(prediction.neighbours[1][0], image)


@pytest.mark.slow
def test_padding_of_a_batch_is_not_a_neighbour(run: Path, tmp_path: Path) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    (prediction,) = predict.predict(run, [tmp_path / "black.png"], neighbours=1)
    assert prediction.neighbours[0][0].any()


def test_verb_prints_and_draws(
    run: Path, digits: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "figure.png"
    run_verb(f"--run={run}", "--neighbours=0", f"--output={output}", str(digits[1]))
    (prediction,) = predict.predict(run, digits[1:2])
    printed = capsys.readouterr().out
    for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
        assert f" {name} " in printed
        assert f"{100 * probability:.2f}" in printed
    assert output.read_bytes().startswith(b"\x89PNG")


def test_held_out_images_are_left_out_where_they_are_not_there(
    run: Path, digits: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with converted weights; they are asked for, or not."""
    converted = RunDir(shutil.copytree(run, tmp_path / "run"))
    config = read_json(converted.config_file)
    assert config is not None
    config["data"] |= {"name": "unprepared", "data_dir": str(tmp_path)}
    write_json(converted.config_file, config)
    arguments = (f"--run={converted.path}", f"--output={tmp_path / 'figure.png'}", str(digits[1]))
    run_verb(*arguments)
    printed = capsys.readouterr()
    assert "probability, %" in printed.out
    assert printed.err.startswith("nearest held-out images are left out: data.name=unprepared: must be")
    assert printed.err.count("\n") == 1
    with pytest.raises(ValueError, match=r"data.name=unprepared"):
        run_verb(*arguments, "--neighbours=2")


@pytest.mark.slow
def test_file_of_weights_predicts_as_its_run(run: Path, digits: list[Path], tmp_path: Path) -> None:
    network = load_run(run)
    weights.write_file(tmp_path / "network.safetensors", network)
    from_file, from_run = (
        predict.predict(source, digits, config=config, neighbours=2)
        for source, config in ((tmp_path / "network.safetensors", network.config), (run, None))
    )
    for ours, expected in zip(from_file, from_run, strict=True):
        assert ours.classes == expected.classes
        np.testing.assert_allclose(ours.probabilities, expected.probabilities, rtol=1e-6)
        assert [label for _, label in ours.neighbours] == [label for _, label in expected.neighbours]
    with pytest.raises(ValueError, match=r"network.safetensors: must come with its architecture; give --config="):
        run_verb(f"--run={tmp_path / 'network.safetensors'}", str(digits[0]))


@pytest.mark.slow
def test_neighbours_have_the_names_of_their_dataset(
    run: Path, digits: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the network has other names for its classes, or none, as a file of weights may."""
    network = load_run(run)._replace(class_names=list("abcdefghij"))
    monkeypatch.setattr(weights, "load_network", lambda source, config: network)
    (prediction,) = predict.predict(run, digits[1:2], neighbours=1)
    assert set(prediction.classes) <= set("abcdefghij")
    assert [name for _, name in prediction.neighbours] == ["5"]


def test_class_names_are_no_markup(
    run: Path, digits: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    named = shutil.copytree(run, tmp_path / "run")
    names = ["[bold]", "[/red]", ":smile:", "$\\frac$", "<b>", "_x", "[link]", "{}", "%s", "\\"]
    write_json(RunDir(named).dataset_file, {"classes": 10, "class_names": names})
    run_verb(f"--run={named}", "--neighbours=0", f"--output={tmp_path / 'figure.png'}", str(digits[1]))
    (prediction,) = predict.predict(named, digits[1:2])
    assert set(prediction.classes) <= set(names)
    printed = capsys.readouterr().out
    for name in prediction.classes:
        assert f" {name} " in printed


def test_figure_has_the_format_of_its_name(run: Path, digits: list[Path], tmp_path: Path) -> None:
    for name, start in (("figure.JPG", b"\xff\xd8"), ("figure.svg", b"<?xml"), ("figure.png", b"\x89PNG")):
        run_verb(f"--run={run}", "--neighbours=0", f"--output={tmp_path / name}", str(digits[1]))
        assert (tmp_path / name).read_bytes().startswith(start)


def test_figure_that_cannot_be_written_costs_no_table(
    run: Path, digits: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run_verb(f"--run={run}", "--neighbours=0", f"--output={tmp_path / 'file' / 'figure.png'}", str(digits[1]))
    assert "probability, %" in capsys.readouterr().out


def test_bad_input_raises_before_anything_is_drawn(run: Path, digits: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    image = str(digits[0])
    for arguments, message in (
        ([f"--run={run}", str(text)], "text.jpg: cannot be read as an image"),
        ([f"--run={run}", str(tmp_path / "absent.jpg")], "absent.jpg: cannot be read as an image .*No such file"),
        ([f"--run={tmp_path}", image], "must be a run's folder"),
        ([f"--run={run}", "--neighbours=1001", image], "must be at most the 1000 held-out images"),
        ([f"--run={run}", "--neighbours=-1", image], "--neighbours=-1: must be 0 or more"),
        ([f"--run={run}", image, f"--output={tmp_path / 'figure.txt'}"], r"figure.txt: must end in one of .png, .jpg"),
    ):
        with pytest.raises(ValueError, match=message):
            run_verb(f"--output={tmp_path / 'figure.png'}", *arguments)
    assert not list(tmp_path.glob("figure.*"))
