"""Weights in the files of other programs, and the weights that a run starts from (`train.init_from`).

In all files the features of the towers are side by side, as in a grouped convolution. Weights of any precision are read
as float32.
"""

import functools
import hashlib
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epy
from ml_collections import ConfigDict, FrozenConfigDict

from alexnet_jax import model
from alexnet_jax.checkpoint import TrainedNetwork, load_run
from alexnet_jax.data import datasets, statistics
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.optim import BIAS, KERNEL
from alexnet_jax.run_dir import RunDir, atomic_write, first_difference, read_json, write_json

with epy.lazy_imports():  # optional: only PyTorch's files need it
    import torch

Params = dict[str, dict[str, Any]]
Arrays = dict[str, np.ndarray]
_WRAPPINGS = ("state_dict", "model_state_dict", "model", "net")  # keys of a training checkpoint that hold the weights
_WRAPPERS = {"module", "model", "_orig_mod"}  # parts of a name: of DataParallel, Lightning, torch.compile


def grouped(network: TrainedNetwork) -> Params:
    """Return the parameters without a tower axis: all towers' features side by side, as in a grouped convolution."""
    return _crop_head(network.config, _join(network.variables["params"]), network.classes)


def from_grouped(config: ConfigDict, params: Params) -> TrainedNetwork:
    """Invert `grouped`; pad the last layer's outputs with zeros to a multiple of the towers."""
    head = config.model.order[-1]
    variables = {"params": _split(params, config.model.towers)}
    return TrainedNetwork(config, params[head][BIAS].size, variables)


def _join(tree: Any) -> Any:
    """Return arrays without their tower axis: the towers' features side by side."""
    return jax.tree.map(lambda array: np.concatenate(list(np.asarray(array)), axis=-1), tree)


def _split(tree: Any, towers: int) -> Any:
    """Invert `_join`; pad features with zeros to a multiple of the towers."""

    def split(array: np.ndarray) -> np.ndarray:
        padded = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % towers)])
        return np.stack(np.split(padded, towers, axis=-1))

    return jax.tree.map(split, tree)


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


def load_network(source: Path, config: ConfigDict | None) -> TrainedNetwork:
    """Load the network of a run, with another config if one is given, or of a file with the config's architecture.

    Raises:
      ValueError: there is no such network, or it does not fit the config.
    """
    if source.is_dir():
        network = load_run(source)
        if config is None:
            return network
        needed = model.shapes(config.model, network.classes, (config.data.crop, config.data.crop, network.channels))
        for kind, layers in needed.items():
            loaded = network.variables.get(kind, {})
            _check_fits(str(source), loaded, layers, sorted({*layers, *loaded}))
        size = config.data.image_size if network.statistics is None else len(network.statistics.mean)
        if config.data.image_size != size:
            raise ValueError(
                f"data.image_size={config.data.image_size}: must be {size} pixels, as the mean image of {source}; "
                f"give --config.data.image_size={size}"
            )
        return network._replace(config=config)
    if config is None:
        raise ValueError(f"{source}: must come with its architecture; give --config=configs/networks/...")
    return read_file(source, config)


def read_file(path: Path, config: ConfigDict) -> TrainedNetwork:
    """Read another program's file; mean and scale of the input are those that `write_file` stored, else the config's.

    So are the names of the classes; without them, those of ImageNet if the config is for it. A file that is damaged,
    holds other objects than arrays or does not fit the config raises ValueError.
    """
    suffix = _suffix(path)
    try:
        arrays, metadata = _READERS[suffix](path)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not _is_metadata(metadata):
        raise ValueError(
            f"{path}: is stored with the input {metadata}: mean and std must be numbers, or mean a file and subtract "
            "what it is subtracted as; correct it"
        )
    layout = _LAYOUTS[suffix]
    names = layout.names(config.model)
    if missing := [name for pair in names.values() for name in pair if name not in arrays]:
        had = list(arrays)[:10]
        raise ValueError(
            f"{path}: has no {missing[0]}, which the network needs; it has {', '.join(had)}"
            + (f" and {len(arrays) - 10} more" if len(arrays) > 10 else "")
        )
    (first_kernel, _), *_, (_, head_bias) = names.values()
    needed = _encode(layout, config, _grouped_zeros(config, arrays[first_kernel].size, arrays[head_bias].size))
    params: Params = {}
    for layer, (kernel, bias) in names.items():
        for name in (kernel, bias):
            if arrays[name].shape != needed[name].shape:
                raise ValueError(
                    f"{path}: {name} has shape {arrays[name].shape}, and {layer} needs {needed[name].shape}; give the "
                    "file's architecture as --config"
                )
            arrays[name] = _as_float32(arrays[name], f"{path}: {name}")
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
    network = from_grouped(config, params)
    class_names = metadata.get("class_names")
    if not class_names and config.data.name == "imagenet2012":
        class_names = datasets.imagenet_class_names()
    if class_names and len(class_names) != network.classes:
        class_names = None
    return network._replace(statistics=measured, class_names=class_names or None)


