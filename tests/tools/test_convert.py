"""Weights survive the round trip through other programs' files bit-identically, and files run no code."""

import argparse
import os
import pickle
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.export
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from alexnet_jax import config as config_lib
from alexnet_jax import model, train, weights
from alexnet_jax.checkpoint import TrainedNetwork, load_run
from alexnet_jax.data import augment
from alexnet_jax.parallel import TOWER
from alexnet_jax.run_dir import RunDir, read_json
from alexnet_jax.tools import convert
from support import SHALLOW, assert_close, command, random_statistics, reduced, run_config, run_script

CLASSES = 7  # odd: the last layer is padded


def random_network(name: str, **changes: Any) -> TrainedNetwork:
    """Return a reduced network with its initial weights, and zeros as the last layer's padding."""
    config = reduced(name, **changes)
    variables = model.init(config.model, CLASSES, (config.data.crop, config.data.crop, 3), 0)
    network = TrainedNetwork(config, CLASSES, variables)
    return weights.from_grouped(config, weights.grouped(network))


@pytest.fixture(scope="module")
def caffe() -> TrainedNetwork:
    return random_network("caffe_alexnet", **{"data.mean": (120.0, 110.0, 100.0), "data.std": (2.0, 3.0, 4.0)})


def random_images(config: ConfigDict, batch: int = 3) -> np.ndarray:
    size = config.data.crop
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3)).astype(np.uint8)


def compute_logits(network: TrainedNetwork, images: np.ndarray) -> jax.Array:
    return jax.jit(convert.forward(network))(images)


def assert_equal(actual: TrainedNetwork, expected: TrainedNetwork) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual.variables, expected.variables)
    assert actual.classes == expected.classes
    for field in ("mean", "std"):
        assert actual.config.data[field] == expected.config.data[field]


def test_grouped_and_back(caffe: TrainedNetwork) -> None:
    params = weights.grouped(caffe)
    assert params["conv2"]["kernel"].shape == (5, 5, 4, 16)  # as flax.linen.Conv(16, (5, 5), feature_group_count=2)
    assert params["fc8"]["kernel"].shape == (16, CLASSES)
    assert caffe.variables["params"]["fc8"]["kernel"].shape == (2, 16, 4)
    assert_equal(weights.from_grouped(caffe.config, params), caffe)


@pytest.mark.parametrize("name", ["net.npy", "net.safetensors"])
def test_round_trip_is_bit_identical_and_keeps_mean_and_scale(caffe: TrainedNetwork, tmp_path: Path, name: str) -> None:
    weights.write_file(tmp_path / name, caffe)
    config = reduced("caffe_alexnet")
    assert config.data.mean != caffe.config.data.mean
    assert_equal(weights.read_file(tmp_path / name, config), caffe)
    assert {path.name for path in tmp_path.iterdir()} == {name, *(["net.npy.json"] if name == "net.npy" else [])}


