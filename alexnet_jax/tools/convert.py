"""A net's weights, from and to a run, and from and to other people's files.

    python -m alexnet_jax.weights SOURCE TARGET [--config=configs/nets/caffe_alexnet.py]

SOURCE or TARGET is, by its name:

- a folder: a run. As a target it is one that has done no step, and training goes on from there.
- ``.npy``: Caffe's layout (``bvlc_alexnet.npy``): by layer, kernels (height, width, in, out), blue before red.
- ``.safetensors``, or as a source ``.pth``: torchvision's names and layout.
- ``.stablehlo``, as a target: the forward pass, uint8 images (batch, height, width, RGB) to logits, on one device.

--config says which net another program's file holds, or what a run is to go on as. In all these files the features of
the towers stand side by side, as in a grouped convolution.
"""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import app
from ml_collections import ConfigDict

from alexnet_jax import augment, logs, model, pixels, records, train
from alexnet_jax import config as config_lib
from alexnet_jax.checkpoint import Weights, read_run
from alexnet_jax.optim import BIAS, KERNEL
from alexnet_jax.towers import TOWER

Params = dict[str, dict[str, Any]]
Arrays = dict[str, np.ndarray]


def grouped(weights: Weights) -> Params:
    """The parameters as one grouped net has them: without a tower axis, all towers' features side by side.

    They are those of ``flax.linen.Conv(feature_group_count=towers)`` where a layer sees its own tower only.
    """
    params = jax.tree.map(lambda array: np.concatenate(list(np.asarray(array)), axis=-1), weights.params)
    return _cut_head(weights.config, params, weights.classes)


def from_grouped(config: ConfigDict, params: Params) -> Weights:
    """The inverse of ``grouped``; the last layer's outputs are filled up to a multiple of the towers."""
    towers, head = config.model.towers, config.model.order[-1]
    classes = params[head][BIAS].size

    def split(array: np.ndarray) -> np.ndarray:
        filled = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % towers)])
        return np.stack(np.split(filled, towers, axis=-1))

    return Weights(config, classes, jax.tree.map(split, params))


class Layout(Protocol):
    """How another program names its arrays and lays out its kernels; biases are the same everywhere.

    Attributes:
      channels: the order in which the first layer sees the colours, "RGB" or "BGR".
    """

    channels: str

    def keys(self, config: ConfigDict) -> dict[str, dict[str, str]]:
        """What its arrays are called, by layer, then ``"kernel"`` and ``"bias"``."""

    def encode(self, kernel: np.ndarray, layer: str, config: ConfigDict) -> np.ndarray:
        """A layer's grouped kernel as it has it."""

    def decode(self, kernel: np.ndarray, layer: str, config: ConfigDict) -> np.ndarray:
        """The inverse of ``encode``."""


class Caffe:
    """Caffe's arrays as they are passed around in ``bvlc_alexnet.npy``: our layout, but blue comes first."""

    channels = "BGR"

    def keys(self, config: ConfigDict) -> dict[str, dict[str, str]]:
        """By our layers' names, which are Caffe's."""
        return {layer: {KERNEL: f"{layer}.weights", BIAS: f"{layer}.biases"} for layer in config.order}

    def encode(self, kernel: np.ndarray, layer: str, config: ConfigDict) -> np.ndarray:
        """(height, width, in, out), or (in, out)."""
        colours = layer == config.order[0] and kernel.ndim == 4 and kernel.shape[-2] == 3
        return kernel[..., ::-1, :] if colours else kernel

    decode = encode


