"""Weights of any precision and wrapping are read alike; a run starts from the weights that its config names, or not."""

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from alexnet_jax import model, optim, train, weights
from alexnet_jax.checkpoint import TrainedNetwork, load_run, save_run
from alexnet_jax.data import datasets
from alexnet_jax.data.loader import train_batches
from alexnet_jax.run_dir import RunDir, read_json
from support import SHALLOW, TINY, random_statistics, reduced, run_config

CLASSES = 7
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    """Return weights under torchvision's names, which bfloat16 holds without rounding."""
    config = reduced("torchvision")
    generator = np.random.default_rng(0)
    shapes = model.shapes(config.model, CLASSES, (config.data.crop, config.data.crop, 3))["params"]
    params = jax.tree.map(lambda leaf: generator.integers(-8, 8, leaf.shape).astype(np.float32) / 8, shapes)
    network = TrainedNetwork(config, CLASSES, {"params": params})
    encoded = weights._encode(weights.Torchvision(), config, weights.grouped(network))
    return {name: np.ascontiguousarray(array) for name, array in encoded.items()}  # safetensors saves memory as it is


def parameter(tensor: Any) -> Any:
    """Return a tensor as a parameter, which `state_dict` does not, but a dictionary of `named_parameters` has."""
    return importlib.import_module("torch").nn.Parameter(tensor.float())


def assert_weights(network: TrainedNetwork, state_dict: dict[str, np.ndarray]) -> None:
    encoded = weights._encode(weights.Torchvision(), network.config, weights.grouped(network))
    for name, array in encoded.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, state_dict[name])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_weights_of_any_precision_are_read_as_float32(
    tmp_path: Path, state_dict: dict[str, np.ndarray], dtype: Any
) -> None:
    path, arrays = tmp_path / "net.safetensors", {name: array.astype(dtype) for name, array in state_dict.items()}
    safetensors.numpy.save_file(arrays, path)
    assert_weights(weights.read_file(path, reduced("torchvision")), state_dict)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_pth_of_any_precision_is_read_as_float32(
    torch: ModuleType, tmp_path: Path, state_dict: dict[str, np.ndarray], dtype: str
) -> None:
    tensors = {name: torch.tensor(array).to(getattr(torch, dtype)) for name, array in state_dict.items()}
    torch.save(tensors, tmp_path / "net.pth")
    assert_weights(weights.read_file(tmp_path / "net.pth", reduced("torchvision")), state_dict)


@pytest.mark.parametrize(
    ("name", "prefix", "wrap"),
    [
        ("net.pth", "module.", lambda tensors: tensors),  # DataParallel
        ("net.pth.tar", "", lambda tensors: {"epoch": 90, "arch": "alexnet", "state_dict": tensors, "best_acc1": 56.5}),
        ("net.ckpt", "model.", lambda tensors: {"state_dict": tensors, "global_step": 3}),  # Lightning
        ("net.pt", "_orig_mod.module.", lambda tensors: {"model": tensors, "optimizer": {"state": {}}}),
        ("net.tar", "", lambda tensors: {"model_state_dict": tensors, "loss": 0.1}),
        ("net.PTH", "", lambda tensors: {name: parameter(tensor) for name, tensor in tensors.items()}),
    ],
)
def test_usual_wrappings_of_pytorch_are_read(
    torch: ModuleType,
    tmp_path: Path,
    state_dict: dict[str, np.ndarray],
    name: str,
    prefix: str,
    wrap: Callable[[Any], Any],
) -> None:
    tensors = {f"{prefix}{key}": torch.tensor(array) for key, array in state_dict.items()}
    torch.save(wrap(tensors | {f"{prefix}steps": torch.tensor(3)}), tmp_path / name)
    assert_weights(weights.read_file(tmp_path / name, reduced("torchvision")), state_dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda torch: torch.nn.Linear(2, 2), "it holds torch.nn.modules.linear.Linear, and only tensors are loaded"),
        (
            lambda torch: {"state_dict": {}, "args": argparse.Namespace()},
            "it holds argparse.Namespace, and only tensors",
        ),
        (
            lambda torch: {"generator": {}, "discriminator": {}},
            "it holds generator, discriminator, and not the weights of",
        ),
        (lambda torch: [torch.zeros(3)], "it holds a list, and not the weights of one network; save its state_dict"),
        (
            lambda torch: {"features.0.weight": torch.zeros(3)},
            "has no features.0.bias, which the network needs; it has",
        ),
        (b"<html>404 Not Found</html>", "it is damaged, or was not written by torch.save; save or download it again"),
        (b"", "it is damaged, or was not written by torch.save"),
    ],
)
def test_other_content_of_pytorch_is_one_line(torch: ModuleType, tmp_path: Path, content: Any, message: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "net.pth").write_bytes(content)
    else:
        torch.save(content(torch), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=message) as raised:
        weights.read_file(tmp_path / "net.pth", reduced("torchvision"))
    assert "\n" not in str(raised.value)


