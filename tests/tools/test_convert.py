"""Weights move to other people's files and back bit-equal, give the same logits there, and run no code."""

import os
import pickle
import shutil
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from conftest import TINY, any_pixels, command, reduced, run_config, run_script
from ml_collections import ConfigDict

from alexnet_jax import augment, checkpoint, model, records, train, weights
from alexnet_jax import config as config_lib
from alexnet_jax.towers import TOWER

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CLASSES = 7  # odd: the last layer is filled up


def fresh(name: str, **changes) -> weights.Weights:
    config = reduced(name, **changes)
    shape = (config.data.crop, config.data.crop, 3)
    params = model.init(config.model, CLASSES, shape, 0)
    ours = weights.Weights(config, CLASSES, params)
    return weights.from_grouped(config, weights.grouped(ours))  # what fills up is zero


@pytest.fixture(scope="module")
def caffe() -> weights.Weights:
    return fresh("caffe_alexnet", **{"data.mean": (120.0, 110.0, 100.0), "data.std": (2.0, 3.0, 4.0)})


def pixels(config, batch: int = 3) -> np.ndarray:
    size = config.data.crop
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3)).astype(np.uint8)


def assert_same(one: weights.Weights, other: weights.Weights) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert one.classes == other.classes
    assert (one.config.data.mean, one.config.data.std) == (other.config.data.mean, other.config.data.std)


@pytest.mark.parametrize("name", ["net.npy", "net.safetensors"])
def test_a_mean_image_travels_beside_the_weights(tmp_path: Path, name: str) -> None:
    ours = fresh("caffe_alexnet", **{"data.subtract": "central_mean_image"})
    ours = ours._replace(pixels=any_pixels(ours.config))
    weights.write_file(tmp_path / name, ours)
    read = weights.read_file(tmp_path / name, reduced("caffe_alexnet"))
    assert_same(read, ours)
    assert read.config.data.subtract == "central_mean_image"
    for one, other in zip(read.pixels, ours.pixels, strict=True):
        np.testing.assert_array_equal(one, other)
    images = pixels(ours.config)
    np.testing.assert_array_equal(weights.forward(read)(images), weights.forward(ours)(images))
    # The net sees the centre of a run's images, less the centre of the mean.
    border = (ours.config.data.image_size - ours.config.data.crop) // 2
    whole = np.pad(images, [(0, 0), (border, border), (border, border), (0, 0)])
    (view,) = augment.evaluation_views(1, ours.config.data.image_size, ours.config.data.crop)
    seen = augment.inputs(whole, view, ours.config.data, ours.pixels)
    net = model.AlexNet(ours.config.model, CLASSES)
    apply = jax.vmap(lambda own: net.apply({"params": own}, seen, train=False), axis_name=TOWER, out_axes=None)
    logits = jax.jit(apply)(ours.params)
    np.testing.assert_allclose(weights.forward(ours)(images), logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_a_mean_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    ours = fresh("caffe_alexnet", **{"data.subtract": "mean_image"})
    for write in (lambda: weights.write_file(tmp_path / "net.npy", ours), lambda: weights.export(ours)):
        with pytest.raises(
            ValueError, match=r"data.subtract=mean_image: is measured .* give --config.data.subtract=mean"
        ):
            write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["net.npy", "net.safetensors"])
def test_a_round_trip_is_bit_equal_and_the_pixels_scale_travels(caffe: weights.Weights, tmp_path: Path, name: str):
    weights.write_file(tmp_path / name, caffe)
    config = reduced("caffe_alexnet")
    assert config.data.mean != caffe.config.data.mean
    assert_same(weights.read_file(tmp_path / name, config), caffe)
    assert {path.name for path in tmp_path.iterdir()} == {name, *(["net.npy.json"] if name == "net.npy" else [])}


def test_grouped_and_back(caffe: weights.Weights) -> None:
    plain = weights.grouped(caffe)
    assert plain["conv2"]["kernel"].shape == (5, 5, 4, 16)  # as flax.linen.Conv(16, (5, 5), feature_group_count=2)
    assert plain["fc8"]["kernel"].shape == (16, CLASSES)
    assert caffe.params["fc8"]["kernel"].shape == (2, 16, 4)
    assert_same(weights.from_grouped(caffe.config, plain), caffe)


def published(path: Path, weights_of: weights.Weights, form: type, protocol: int) -> None:
    """A file as other people publish it: a dictionary of lists or of dictionaries, BGR, perhaps by Python 2."""
    layers = {}
    for layer, kinds in weights.grouped(weights_of).items():
        kernel = kinds["kernel"][:, :, ::-1] if layer == "conv1" else kinds["kernel"]
        pair = [np.ascontiguousarray(kernel), np.ascontiguousarray(kinds["bias"])]
        layers[layer] = pair if form is list else dict(zip(("weights", "biases"), pair, strict=True))
    held = np.empty((), dtype=object)
    held[()] = layers
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(held, file, protocol=protocol)


