"""Convert a network's weights between runs and the files of other programs.

SOURCE and TARGET are, by their names:

- a folder: a run. As a target it must be new, holds a run that has done no step, and training starts from its weights.
- NAME.npy: Caffe's layout (bvlc_alexnet.npy): by layer, kernels (height, width, in, out), channels blue, green, red.
- NAME.safetensors, or as a source NAME.pth: torchvision's names and layout.
- NAME.stablehlo, as a target: the forward pass from uint8 images (batch, height, width, RGB) to logits, on one device.

--config is the architecture of the source file, or the config of the target run. In all these files the features of the
towers are side by side, as in a grouped convolution.
"""

import argparse
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epy
from ml_collections import ConfigDict

from alexnet_jax import config as config_lib
from alexnet_jax import model, train
from alexnet_jax.checkpoint import TrainedNetwork, load_run, save_run
from alexnet_jax.data import augment, statistics
from alexnet_jax.metrics import Progress
from alexnet_jax.optim import BIAS, KERNEL
from alexnet_jax.parallel import TOWER
from alexnet_jax.run_dir import RunDir, atomic_write, read_json, write_json

with epy.lazy_imports():  # optional: only .pth files need it
    import torch

Params = dict[str, dict[str, Any]]
Arrays = dict[str, np.ndarray]


def grouped(network: TrainedNetwork) -> Params:
    """Return the parameters without a tower axis: all towers' features side by side, as in a grouped convolution."""
    params = jax.tree.map(lambda array: np.concatenate(list(np.asarray(array)), axis=-1), network.variables["params"])
    return _crop_head(network.config, params, network.classes)


def from_grouped(config: ConfigDict, params: Params) -> TrainedNetwork:
    """Invert `grouped`; pad the last layer's outputs with zeros to a multiple of the towers."""
    towers, head = config.model.towers, config.model.order[-1]

    def split(array: np.ndarray) -> np.ndarray:
        padded = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % towers)])
        return np.stack(np.split(padded, towers, axis=-1))

    return TrainedNetwork(config, params[head][BIAS].size, {"params": jax.tree.map(split, params)}, None)


class Caffe:
    """Caffe's layout in `bvlc_alexnet.npy`: ours, but with channels in the order blue, green, red."""

    channels = "BGR"

    def names(self, config: ConfigDict) -> dict[str, tuple[str, str]]:
        """Return the names of each layer's kernel and bias; the layers' names are Caffe's."""
        return {layer: (f"{layer}.weights", f"{layer}.biases") for layer in config.order}

    def encode(self, kernel: np.ndarray, layer: str, config: ConfigDict) -> np.ndarray:
        """Convert to (height, width, in, out), or (in, out)."""
        has_colours = layer == config.order[0] and kernel.ndim == 4 and kernel.shape[-2] == 3
        return kernel[..., ::-1, :] if has_colours else kernel

    decode = encode


class Torchvision:
    """The layout of torchvision's `alexnet`: outputs first, feature maps flattened channels first."""

    channels = "RGB"

    def names(self, config: ConfigDict) -> dict[str, tuple[str, str]]:
        """Return the names of each layer's kernel and bias, which number the modules of `torch.nn.Sequential`."""
        kinds = [config.layers[layer].kind for layer in config.order]
        if kinds != ["conv"] * 5 + ["dense"] * 3:
            raise ValueError(f"model.order={config.order}: must be five conv and three dense layers, as torchvision's")
        modules = [f"features.{i}" for i in (0, 3, 6, 8, 10)] + [f"classifier.{i}" for i in (1, 4, 6)]
        pairs = [(f"{module}.weight", f"{module}.bias") for module in modules]
        return dict(zip(config.order, pairs, strict=True))

    def encode(self, kernel: np.ndarray, layer: str, config: ConfigDict) -> np.ndarray:
        """Convert to (out, in, height, width), or (out, in)."""
        if kernel.ndim == 4:
            return kernel.transpose(3, 2, 0, 1)
        inputs, outputs = kernel.shape
        channels = self._input_channels(layer, inputs, config)
        return kernel.reshape(-1, channels, outputs).transpose(2, 1, 0).reshape(outputs, inputs)

    def decode(self, kernel: np.ndarray, layer: str, config: ConfigDict) -> np.ndarray:
        """Invert `encode`."""
        if kernel.ndim == 4:
            return kernel.transpose(2, 3, 1, 0)
        outputs, inputs = kernel.shape
        channels = self._input_channels(layer, inputs, config)
        return kernel.reshape(outputs, channels, -1).transpose(2, 1, 0).reshape(inputs, outputs)

    def _input_channels(self, layer: str, inputs: int, config: ConfigDict) -> int:
        """Return the channels of the feature maps that a dense layer flattens."""
        previous = config.layers[config.order[config.order.index(layer) - 1]]
        return previous.features if previous.kind == "conv" else inputs