class Torchvision:
    """torchvision's ``alexnet``: outputs first, and maps are flattened channels first."""

    channels = "RGB"

    def keys(self, config: ConfigDict) -> dict[str, dict[str, str]]:
        """By position in ``torch.nn.Sequential``."""
        kinds = [config.layers[layer].kind for layer in config.order]
        if kinds != ["conv"] * 5 + ["dense"] * 3:
            raise ValueError(f"torchvision's layout has five conv and three dense layers, and this net has {kinds}")
        names = [f"features.{i}" for i in (0, 3, 6, 8, 10)] + [f"classifier.{i}" for i in (1, 4, 6)]
        return {
            layer: {KERNEL: f"{name}.weight", BIAS: f"{name}.bias"}
            for layer, name in zip(config.order, names, strict=True)
        }

    def encode(self, kernel: np.ndarray, layer: str, config: ConfigDict) -> np.ndarray:
        """(out, in, height, width), or (out, in)."""
        if kernel.ndim == 4:
            return kernel.transpose(3, 2, 0, 1)
        inputs, outputs = kernel.shape
        return kernel.reshape(-1, _channels(layer, inputs, config), outputs).transpose(2, 1, 0).reshape(outputs, inputs)

    def decode(self, kernel: np.ndarray, layer: str, config: ConfigDict) -> np.ndarray:
        """The inverse of ``encode``."""
        if kernel.ndim == 4:
            return kernel.transpose(2, 3, 1, 0)
        outputs, inputs = kernel.shape
        return kernel.reshape(outputs, _channels(layer, inputs, config), -1).transpose(2, 1, 0).reshape(inputs, outputs)


def _channels(layer: str, inputs: int, config: ConfigDict) -> int:
    """How many channels the maps have that a dense layer flattens."""
    before = config.layers[config.order[config.order.index(layer) - 1]]
    return before.features if before.kind == "conv" else inputs