@pytest.mark.parametrize("form", [list, dict])
@pytest.mark.parametrize("protocol", [2, 5])
def test_both_forms_of_published_weights_are_read(caffe, tmp_path: Path, form: type, protocol: int) -> None:
    published(tmp_path / "net.npy", caffe, form, protocol)
    read = weights.read_file(tmp_path / "net.npy", reduced("caffe_alexnet"))
    jax.tree.map(np.testing.assert_array_equal, read.params, caffe.params)
    assert read.config.data.mean == (122.7, 116.7, 104.0)  # nothing is beside it: the config's


def test_what_we_write_others_read_with_numpy(caffe, tmp_path: Path) -> None:
    weights.write_file(tmp_path / "net.npy", caffe)
    layers = np.load(tmp_path / "net.npy", allow_pickle=True, encoding="latin1").item()
    assert list(layers) == list(caffe.config.model.order)
    np.testing.assert_array_equal(layers["conv1"][0][:, :, ::-1], weights.grouped(caffe)["conv1"]["kernel"])
    about = records.read_json(tmp_path / "net.npy.json")
    assert (about["channels"], about["mean"], about["std"]) == ("BGR", [100.0, 110.0, 120.0], [4.0, 3.0, 2.0])


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array({"conv1": [_Touch(tmp_path / "ran"), 0]}, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"evil.npy: cannot be read: it holds posix.mkdir, and only arrays"):
        weights.read_file(tmp_path / "evil.npy", reduced("caffe_alexnet"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not numpy", "it is no .npy file"),
        (b"", "it is no .npy file"),
        (np.zeros(3), "it holds an array of float64"),
        (np.array([1], dtype=object), "not a dictionary of layers"),
        (np.array({"conv1": 3}, dtype=object), "cannot be read: "),
    ],
)
def test_a_file_of_something_else_says_what(tmp_path: Path, content, message: str) -> None:
    path = tmp_path / "net.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        weights.read_file(path, reduced("caffe_alexnet"))


def test_a_truncated_file_is_refused(caffe, tmp_path: Path) -> None:
    for name in ("net.npy", "net.safetensors"):
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
            {"model.layers.conv3.crosses": False},
            r"features.6.weight has shape \(16, 16, 3, 3\), and conv3 needs \(16, 8, 3, 3\)",
        ),
        ("net.safetensors", {"data.crop": 150}, r"classifier.1.weight has shape \(16, 32\), and fc6 needs"),
    ],
)
def test_a_wrong_file_names_the_first_tensor_that_does_not_fit(caffe, tmp_path, name, changes, message) -> None:
    weights.write_file(tmp_path / name, caffe)
    with pytest.raises(ValueError, match=message):
        weights.read_file(tmp_path / name, reduced("caffe_alexnet", **changes))


def test_a_layer_that_is_not_there_is_named(caffe, tmp_path: Path) -> None:
    np.save(tmp_path / "net.npy", np.array({"conv1": [np.zeros(1), np.zeros(1)]}, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"has no conv2.weights, which the net needs; it has conv1.weights, conv1.bia"):
        weights.read_file(tmp_path / "net.npy", caffe.config)


def test_torchvisions_layout_is_for_its_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torchvision's layout has five conv and three dense layers"):
        weights.write_file(tmp_path / "net.safetensors", fresh("cifar_19pct"))
    assert not list(tmp_path.iterdir())


def torchvision_alexnet(torch, config):
    """torchvision's own net, as its source has it, with the config's widths."""
    nn = torch.nn
    widths = [config.model.layers[layer].features for layer in config.model.order[:-1]]
    inputs = widths[4] * 2 * 2

    class AlexNet(nn.Module):
        def __init__(self):
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
                nn.Linear(inputs, widths[5]),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(widths[5], widths[6]),
                nn.ReLU(),
                nn.Linear(widths[6], CLASSES),
            )

        def forward(self, x):
            return self.classifier(torch.flatten(self.features(x), 1))

    return AlexNet().eval()