def read_file(path: Path, config: ConfigDict) -> TrainedNetwork:
    """Read another program's file; mean and scale of the input are those that `write_file` stored, else the config's.

    A file that is damaged, holds other objects than arrays or does not fit the config raises ValueError.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: must end in one of {', '.join(_READERS)}, or be a run's folder")
    try:
        arrays, metadata = _READERS[path.suffix](path)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not _is_metadata(metadata):
        raise ValueError(
            f"{path}: is stored with the input {metadata}: mean and std must be numbers, or mean a file and subtract "
            "what it is subtracted as; correct it"
        )
    layout = _LAYOUTS[path.suffix]
    names = layout.names(config.model)
    if missing := [name for pair in names.values() for name in pair if name not in arrays]:
        raise ValueError(f"{path}: has no {missing[0]}, which the network needs; it has {', '.join(arrays)}")
    (first_kernel, _), *_, (_, head_bias) = names.values()
    needed = _encode(layout, config, _shapes(config, arrays[first_kernel].size, arrays[head_bias].size))
    params: Params = {}
    for layer, (kernel, bias) in names.items():
        for name in (kernel, bias):
            if arrays[name].shape != needed[name].shape:
                raise ValueError(
                    f"{path}: {name} has shape {arrays[name].shape}, and {layer} needs {needed[name].shape}; give the "
                    "file's architecture as --config"
                )
        params[layer] = {KERNEL: layout.decode(arrays[kernel], layer, config.model), BIAS: arrays[bias]}
    config = config.copy_and_resolve_references()
    order = -1 if metadata.get("channels") == "BGR" else 1
    if "std" in metadata:
        config.data.std = tuple(metadata["std"][::order])
    measured = None
    if isinstance(metadata.get("mean"), str):
        measured = statistics.read(path.with_name(metadata["mean"]))
        config.data.subtract = metadata["subtract"]
    elif "mean" in metadata:
        config.data.update(subtract="mean", mean=tuple(metadata["mean"][::order]))
    return from_grouped(config, params)._replace(statistics=measured)


def _is_metadata(metadata: dict[str, Any]) -> bool:
    """Return whether the input of a network is described as by `write_file`; fields may be missing."""
    mean, std = metadata.get("mean", []), metadata.get("std", [])
    if isinstance(mean, str):
        mean = [] if isinstance(metadata.get("subtract"), str) else None
    lists = isinstance(mean, list) and isinstance(std, list)
    return lists and all(isinstance(value, int | float) for value in mean + std)


def write_file(path: Path, network: TrainedNetwork) -> None:
    """Write `.npy` or `.safetensors` with mean and scale of the input: inside, or for `.npy` in `.npy.json`.

    A mean image is written to a file beside it, `.statistics.npz`. A network that does not fit raises ValueError.
    """
    layout, config = _LAYOUTS[path.suffix], network.config
    encoded = _encode(layout, config, grouped(network))
    arrays = {name: np.ascontiguousarray(array) for name, array in encoded.items()}
    order = -1 if layout.channels == "BGR" else 1
    measured = network.known_statistics()
    mean: list[float] | str
    if config.data.subtract == "mean":
        mean = list(config.data.mean)[::order]
    elif config.data.subtract == "mean_pixel":
        mean = measured.mean[0, 0, ::order].tolist()
    else:
        mean = f"{path.name}.statistics.npz"
        statistics.write(path.with_name(mean), measured)
    metadata = {
        "channels": layout.channels,
        "pixels": "0 to 255, minus mean, divided by std",
        "subtract": config.data.subtract,
        "mean": mean,
        "std": list(config.data.std)[::order],
        "crop": config.data.crop,
    }
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            in_file = {key: json.dumps(value) for key, value in metadata.items()}
            safetensors.numpy.save_file(arrays, temporary, in_file)
            return
        layers = {layer: [arrays[name] for name in pair] for layer, pair in layout.names(config.model).items()}
        with temporary.open("wb") as file:
            np.save(file, np.array(layers, dtype=object), allow_pickle=True)
    write_json(_metadata_file(path), metadata)


def _encode(layout: Caffe | Torchvision, config: ConfigDict, params: Params) -> Arrays:
    """Convert grouped parameters to another program's arrays, by its names."""
    names = layout.names(config.model)
    for layer, arrays in params.items():
        if layer not in names or set(arrays) != {KERNEL, BIAS}:
            raise ValueError(
                f"{layer}={sorted(arrays)}: must be a kernel and a bias for .npy and .safetensors, which hold nothing "
                "else; export the network as .stablehlo"
            )
    encoded: Arrays = {}
    for layer, (kernel, bias) in names.items():
        encoded[kernel] = layout.encode(params[layer][KERNEL], layer, config.model)
        encoded[bias] = params[layer][BIAS]
    return encoded