def read_file(path: Path, config: ConfigDict) -> Weights:
    """The weights in another program's file.

    Mean and scale of the pixels are those that ``write_file`` left there, else the config's.

    Args:
      config: of a run: which net it is.

    Raises:
      ValueError: the file cannot be read, holds something else than arrays, or does not fit the net; names what.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: must end in one of {', '.join(_READERS)}, or be a run's folder")
    try:
        arrays, about = _READERS[path.suffix](path)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: cannot be read: {error}") from error
    layout = _LAYOUTS[path.suffix]
    keys = layout.keys(config.model)
    for key in [key for kinds in keys.values() for key in kinds.values()]:
        if key not in arrays:
            raise ValueError(f"{path}: has no {key}, which the net needs; it has {', '.join(arrays)}")
    first, head = (keys[config.model.order[position]] for position in (0, -1))
    shapes = _shapes(config, arrays[first[KERNEL]].size, arrays[head[BIAS]].size)
    needed = _encoded(layout, shapes, config.model)
    params: Params = {}
    for layer, kinds in keys.items():
        for key in kinds.values():
            if arrays[key].shape != needed[key].shape:
                raise ValueError(
                    f"{path}: {key} has shape {arrays[key].shape}, and {layer} needs {needed[key].shape}: "
                    "is --config the net that the file is of?"
                )
        kernel = layout.decode(arrays[kinds[KERNEL]], layer, config.model)
        params[layer] = {KERNEL: kernel, BIAS: arrays[kinds[BIAS]]}
    config = config.copy_and_resolve_references()
    order = -1 if about.get("channels") == "BGR" else 1
    if "std" in about:
        config.data.std = tuple(about["std"][::order])
    seen = None
    if isinstance(about.get("mean"), str):
        seen = pixels.read(path.with_name(about["mean"]))
        config.data.subtract = about["subtract"]
    elif "mean" in about:
        config.data.update(subtract="mean", mean=tuple(about["mean"][::order]))
    return from_grouped(config, params)._replace(pixels=seen)


def write_file(path: Path, weights: Weights) -> None:
    """Writes ``.npy`` or ``.safetensors``; how pixels are to be prepared goes into it, or beside a ``.npy``.

    A mean image goes into a file of its own, ``.pixels.npz``, as ``alexnet_jax.pixels`` writes it.

    Raises:
      ValueError: the layout has no such net, or the mean of the pixels is not known.
    """
    layout, config = _LAYOUTS[path.suffix], weights.config
    encoded = _encoded(layout, grouped(weights), config.model)
    arrays = {key: np.ascontiguousarray(array) for key, array in encoded.items()}
    order = -1 if layout.channels == "BGR" else 1
    seen = weights.known_pixels()
    mean: list[float] | str
    if config.data.subtract == "mean":
        mean = list(config.data.mean)[::order]
    elif config.data.subtract == "mean_pixel":
        mean = seen.mean[0, 0, ::order].tolist()
    else:
        mean = f"{path.name}.pixels.npz"
        pixels.write(path.with_name(mean), seen)
    about = {
        "channels": layout.channels,
        "pixels": "0 to 255, minus mean, divided by std",
        "subtract": config.data.subtract,
        "mean": mean,
        "std": list(config.data.std)[::order],
        "crop": config.data.crop,
    }
    with records.whole(path) as unfinished:
        if path.suffix == ".safetensors":
            metadata = {key: json.dumps(value) for key, value in about.items()}
            safetensors.numpy.save_file(arrays, unfinished, metadata)
            return
        by_layer: dict[str, list[np.ndarray]] = {}
        for name, array in arrays.items():  # kernel, then bias
            by_layer.setdefault(name.rpartition(".")[0], []).append(array)
        with unfinished.open("wb") as file:
            np.save(file, np.array(by_layer, dtype=object), allow_pickle=True)
    records.write_json(_beside(path), about)


def _encoded(layout: Layout, params: Params, config: ConfigDict) -> Arrays:
    """Grouped parameters as another program has them, by its keys."""
    return {
        key: layout.encode(params[layer][kind], layer, config) if kind == KERNEL else params[layer][kind]
        for layer, kinds in layout.keys(config).items()
        for kind, key in kinds.items()
    }


def export(weights: Weights) -> bytes:
    """The forward pass with its weights, as StableHLO that ``jax.export.deserialize`` reads; needs none of this code.

    It takes uint8 images (batch, crop, crop, channels), RGB, for any batch, and gives logits (batch, classes). It
    runs on one device, where a layer that sees its own tower only is a grouped convolution.
    """
    config = weights.config
    first = weights.params[config.model.order[0]][KERNEL]
    crop = config.data.crop
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, crop, crop, first.shape[-2]), jnp.uint8)
    exported = jax.export.export(jax.jit(forward(weights)), platforms=("cpu", "cuda", "tpu"))(images)
    return bytes(exported.serialize())


def forward(weights: Weights) -> Callable[[jax.Array], Any]:
    """The function from uint8 images (batch, crop, crop, channels), which are centre crops, to logits.

    Raises:
      ValueError: the mean of the pixels is not known.
    """
    config, seen = weights.config.copy_and_resolve_references(), weights.known_pixels()
    net = model.AlexNet(config.model, weights.classes)
    crop = config.data.crop
    (centre,) = augment.evaluation_views(1, config.data.image_size, crop)
    seen = seen._replace(mean=seen.mean[centre.top : centre.top + crop, centre.left : centre.left + crop])
    config.data.image_size = crop
    params = jax.tree.map(jnp.asarray, weights.params)  # NumPy's arrays cannot be exported

    def logits(images: jax.Array) -> Any:
        views = augment.inputs(images, augment.View(0, 0, False), config.data, seen)
        apply = jax.vmap(
            lambda params: net.apply({"params": params}, views, train=False), axis_name=TOWER, out_axes=None
        )
        return apply(params)

    return logits


def _shapes(config: ConfigDict, first_size: int, classes: int) -> Params:
    """Zeros of the shapes that grouped parameters should have; they take no memory.

    Args:
      first_size: number of weights of the first layer, which tells whether it sees colours.
    """
    first = config.model.layers[config.model.order[0]]
    channels = 1 if first.kind == "conv" and first_size == first.kernel**2 * first.features else 3
    image_shape = (config.data.crop, config.data.crop, channels)
    params = model.shapes(config.model, classes, image_shape)

    def zeros(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        towers, *shape, features = leaf.shape
        return np.broadcast_to(np.float32(0), (*shape, towers * features))

    return _cut_head(config, jax.tree.map(zeros, params), classes)


def _cut_head(config: ConfigDict, params: Params, classes: int) -> Params:
    """Grouped parameters without the last layer's outputs that only fill up the towers."""
    head = config.model.order[-1]
    return params | {head: {kind: array[..., :classes] for kind, array in params[head].items()}}