def test_parallel_features_of_pytorchs_example_are_read(tmp_path: Path, state_dict: dict[str, np.ndarray]) -> None:
    """PyTorch's ImageNet example wraps the features of AlexNet only."""
    arrays = {name.replace("features.", "features.module."): array for name, array in state_dict.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "net.safetensors")
    assert_weights(weights.read_file(tmp_path / "net.safetensors", reduced("torchvision")), state_dict)


def test_two_networks_in_a_file_are_not_mixed(tmp_path: Path, state_dict: dict[str, np.ndarray]) -> None:
    both = state_dict | {f"module.{name}": 0 * array for name, array in state_dict.items()}
    safetensors.numpy.save_file(both, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="it holds several networks"):
        weights.read_file(tmp_path / "net.safetensors", reduced("torchvision"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: np.where(np.arange(array.size) == 3, np.nan, array), "is not finite"),
        (lambda array: array.astype(np.float64) + 1e300, "is not finite"),
        (lambda array: array.astype(np.int8), "is of int8: must be floats"),
    ],
)
def test_weights_that_are_no_finite_floats_are_named(
    tmp_path: Path, state_dict: dict[str, np.ndarray], change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    arrays = state_dict | {"classifier.1.bias": change(state_dict["classifier.1.bias"])}
    safetensors.numpy.save_file(arrays, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=f"net.safetensors: classifier.1.bias {message}"):
        weights.read_file(tmp_path / "net.safetensors", reduced("torchvision"))


def test_class_names_travel_along(tmp_path: Path, state_dict: dict[str, np.ndarray]) -> None:
    names = [f"class {label}" for label in range(CLASSES)]
    config = reduced("torchvision")
    safetensors.numpy.save_file(state_dict, tmp_path / "net.safetensors")
    unnamed = weights.read_file(tmp_path / "net.safetensors", config)
    assert unnamed.class_names is None  # the config is for no dataset whose classes are known
    network = unnamed._replace(class_names=names)
    weights.write_file(tmp_path / "named.safetensors", network)
    read = weights.read_file(tmp_path / "named.safetensors", config)
    save_run(RunDir(tmp_path / "run"), read, train.new_state(config, read.variables), {})
    assert load_run(tmp_path / "run").class_names == names
    assert (read_json(RunDir(tmp_path / "run").dataset_file) or {})["class_names"] == names


def test_imagenets_classes_are_known() -> None:
    names = datasets.imagenet_class_names()
    assert (len(set(names)), names[0], names[-1]) == (1000, "n01440764", "n15075141")


def make_run(folder: Path, config: ConfigDict, class_names: list[str] | None = None, seed: int = 3) -> TrainedNetwork:
    """Write a run that has done no step, with weights of another seed than those that start from it."""
    names = DIGITS if class_names is None else class_names
    variables = model.init(config.model, len(names), (config.data.crop, config.data.crop, 1), seed)
    network = TrainedNetwork(config, len(names), variables, random_statistics(config, 1), names)
    save_run(RunDir(folder), network, train.new_state(config, variables), {})
    return network


def starting_from(source: Path, **changes: Any) -> tuple[ConfigDict, datasets.Dataset]:
    config = run_config(**TINY | {"train.init_from": str(source)} | changes)
    return config, datasets.load(config.data)


def kernels(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    return {layer: arrays["kernel"] for layer, arrays in variables["params"].items()}


def test_run_starts_from_another_runs_weights(tmp_path: Path) -> None:
    source = make_run(tmp_path / "source", run_config(**TINY))
    initial = weights.initial(*starting_from(tmp_path / "source"))
    jax.tree.map(np.testing.assert_array_equal, initial.variables, source.variables)
    assert initial.origin["new_layers"] == []
    assert f"starts from the weights of {tmp_path / 'source'}, fingerprint" in initial.notes[0]


def test_new_head_has_the_seeds_initial_values(tmp_path: Path) -> None:
    source = make_run(tmp_path / "source", run_config(**TINY), ["cat", "dog", "owl"])
    config, dataset = starting_from(tmp_path / "source", **{"train.new_head": True})
    initial = weights.initial(config, dataset)
    actual, theirs = kernels(initial.variables), kernels(source.variables)
    scratch = kernels(model.init(config.model, 10, (23, 23, 1), config.seed))
    for layer in config.model.order:
        np.testing.assert_array_equal(actual[layer], (scratch if layer == "fc8" else theirs)[layer])
    assert initial.origin["new_layers"] == ["fc8"]
    assert "fc8 starts anew" in initial.notes[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog", "owl"], "must have a last layer of the 10 classes of mnist5k, and has 3; give --new_head"),
        ([*DIGITS[:8], "9", "8"], "class 8 was '9', is '8'; give --new_head"),
    ],
)
def test_other_classes_are_refused_with_the_flag(tmp_path: Path, names: list[str], message: str) -> None:
    make_run(tmp_path / "source", run_config(**TINY), names)
    with pytest.raises(ValueError, match=message):
        weights.check_initial(RunDir(tmp_path / "run"), *starting_from(tmp_path / "source"))


def test_run_is_loaded_with_a_config_of_its_network_only(tmp_path: Path) -> None:
    make_run(tmp_path / "run", run_config(**TINY))
    other = run_config(**TINY | {"data.std": (5.0,)})
    assert weights.load_network(tmp_path / "run", other).config.data.std == (5.0,)
    for changes in ({"model.layers.fc6.features": 8}, {"model.order": ("conv1", "fc7", "fc8")}):
        with pytest.raises(ValueError, match=r"run: must fit the network, and .* has .*; give the config of its arch"):
            weights.load_network(tmp_path / "run", run_config(**TINY | changes))
    with pytest.raises(ValueError, match=r"data.image_size=32: must be 28 pixels, as the mean image of .*run; "):
        weights.load_network(tmp_path / "run", run_config(**TINY | {"data.image_size": 32}))


def test_other_layers_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "source", run_config(**TINY))
    for changes in ({"model.layers.conv2.features": 12}, {"model.layers.conv2.then": ("batch_norm", "activation")}):
        with pytest.raises(ValueError, match=r"must fit the network, and conv2\w* has .*; give the config of its arch"):
            weights.check_initial(RunDir(tmp_path / "run"), *starting_from(tmp_path / "source", **changes))
    with pytest.raises(ValueError, match=r"init_from=.*nowhere: must be a run's folder or a file of weights"):
        weights.check_initial(RunDir(tmp_path / "run"), *starting_from(tmp_path / "nowhere"))