def export(network: TrainedNetwork) -> bytes:
    """Export `forward` with its weights as StableHLO, which `jax.export.deserialize` reads without this code.

    It takes any batch size and runs on one device; a layer that sees its own tower only is a grouped convolution.
    """
    crop = network.config.data.crop
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, crop, crop, network.channels), jnp.uint8)
    exported = jax.export.export(jax.jit(forward(network)), platforms=("cpu", "cuda", "tpu"))(images)
    return bytes(exported.serialize())


def forward(network: TrainedNetwork) -> Callable[[Any], jax.Array]:
    """Return the function from centre crops, uint8 RGB (batch, crop, crop, channels), to logits (batch, classes)."""
    config, measured = network.config.copy_and_resolve_references(), network.known_statistics()
    alexnet = model.AlexNet(config.model, network.classes)
    crop = config.data.crop
    (centre,) = augment.evaluation_views(1, config.data.image_size, crop)
    measured = measured._replace(mean=measured.mean[centre.top : centre.top + crop, centre.left : centre.left + crop])
    config.data.image_size = crop
    variables = jax.tree.map(jnp.asarray, network.variables)  # NumPy arrays cannot be exported

    def logits(images: jax.Array) -> Any:
        inputs = augment.inputs(images, augment.View(0, 0, False), config.data, measured)
        towers = jax.vmap(lambda tower: alexnet.apply(tower, inputs, train=False), axis_name=TOWER, out_axes=None)
        return towers(variables)

    return logits