def _suffix(path: Path) -> str:
    """Return the end of a file's name that names its format; raise ValueError if none does."""
    for suffix in _READERS:
        if path.name.lower().endswith(suffix):
            return suffix
    raise ValueError(f"{path}: must end in one of {', '.join(_READERS)}, or be a run's folder")


def _as_float32(array: np.ndarray, name: str) -> np.ndarray:
    """Return floats of any precision as float32; raise ValueError, with their name, if they are not finite floats."""
    if not jax.numpy.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} is of {array.dtype}: must be floats; give weights that are not quantised")
    with np.errstate(over="ignore", invalid="ignore"):
        single = np.asarray(array, np.float32)
    if not np.isfinite(single).all():
        raise ValueError(f"{name} is not finite: must be finite in float32; give weights of training that did not fail")
    return single


def _is_metadata(metadata: dict[str, Any]) -> bool:
    """Return whether the input of a network is described as by `write_file`; fields may be missing."""
    mean, std = metadata.get("mean", []), metadata.get("std", [])
    if isinstance(mean, str):
        mean = [] if isinstance(metadata.get("subtract"), str) else None
    lists = isinstance(mean, list) and isinstance(std, list)
    names = metadata.get("class_names") or []
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return named and lists and all(isinstance(value, int | float) for value in mean + std)


def write_file(path: Path, network: TrainedNetwork) -> None:
    """Write `.npy` or `.safetensors`.

    Mean and scale of the input and the classes' names are inside, or for `.npy` in `.npy.json`. A mean image is in a
    file beside it, `.statistics.npz`. A network that does not fit raises ValueError.
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
        "class_names": network.class_names and list(network.class_names),
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


def _grouped_zeros(config: ConfigDict, first_size: int, classes: int) -> Params:
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
        keys = ("channels", "subtract", "mean", "std", "class_names")
        metadata = {key: json.loads(in_file[key]) for key in keys if key in in_file}
        return _unwrap({key: file.get_tensor(key) for key in file.keys()}), metadata  # noqa: SIM118, not a dict


def _read_torch(path: Path) -> tuple[Arrays, dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError("PyTorch reads .pth files; pip install torch, or save it as .safetensors") from None
    except Exception as error:  # of many kinds
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"it holds {unsafe[1]}, and only tensors are loaded; save the state_dict() alone"
            ) from error
        raise ValueError("it is damaged, or was not written by torch.save; save or download it again") from error
    while isinstance(content, Mapping) and (inner := [content[key] for key in _WRAPPINGS if key in content]):
        content = inner[0]
    named = content if isinstance(content, Mapping) else {}
    tensors = {key: tensor.detach() for key, tensor in named.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        holds = ", ".join(map(str, list(named)[:10])) or f"a {type(content).__name__}"
        raise ValueError(f"it holds {holds}, and not the weights of one network; save its state_dict()")
    arrays = {
        key: (tensor.float() if tensor.is_floating_point() else tensor).numpy() for key, tensor in tensors.items()
    }
    return _unwrap(arrays), read_json(_metadata_file(path)) or {}


def _unwrap(arrays: Arrays) -> Arrays:
    """Return arrays by their names in the model itself: "module.features.0.weight" is "features.0.weight"."""
    unwrapped = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in arrays}
    if len(unwrapped) < len(arrays):
        raise ValueError("it holds several networks; save the state_dict() of one")
    return {name: arrays[wrapped] for name, wrapped in unwrapped.items()}


READ_ONLY = (".pth", ".pt", ".tar", ".ckpt")  # PyTorch's
_READERS = {".npy": _read_npy, ".safetensors": _read_safetensors, **dict.fromkeys(READ_ONLY, _read_torch)}
_LAYOUTS = {suffix: Caffe() if suffix == ".npy" else Torchvision() for suffix in _READERS}


def _metadata_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


class Initial(NamedTuple):
    """The weights that a run starts from."""

    variables: dict[str, Any]  # as from `model.init`
    origin: dict[str, Any]  # what the run remembers of them, as JSON
    notes: tuple[str, ...]  # for the log


def initial(config: ConfigDict, dataset: Dataset) -> Initial:
    """Return the variables that a run with `train.init_from` starts from.

    With `train.new_head` the last layer has the initial values of the config's seed.

    Raises:
      ValueError: there are no such weights, or they do not fit the network or the classes.
    """
    loaded, origin = _fitting(config, dataset)
    image_shape = (config.data.crop, config.data.crop, dataset.channels)
    variables = model.init(config.model, dataset.classes, image_shape, config.seed)
    variables = {kind: layers | loaded.variables.get(kind, {}) for kind, layers in variables.items()}
    new = "".join(f"; {layer} starts anew" for layer in origin["new_layers"])
    notes = [f"starts from the weights of {origin['init_from']}, fingerprint {origin['fingerprint']}{new}"]
    theirs, ours = describe_input(loaded.config), describe_input(config)
    if theirs != ours:
        notes.append(f"their input was pixels {theirs}; this run's is pixels {ours}")
    return Initial(variables, origin, tuple(notes))


def check_initial(run: RunDir, config: ConfigDict, dataset: Dataset) -> None:
    """Check that a run can start from the weights that its config names, or did start from them.

    Once it has started, its own checkpoints hold what it needs: the weights may be moved away.

    Raises:
      ValueError: there are no such weights, they do not fit, or they have changed since the run started.
    """
    recorded = run.read_initial()
    if not config.train.init_from or (recorded and not Path(config.train.init_from).exists()):
        return
    _, origin = _fitting(config, dataset)
    if recorded and recorded["fingerprint"] != origin["fingerprint"]:
        raise ValueError(
            f"{run.path} holds a run from other weights of {config.train.init_from} (fingerprint was "
            f"{recorded['fingerprint']}, is {origin['fingerprint']}): choose another --workdir, or delete that folder "
            "to start again"
        )


def _fitting(config: ConfigDict, dataset: Dataset) -> tuple[TrainedNetwork, dict[str, Any]]:
    """Return the network to start from, with the layers and towers that a run takes, and what to remember of it.

    Raises:
      ValueError: there are no such weights, or they do not fit the network or the classes.
    """
    source, head = Path(config.train.init_from), config.model.order[-1]
    architecture = FrozenConfigDict({section: config[section] for section in ("model", "data")})
    network, fingerprint = _load(source, architecture, _modified_at(source))
    _check_classes(source, network, dataset, config)
    new_layers = [head] if config.train.new_head else []
    image_shape = (config.data.crop, config.data.crop, dataset.channels)
    variables: dict[str, Any] = {}
    for kind, layers in model.shapes(config.model, dataset.classes, image_shape).items():
        joined = grouped(network) if kind == "params" else _join(network.variables.get(kind, {}))
        loaded = _split(joined, config.model.towers)
        kept = [layer for layer in layers if layer not in new_layers]
        _check_fits(f"train.init_from={source}", loaded, layers, kept)
        variables[kind] = {layer: loaded[layer] for layer in kept}
    origin = {"init_from": str(source), "fingerprint": fingerprint, "new_layers": new_layers}
    return network._replace(variables=variables), origin


def _check_fits(source: str, loaded: Mapping[str, Any], needed: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Check the shapes of layers' arrays; raise ValueError, beginning with the source, if some differ."""
    for layer in layers:
        shapes, expected = ({k: leaf.shape for k, leaf in tree.get(layer, {}).items()} for tree in (loaded, needed))
        if shapes != expected:
            raise ValueError(
                f"{source}: must fit the network, and {layer} has {shapes or 'nothing'} for {expected or 'nothing'}; "
                "give the config of its architecture"
            )