def test_one_tower_starts_from_two_that_see_each_other(tmp_path: Path) -> None:
    sees_all = {f"model.layers.{layer}.sees": "all" for layer in ("conv2", "conv4", "conv5")}
    source = make_run(tmp_path / "source", run_config(**TINY | sees_all))
    one = weights.initial(*starting_from(tmp_path / "source", **sees_all | {"model.towers": 1}))
    assert kernels(one.variables)["conv2"].shape == (1, 5, 5, 8, 8)
    np.testing.assert_array_equal(
        kernels(one.variables)["conv2"][0], np.concatenate(list(kernels(source.variables)["conv2"]), axis=-1)
    )


def test_other_input_is_logged(tmp_path: Path) -> None:
    make_run(tmp_path / "source", run_config(**TINY | {"data.std": (2.0,)}))
    _, note = weights.initial(*starting_from(tmp_path / "source")).notes
    assert "their input was pixels minus (33.4,), divided by (2.0,); this run's is pixels minus (33.4,)" in note


def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run stop before its first step."""

    def stop(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(train, "_dispatch", stop)


def test_run_remembers_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that have changed are refused; once a run has started, they may be gone."""
    source, run = tmp_path / "source", RunDir(tmp_path / "run")
    make_run(source, run_config(**TINY))
    config, dataset = starting_from(source)
    without_training(monkeypatch)
    with pytest.raises(InterruptedError):
        train.train_and_evaluate(config, run.path)
    assert "starts from the weights of" in run.log_file.read_text()
    weights.check_initial(run, config, dataset)
    source.rename(tmp_path / "moved")
    weights.check_initial(run, config, dataset)
    make_run(source, run_config(**TINY), seed=4)
    with pytest.raises(ValueError, match="run holds a run from other weights of"):
        train.train_and_evaluate(config, run.path)
    with pytest.raises(ValueError, match=r"train.init_from was '.*source', is ''"):
        train.train_and_evaluate(run_config(**TINY), run.path)


@pytest.mark.slow
def test_run_trains_the_weights_that_it_starts_from(tmp_path: Path) -> None:
    """At a learning rate of almost 0 they are those of the last checkpoint."""
    source = make_run(tmp_path / "source", run_config(**SHALLOW))
    changes = SHALLOW | {"train.epochs": 0.003, "optim.learning_rate": 1e-9}
    config, _ = starting_from(tmp_path / "source", **changes)
    train.train_and_evaluate(config, tmp_path / "run")
    trained = load_run(tmp_path / "run").variables
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), trained, source.variables)


@pytest.mark.slow
def test_layer_frozen_at_epoch_0_keeps_the_weights_that_it_starts_from(tmp_path: Path) -> None:
    source = make_run(tmp_path / "source", run_config(**SHALLOW))
    frozen = ("conv1", "conv3")
    changes = SHALLOW | {f"model.layers.{layer}.freeze_epoch": 0.0 for layer in frozen}
    config, dataset = starting_from(tmp_path / "source", **changes | {"optim.weight_decay": 0.1})
    setup = train.open_run(config)
    initial = weights.initial(config, dataset)
    state = setup.executor.place(train.new_state(config, initial.variables))
    step, statistics = train.make_train_step(setup), random_statistics(config, 1)
    for number, batch in enumerate(train_batches(dataset.train, config, seed=0, start=0, stop=3), 1):
        state = step(state, batch, statistics, np.uint32(0), np.int32(number), optim.peak_learning_rate(config.optim))
    before, after = source.variables["params"], jax.device_get(state.params)
    unchanged = {
        layer for layer in before if all((before[layer][part] == after[layer][part]).all() for part in before[layer])
    }
    assert unchanged == set(frozen)