@pytest.mark.parametrize("legacy", [False, True])
def test_torchvisions_net_gives_the_same_logits_here_and_there_and_back(torch, tmp_path: Path, legacy: bool) -> None:
    config = reduced("torchvision")
    torch.manual_seed(0)
    net = torchvision_alexnet(torch, config)
    for parameter in net.parameters():
        parameter.data *= 3  # so that the images tell
    torch.save(net.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=not legacy)
    read = weights.read_file(tmp_path / "net.pth", config)

    images = pixels(config)
    scaled = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / (
        torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    )
    expected = net(scaled).detach().numpy()
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(weights.forward(read)(images), expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    import safetensors.torch

    weights.write_file(tmp_path / "back.safetensors", read)
    back = safetensors.torch.load_file(tmp_path / "back.safetensors")
    assert list(back) == sorted(net.state_dict())
    assert all(torch.equal(back[key], tensor) for key, tensor in net.state_dict().items())


def test_a_pth_that_holds_more_than_tensors_is_refused(torch, tmp_path: Path) -> None:
    torch.save({"features.0.weight": _Touch(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth: cannot be read: Weights only load failed"):
        weights.read_file(tmp_path / "evil.pth", reduced("torchvision"))
    assert not (tmp_path / "ran").exists()


def test_caffes_weights_give_caffes_logits(torch, caffe, tmp_path: Path) -> None:
    """Of blue, green and red pixels, with the file's own kernels, normalised across the groups."""
    import torch_alexnet

    weights.write_file(tmp_path / "net.npy", caffe)
    layers = np.load(tmp_path / "net.npy", allow_pickle=True).item()
    params = {layer: {"kernel": kernel, "bias": bias} for layer, (kernel, bias) in layers.items()}
    images = pixels(caffe.config)
    bgr = (images[..., ::-1].astype(np.float32) - np.float32([100, 110, 120])) / np.float32([4, 3, 2])
    expected = torch_alexnet.forward(caffe.config.model, torch_alexnet.tensors(params), torch.tensor(bgr.copy()))
    expected = expected.detach().numpy()
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max()
    np.testing.assert_allclose(weights.forward(caffe)(images), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_stablehlo_is_the_same_function_on_one_device_for_any_batch(caffe) -> None:
    exported = jax.export.deserialize(bytearray(weights.export(caffe)))
    assert exported.nr_devices == 1
    assert "feature_group_count = 2" in exported.mlir_module()
    for batch in (1, 3):
        images = pixels(caffe.config, batch)
        logits = exported.call(images)
        assert logits.shape == (batch, CLASSES)
        np.testing.assert_allclose(logits, weights.forward(caffe)(images), rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps on two devices."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    train.train_and_evaluate(run_config(**TINY), folder)
    return folder


def test_a_run_goes_through_a_file_into_a_run_that_trains_on(trained: Path, tmp_path: Path) -> None:
    first = weights.read_run(trained)
    config = run_config(**TINY)
    weights.convert(trained, tmp_path / "net.npy")
    weights.convert(tmp_path / "net.npy", tmp_path / "again", config)
    assert_same(weights.read_run(tmp_path / "again"), first)
    before = records.read_json(trained / "result.json")
    config.optim.learning_rate = 1e-9
    shutil.rmtree(tmp_path / "again")
    weights.convert(tmp_path / "net.npy", tmp_path / "again", config)
    after = train.train_and_evaluate(config, tmp_path / "again")
    assert "from step 0 to 12" in (tmp_path / "again" / "train.log").read_text()
    assert abs(after["eval/loss"] - before["eval/loss"]) < 1e-6
    with pytest.raises(ValueError, match="again: is there already; name a new folder"):
        weights.convert(tmp_path / "net.npy", tmp_path / "again", config)


@pytest.mark.slow
def test_a_checkpoint_moves_between_two_devices_and_one(trained: Path, tmp_path: Path) -> None:
    """Where there is one device, a run of two goes on there; the towers' axis stays the same."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)

    def longer(epochs: float) -> ConfigDict:
        """The run as one that is to go on."""
        (run / "result.json").unlink()
        (run / "config.json").unlink()
        return run_config(**TINY | {"train.epochs": epochs})

    config = longer(0.014)
    script = f"""
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 1)
from alexnet_jax import config, train, weights
weights.convert(Path({str(trained)!r}), Path({str(tmp_path / "one.npy")!r}))
train.train_and_evaluate(config.from_json({config_lib.as_json(config)!r}), {str(run)!r})
"""
    done = run_script(script, HOME=str(tmp_path), JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert done.returncode == 0, done.stderr
    weights.convert(trained, tmp_path / "two.npy")
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()
    assert "vmap on cpu:0: from step 12 to 14" in (run / "train.log").read_text()
    # ... and what one device saved, two go on with.
    train.train_and_evaluate(longer(0.016), run)
    assert "pmap on cpu:0, cpu:1: from step 14 to 16" in (run / "train.log").read_text()


def test_the_command_converts_and_says_how_pixels_are_prepared(trained: Path, tmp_path: Path) -> None:
    done = command("alexnet_jax.weights", str(trained), str(tmp_path / "net.stablehlo"))
    assert done.returncode == 0, done.stderr
    assert "for 23x23 pixels of 0 to 255 minus (33.4,), divided by (79.0,)" in done.stdout
    exported = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
    images = np.random.default_rng(0).integers(0, 256, (2, 23, 23, 1)).astype(np.uint8)
    np.testing.assert_allclose(
        exported.call(images), weights.forward(weights.read_run(trained))(images), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("here.npy", "there", "say which net it is of: --config=configs/nets/"),
        ("folder", "there.npy", "is no run's folder"),
        ("here.npy", "there.pth", "are read, not written"),
        ("here.npy", "nowhere/there.npy", "there is no folder"),
    ],
)
def test_what_cannot_be_converted_is_said_before_anything_is_written(tmp_path, source, target, message) -> None:
    (tmp_path / "here.npy").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        weights.convert(tmp_path / source, tmp_path / target)
    assert {path.name for path in tmp_path.iterdir()} == {"here.npy", "folder"}


def test_a_damaged_checkpoint_is_not_taken_for_a_net(trained: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "_checksums", lambda tree: {"params/conv1/kernel": id(tree)})
    with pytest.raises(ValueError, match="is damaged, first in"):
        weights.read_run(trained)