@pytest.mark.parametrize("name", ["net.npy", "net.safetensors"])
def test_round_trip_keeps_the_mean_image(tmp_path: Path, name: str) -> None:
    network = random_network("caffe_alexnet", **{"data.subtract": "central_mean_image"})
    statistics = random_statistics(network.config)
    network = network._replace(statistics=statistics)
    weights.write_file(tmp_path / name, network)
    read = weights.read_file(tmp_path / name, reduced("caffe_alexnet"))
    assert_equal(read, network)
    assert read.config.data.subtract == "central_mean_image"
    assert read.statistics is not None
    for array, expected in zip(read.statistics, statistics, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.slow
def test_forward_subtracts_the_centre_of_the_mean_image() -> None:
    network = random_network("caffe_alexnet", **{"data.subtract": "central_mean_image"})
    config, statistics = network.config, random_statistics(network.config)
    images = random_images(config)
    border = (config.data.image_size - config.data.crop) // 2
    uncropped = np.pad(images, [(0, 0), (border, border), (border, border), (0, 0)])
    (centre,) = augment.evaluation_views(1, config.data.image_size, config.data.crop)
    inputs = augment.inputs(uncropped, centre, config.data, statistics)
    alexnet = model.AlexNet(config.model, CLASSES)
    towers = jax.vmap(lambda tower: alexnet.apply(tower, inputs, train=False), axis_name=TOWER, out_axes=None)
    logits = compute_logits(network._replace(statistics=statistics), images)
    assert_close(logits, jax.jit(towers)(network.variables), 1e-5)


def test_unknown_mean_raises(tmp_path: Path) -> None:
    network = random_network("caffe_alexnet", **{"data.subtract": "mean_image"})
    for write in (lambda: weights.write_file(tmp_path / "net.npy", network), lambda: convert.export(network)):
        with pytest.raises(ValueError, match=r"data.subtract=mean_image: .* give --config.data.subtract=mean"):
            write()
    assert not list(tmp_path.iterdir())


def write_published(path: Path, network: TrainedNetwork, form: type, protocol: int) -> None:
    """Write a file as others publish it: a dictionary of lists or of dictionaries, BGR, perhaps by Python 2."""
    layers = {}
    for layer, arrays in weights.grouped(network).items():
        kernel = arrays["kernel"][:, :, ::-1] if layer == "conv1" else arrays["kernel"]
        pair = [np.ascontiguousarray(kernel), np.ascontiguousarray(arrays["bias"])]
        layers[layer] = pair if form is list else dict(zip(("weights", "biases"), pair, strict=True))
    content = np.empty((), dtype=object)
    content[()] = layers
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(content, file, protocol=protocol)


@pytest.mark.parametrize("form", [list, dict])
@pytest.mark.parametrize("protocol", [2, 5])
def test_both_forms_of_published_weights_are_read(
    caffe: TrainedNetwork, tmp_path: Path, form: type, protocol: int
) -> None:
    write_published(tmp_path / "net.npy", caffe, form, protocol)
    read = weights.read_file(tmp_path / "net.npy", reduced("caffe_alexnet"))
    jax.tree.map(np.testing.assert_array_equal, read.variables, caffe.variables)
    assert read.config.data.mean == (122.7, 116.7, 104.0)  # there is no net.npy.json: the config's


def test_npy_is_readable_with_numpy(caffe: TrainedNetwork, tmp_path: Path) -> None:
    weights.write_file(tmp_path / "net.npy", caffe)
    layers = np.load(tmp_path / "net.npy", allow_pickle=True, encoding="latin1").item()
    assert list(layers) == list(caffe.config.model.order)
    np.testing.assert_array_equal(layers["conv1"][0][:, :, ::-1], weights.grouped(caffe)["conv1"]["kernel"])
    metadata = read_json(tmp_path / "net.npy.json")
    assert metadata is not None
    assert (metadata["channels"], metadata["mean"], metadata["std"]) == ("BGR", [100, 110, 120], [4, 3, 2])


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '{"std": "4"}', '{"mean": [1, "2"]}', '{"mean": {"red": 1}}', '{"mean": "net.npy.statistics.npz"}'],
)
def test_wrong_metadata_beside_a_npy_are_named(caffe: TrainedNetwork, tmp_path: Path, content: str) -> None:
    convert.write_file(tmp_path / "net.npy", caffe)
    (tmp_path / "net.npy.json").write_text(content)
    with pytest.raises(ValueError, match=r"net.npy.*must be"):
        weights.read_file(tmp_path / "net.npy", caffe.config)


class MakesFolder:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_npy_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    layers = np.array({"conv1": [MakesFolder(tmp_path / "ran"), 0]}, dtype=object)
    np.save(tmp_path / "evil.npy", layers, allow_pickle=True)
    with pytest.raises(ValueError, match=r"evil.npy: cannot be read: it holds posix.mkdir, and only arrays"):
        weights.read_file(tmp_path / "evil.npy", reduced("caffe_alexnet"))
    assert not (tmp_path / "ran").exists()