# Files. Each reader gives arrays by their keys, and what is known of the pixels that they want.


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays, lists, dictionaries and strings, and runs nothing."""

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
            raise pickle.UnpicklingError(f"it is no .npy file ({error})") from error
        if shape != () or dtype != np.dtype(object):
            raise pickle.UnpicklingError(f"it holds an array of {dtype} {shape}, not a dictionary of layers")
        held = _ArraysOnly(file, encoding="latin1").load()  # Python 2 wrote most of them
    layers = held.item() if isinstance(held, np.ndarray) and held.shape == () else held
    if not isinstance(layers, dict):
        raise pickle.UnpicklingError(f"it holds a {type(layers).__name__}, not a dictionary of layers")
    arrays: Arrays = {}
    for layer, parts in layers.items():
        pairs = parts.items() if isinstance(parts, dict) else zip(("weights", "biases"), parts, strict=False)
        arrays |= {f"{layer}.{kind}": np.asarray(array) for kind, array in pairs}
    return arrays, _read_beside(path)


def _read_safetensors(path: Path) -> tuple[Arrays, dict[str, Any]]:
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
        about = {key: json.loads(metadata[key]) for key in ("channels", "subtract", "mean", "std") if key in metadata}
        return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118, it is no dict


def _read_pth(path: Path) -> tuple[Arrays, dict[str, Any]]:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path}: PyTorch reads .pth files; pip install torch, or save it as .safetensors where it is"
        ) from None
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key: tensor.numpy() for key, tensor in state.items()}, _read_beside(path)


_READERS = {".npy": _read_npy, ".safetensors": _read_safetensors, ".pth": _read_pth}
_LAYOUTS: dict[str, Layout] = {".npy": Caffe(), ".safetensors": Torchvision(), ".pth": Torchvision()}


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_beside(path: Path) -> dict[str, Any]:
    return records.read_json(_beside(path)) or {}


def convert(source: Path, target: Path, config: ConfigDict | None = None) -> Weights:
    """Reads one kind of file or run and writes another; see the head of this file.

    Args:
      config: of a run; needed where the source is another program's file.

    Raises:
      ValueError: the source cannot be read or does not fit, or the target cannot be written or is a run already.
    """
    if target.suffix == ".pth":
        raise ValueError(f"{target}: .pth files are read, not written; PyTorch reads .safetensors, too")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}")
    if source.is_dir():
        weights = read_run(source)
        weights = weights if config is None else weights._replace(config=config)
    elif config is None:
        raise ValueError(f"{source}: say which net it is of: --config=configs/nets/...")
    else:
        weights = read_file(source, config)
    if target.suffix in (".npy", ".safetensors"):
        write_file(target, weights)
    elif target.suffix == ".stablehlo":
        with records.whole(target) as unfinished:
            unfinished.write_bytes(export(weights))
    else:
        train.save_start(weights, target)
    return weights


def main(argv: list[str]) -> None:
    """Converts, and says how the pixels are to be prepared."""
    if len(argv) != 3:
        raise app.UsageError("say what to read and what to write: SOURCE TARGET")
    logs.quiet_libraries()
    study = config_lib.FLAG.value
    try:
        config = None if study is None else config_lib.reference_run(study)
        weights = convert(Path(argv[1]), Path(argv[2]), config)
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    data = weights.config.data
    print(
        f"{argv[2]}: {model.count_parameters(weights.params):,} parameters, for {data.crop}x{data.crop} pixels of "
        f"0 to 255 minus {data.mean if data.subtract == 'mean' else data.subtract.replace('_', ' ')}, "
        f"divided by {data.std} (red, green, blue)"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=config_lib.parse_flags)