@functools.lru_cache(maxsize=1)  # the seeds of an arm start from the same weights
def _load(source: Path, config: FrozenConfigDict, _: float) -> tuple[TrainedNetwork, str]:
    """Return the network of a run, or of a file of the config's architecture, and a hash of its weights."""
    if not source.exists():
        raise ValueError(f"train.init_from={source}: must be a run's folder or a file of weights; there is none")
    network = load_run(source) if source.is_dir() else read_file(source, ConfigDict(config))
    fingerprint = hashlib.sha256()
    for leaf in jax.tree.leaves(network.variables):
        fingerprint.update(np.asarray(leaf).tobytes())
    return network, fingerprint.hexdigest()[:16]


def _modified_at(source: Path) -> float:
    """Return when weights were changed last, so that they are read again."""
    changed = RunDir(source).checkpoints if source.is_dir() else source
    return changed.stat().st_mtime if changed.exists() else 0.0


def _check_classes(source: Path, network: TrainedNetwork, dataset: Dataset, config: ConfigDict) -> None:
    """Check that the last layer has the dataset's classes, or starts anew."""
    if config.train.new_head:
        return
    remedy = f"give --new_head to start {config.model.order[-1]} anew"
    if network.classes != dataset.classes:
        raise ValueError(
            f"train.init_from={source}: must have a last layer of the {dataset.classes} classes of {config.data.name}, "
            f"and has {network.classes}; {remedy}"
        )
    if network.class_names and (differing := first_difference(network.class_names, dataset.class_names)):
        raise ValueError(
            f"train.init_from={source}: must have the classes of {config.data.name}, and {differing}; {remedy}"
        )


def describe_input(config: ConfigDict) -> str:
    """Return what is done to the pixels of the input, for messages."""
    data = config.data
    subtracted = data.mean if data.subtract == "mean" else data.subtract.replace("_", " ")
    return f"minus {subtracted}, divided by {data.std}"