def _shapes(config: ConfigDict, first_size: int, classes: int) -> Params:
    """Return zeros, which take no memory, of the shapes of the grouped parameters."""
    first = config.model.layers[config.model.order[0]]  # the size of its kernel tells whether images have colours
    channels = 1 if first.kind == "conv" and first_size == first.kernel**2 * first.features else 3
    image_shape = (config.data.crop, config.data.crop, channels)
    params = model.shapes(config.model, classes, image_shape)["params"]

    def zeros(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        towers, *shape, features = leaf.shape
        return np.broadcast_to(np.float32(0), (*shape, towers * features))

    return _crop_head(config, jax.tree.map(zeros, params), classes)


def _crop_head(config: ConfigDict, params: Params, classes: int) -> Params:
    """Return grouped parameters without the last layer's padding to a multiple of the towers."""
    head = config.model.order[-1]
    return params | {head: {kind: array[..., :classes] for kind, array in params[head].items()}}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of arrays, lists, dictionaries and strings that calls nothing else."""

    ALLOWED = frozenset(
        {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
        | {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
        | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, and only arrays, lists and dicts are read")
        return super().find_class(module, name)


def _read_npy(path: Path) -> tuple[Arrays, dict[str, Any]]:
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = header[version](file)
        except (ValueError, KeyError) as error:
            raise pickle.UnpicklingError(f"it is not a .npy file ({error})") from error
        if shape != () or dtype != np.dtype(object):
            raise pickle.UnpicklingError(f"it holds an array of {dtype} {shape}, not a dictionary of layers")
        content = _ArrayUnpickler(file, encoding="latin1").load()  # Python 2 wrote most of them
    layers = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
    if not isinstance(layers, dict):
        raise pickle.UnpicklingError(f"it holds a {type(layers).__name__}, not a dictionary of layers")
    arrays: Arrays = {}
    for layer, parts in layers.items():
        pairs = parts.items() if isinstance(parts, dict) else zip(("weights", "biases"), parts, strict=False)
        arrays |= {f"{layer}.{kind}": np.asarray(array) for kind, array in pairs}
    return arrays, read_json(_metadata_file(path)) or {}


def _read_safetensors(path: Path) -> tuple[Arrays, dict[str, Any]]:
    with safetensors.safe_open(path, "numpy") as file:
        in_file = file.metadata() or {}
        keys = ("channels", "subtract", "mean", "std")
        metadata = {key: json.loads(in_file[key]) for key in keys if key in in_file}
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118, not a dict


def _read_pth(path: Path) -> tuple[Arrays, dict[str, Any]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError("PyTorch reads .pth files; pip install torch, or save it as .safetensors") from None
    return {key: tensor.numpy() for key, tensor in state.items()}, read_json(_metadata_file(path)) or {}


_READERS = {".npy": _read_npy, ".safetensors": _read_safetensors, ".pth": _read_pth}
_LAYOUTS: dict[str, Caffe | Torchvision] = {".npy": Caffe(), ".safetensors": Torchvision(), ".pth": Torchvision()}


def _metadata_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def convert(source: Path, target: Path, config: ConfigDict | None = None) -> TrainedNetwork:
    """Read a run or file and write it as another one; the names decide (see the module's docstring).

    A source that is a file needs a config. What cannot be read, does not fit or exists as a folder raises ValueError.
    """
    if target.suffix == ".pth":
        raise ValueError(f"{target}: must not be .pth, which is read only; PyTorch reads .safetensors, too")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target}: must be in an existing folder, and {target.parent} does not exist")
    if source.is_dir():
        network = load_run(source)
        network = network if config is None else network._replace(config=config)
    elif config is None:
        raise ValueError(f"{source}: must come with its architecture; give --config=configs/networks/...")
    else:
        network = read_file(source, config)
    if target.suffix in (".npy", ".safetensors"):
        write_file(target, network)
    elif target.suffix == ".stablehlo":
        with atomic_write(target) as temporary:
            temporary.write_bytes(export(network))
    else:
        state, progress = train.new_state(network.config, network.variables), dataclasses.asdict(Progress())
        save_run(RunDir(target), network, state, progress)
    return network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb convert."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run or file to read")
    parser.add_argument("target", type=Path, metavar="TARGET", help="run or file to write")
    parser.add_argument("--config", metavar="FILE[:SCALE]", help="architecture of a file, or config of the target run")


def main(arguments: argparse.Namespace) -> None:
    """Convert, and print what the network expects of its input."""
    config = None if arguments.config is None else config_lib.reference_run(arguments.config)
    network = convert(arguments.source, arguments.target, config)
    data = network.config.data
    print(
        f"{arguments.target}: {model.count_parameters(network.variables['params']):,} parameters; input "
        f"{data.crop}x{data.crop} pixels of 0 to 255, minus "
        f"{data.mean if data.subtract == 'mean' else data.subtract.replace('_', ' ')}, divided by {data.std} (RGB)"
    )