def test_pth_that_would_run_code_is_refused_and_runs_none(torch: ModuleType, tmp_path: Path) -> None:
    torch.save({"features.0.weight": MakesFolder(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(
        ValueError, match=r"evil.pth: cannot be read: it holds (posix|nt).mkdir, and only tensors are loaded"
    ):
        weights.read_file(tmp_path / "evil.pth", reduced("torchvision"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_pth_without_pytorch_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "net.pth").touch()
    script = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from support import reduced
from alexnet_jax import weights
weights.read_file(Path({str(tmp_path / "net.pth")!r}), reduced("torchvision"))
"""
    done = run_script(script, HOME=str(tmp_path))
    assert "net.pth: cannot be read: PyTorch reads .pth files; pip install torch" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not numpy", "it is not a .npy file"),
        (b"", "it is not a .npy file"),
        (np.zeros(3), "it holds an array of float64"),
        (np.array([1], dtype=object), "not a dictionary of layers"),
        (np.array({"conv1": 3}, dtype=object), "cannot be read: "),
    ],
)
def test_npy_with_other_content_raises(tmp_path: Path, content: bytes | np.ndarray, message: str) -> None:
    path = tmp_path / "net.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        weights.read_file(path, reduced("caffe_alexnet"))


@pytest.mark.parametrize("name", ["net.npy", "net.safetensors"])
def test_truncated_file_raises(caffe: TrainedNetwork, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    weights.write_file(path, caffe)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        weights.read_file(path, reduced("caffe_alexnet"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "net.npy",
            {"model.layers.conv2.features": 32},
            r"conv2.weights has shape \(5, 5, 4, 16\), and conv2 needs \(5, 5, 4, 32\)",
        ),
        (
            "net.safetensors",
            {"model.layers.conv3.sees": "own"},
            r"features.6.weight has shape \(16, 16, 3, 3\), and conv3 needs \(16, 8, 3, 3\)",
        ),
        ("net.safetensors", {"data.crop": 150}, r"classifier.1.weight has shape \(16, 32\), and fc6 needs"),
    ],
)
def test_file_of_another_architecture_raises_and_names_the_first_array(
    caffe: TrainedNetwork, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    weights.write_file(tmp_path / name, caffe)
    with pytest.raises(ValueError, match=message):
        weights.read_file(tmp_path / name, reduced("caffe_alexnet", **changes))


def test_missing_layer_raises(caffe: TrainedNetwork, tmp_path: Path) -> None:
    layers = np.array({"conv1": [np.zeros(1), np.zeros(1)]}, dtype=object)
    np.save(tmp_path / "net.npy", layers, allow_pickle=True)
    with pytest.raises(ValueError, match=r"has no conv2.weights, which the network needs; it has conv1.weights, conv1"):
        weights.read_file(tmp_path / "net.npy", caffe.config)


def test_network_without_torchvisions_layers_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be five conv and three dense layers, as torchvision's"):
        weights.write_file(tmp_path / "net.safetensors", random_network("cifar_19pct"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def batch_norm() -> TrainedNetwork:
    """Return a network with batch normalisation and random running averages."""
    config = reduced("caffe_alexnet", **{"model.layers.conv2.then": ("batch_norm", "activation", "max_pool")})
    variables = model.init(config.model, CLASSES, (config.data.crop, config.data.crop, 3), 0)
    generator = np.random.default_rng(0)
    averages = jax.tree.map(
        lambda leaf: generator.uniform(0.5, 2, leaf.shape).astype(np.float32), variables["batch_stats"]
    )
    return TrainedNetwork(config, CLASSES, variables | {"batch_stats": averages})


@pytest.mark.parametrize("name", ["net.npy", "net.safetensors"])
def test_batch_normalisation_does_not_fit_other_layouts(batch_norm: TrainedNetwork, tmp_path: Path, name: str) -> None:
    message = r"conv2_batch_norm=\['bias', 'scale'\]: must be a kernel and a bias .*; export the network as .stablehlo"
    with pytest.raises(ValueError, match=message):
        weights.write_file(tmp_path / name, batch_norm)
    assert not list(tmp_path.iterdir())
    weights.write_file(tmp_path / name, random_network("caffe_alexnet"))
    with pytest.raises(ValueError, match=message):
        weights.read_file(tmp_path / name, batch_norm.config)


@pytest.mark.slow
def test_stablehlo_has_batch_normalisation(batch_norm: TrainedNetwork) -> None:
    exported = jax.export.deserialize(bytearray(convert.export(batch_norm)))
    images = random_images(batch_norm.config)
    logits = exported.call(images)
    assert_close(logits, compute_logits(batch_norm, images), 1e-5)
    zeros = jax.tree.map(np.zeros_like, batch_norm.variables["batch_stats"])
    others = compute_logits(batch_norm._replace(variables=batch_norm.variables | {"batch_stats": zeros}), images)
    assert np.abs(others - logits).max() > 0.01 * np.abs(logits).max()  # the averages matter


@pytest.mark.slow
def test_stablehlo_is_the_same_function_on_one_device_for_any_batch(caffe: TrainedNetwork) -> None:
    exported = jax.export.deserialize(bytearray(convert.export(caffe)))
    assert exported.nr_devices == 1
    assert "feature_group_count = 2" in exported.mlir_module()
    for batch in (1, 3):
        images = random_images(caffe.config, batch)
        logits = exported.call(images)
        assert logits.shape == (batch, CLASSES)
        assert_close(logits, compute_logits(caffe, images), 1e-5)


def torchvision_alexnet(torch: ModuleType, config: ConfigDict) -> Any:
    """Return torchvision's own network, as in its source, with the config's widths."""
    nn = torch.nn
    widths = [config.model.layers[layer].features for layer in config.model.order[:-1]]

    class AlexNet(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, widths[0], kernel_size=11, stride=4, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(kernel_size=3, stride=2),
                nn.Conv2d(widths[0], widths[1], kernel_size=5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(kernel_size=3, stride=2),
                nn.Conv2d(widths[1], widths[2], kernel_size=3, padding=1),
                nn.ReLU(),
                nn.Conv2d(widths[2], widths[3], kernel_size=3, padding=1),
                nn.ReLU(),
                nn.Conv2d(widths[3], widths[4], kernel_size=3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(kernel_size=3, stride=2),
            )
            self.classifier = nn.Sequential(
                nn.Dropout(),
                nn.Linear(widths[4] * 2 * 2, widths[5]),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(widths[5], widths[6]),
                nn.ReLU(),
                nn.Linear(widths[6], CLASSES),
            )

        def forward(self, x: Any) -> Any:
            return self.classifier(torch.flatten(self.features(x), 1))

    return AlexNet().eval()


@pytest.mark.parametrize("legacy", [False, True])
def test_torchvisions_network_gives_its_logits_and_goes_back(torch: ModuleType, tmp_path: Path, legacy: bool) -> None:
    config = reduced("torchvision")
    torch.manual_seed(0)
    network = torchvision_alexnet(torch, config)
    for parameter in network.parameters():
        parameter.data *= 3  # logits then depend on the image
    torch.save(network.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=not legacy)
    read = weights.read_file(tmp_path / "net.pth", config)

    images = random_images(config)
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = network((torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / std).detach().numpy()
    assert np.ptp(expected, axis=0).max() > 0.01
    assert_close(compute_logits(read, images), expected, 1e-5)

    weights.write_file(tmp_path / "back.safetensors", read)
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    assert set(back) == set(network.state_dict())
    for name, tensor in network.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor.numpy())


def test_caffes_weights_give_caffes_logits(torch: ModuleType, caffe: TrainedNetwork, tmp_path: Path) -> None:
    """With blue, green and red pixels, the file's own kernels, and normalisation across the groups."""
    import torch_alexnet  # imports PyTorch

    weights.write_file(tmp_path / "net.npy", caffe)
    layers = np.load(tmp_path / "net.npy", allow_pickle=True).item()
    params = {layer: {"kernel": kernel, "bias": bias} for layer, (kernel, bias) in layers.items()}
    images = random_images(caffe.config)
    mean, std = np.array([100, 110, 120], np.float32), np.array([4, 3, 2], np.float32)
    bgr = (images[..., ::-1].astype(np.float32) - mean) / std
    logits = torch_alexnet.forward(caffe.config.model, torch_alexnet.tensors(params), torch.tensor(bgr.copy()))
    expected = logits.detach().numpy()
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max()
    assert_close(compute_logits(caffe, images), expected, 2e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of twelve steps on two devices."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.train_and_evaluate(run_config(**SHALLOW), folder)
    return folder


@pytest.mark.slow
def test_run_converted_to_a_file_and_back_resumes_training(trained: Path, tmp_path: Path) -> None:
    first, config, again = load_run(trained), run_config(**SHALLOW), RunDir(tmp_path / "again")
    convert.convert(trained, tmp_path / "net.npy")
    convert.convert(tmp_path / "net.npy", again.path, config)
    assert_equal(load_run(again.path), first)
    shutil.rmtree(again.path)
    config.optim.learning_rate = 1e-9
    convert.convert(tmp_path / "net.npy", again.path, config)
    before, after = RunDir(trained).result, train.train_and_evaluate(config, again.path)
    assert before is not None
    assert "from step 0 to 12" in again.log_file.read_text()
    assert abs(after["eval/loss"] - before["eval/loss"]) < 1e-6
    with pytest.raises(ValueError, match="again: must be a new folder"):
        convert.convert(tmp_path / "net.npy", again.path, config)


@pytest.mark.slow
def test_checkpoint_moves_between_two_devices_and_one(trained: Path, tmp_path: Path) -> None:
    """A run of two devices resumes on one, and back; the tower axis stays the same."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained, run.path)

    def extend(epochs: float) -> ConfigDict:
        """Make the run one that is unfinished."""
        run.result_file.unlink()
        run.config_file.unlink()
        return run_config(**SHALLOW | {"train.epochs": epochs})

    config = extend(0.014)
    script = f"""
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 1)
from alexnet_jax import config, train
from alexnet_jax.tools import convert
convert.convert(Path({str(trained)!r}), Path({str(tmp_path / "one.npy")!r}))
train.train_and_evaluate(config.from_json({config_lib.as_json(config)!r}), {str(run.path)!r})
"""
    done = run_script(script, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    convert.convert(trained, tmp_path / "two.npy")
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()
    assert "vmap on cpu:0: from step 12 to 14" in run.log_file.read_text().lower()
    train.train_and_evaluate(extend(0.016), run.path)
    assert "pmap on cpu:0, cpu:1: from step 14 to 16" in run.log_file.read_text().lower()


@pytest.mark.slow
def test_command_converts_and_prints_the_normalisation(trained: Path, tmp_path: Path) -> None:
    done = command("alexnet_jax", "convert", str(trained), str(tmp_path / "net.stablehlo"))
    assert done.returncode == 0, done.stderr
    assert "23x23 pixels of 0 to 255, minus (33.4,), divided by (79.0,)" in done.stdout
    exported = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
    images = np.random.default_rng(0).integers(0, 256, (2, 23, 23, 1)).astype(np.uint8)
    logits = compute_logits(load_run(trained), images)
    np.testing.assert_allclose(exported.call(images), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("here.npy", "there", "must come with its architecture; give --config=configs/networks/"),
        ("folder", "there.npy", "must be a run's folder"),
        ("here.npy", "there.pth", "must not be .pth"),
        ("here.npy", "nowhere/there.npy", "must be in an existing folder"),
    ],
)
def test_bad_input_raises_before_anything_is_written(tmp_path: Path, source: str, target: str, message: str) -> None:
    (tmp_path / "here.npy").touch()
    (tmp_path / "folder").mkdir()
    arguments = argparse.Namespace(source=tmp_path / source, target=tmp_path / target, config=None)
    with pytest.raises(ValueError, match=message):
        convert.main(arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"here.npy", "folder"}


@pytest.mark.slow
def test_damaged_checkpoint_is_not_converted(trained: Path, tmp_path: Path) -> None:
    """In a process of its own: Orbax abandons its other reads, and Python warns whenever it notices."""
    run, target = RunDir(tmp_path / "run"), tmp_path / "net.npy"
    shutil.copytree(trained, run.path)
    arrays = max(run.checkpoints.glob("12/state/**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(arrays.read_bytes())
    for position in range(500, len(content), 1000):  # several bytes: Orbax leaves parts of the file unused
        content[position] ^= 1
    arrays.write_bytes(content)
    done = command("alexnet_jax", "convert", str(run.path), str(target))
    assert done.returncode == 1
    assert f"{run.checkpoints / '12'}: is damaged" in done.stderr
    assert not target.exists()
