"""Convert a network's weights between runs and the files of other programs.

SOURCE and TARGET are, by their names:

- a folder: a run. As a target it must be new: a run at step 0, for `evaluate`, `predict` and `run --init_from`.
- NAME.npy: Caffe's layout (bvlc_alexnet.npy): by layer, kernels (height, width, in, out), channels blue, green, red.
- NAME.safetensors, or as a source NAME.pth, .pt, .tar or .ckpt: torchvision's names and layout. The state_dict may
  be inside a training checkpoint, or of a model inside DataParallel and the like.
- NAME.stablehlo, as a target: the forward pass from uint8 images (batch, height, width, RGB) to logits, on one device.

--config is the architecture of the source file, or the config of the target run. In all these files the features of the
towers are side by side, as in a grouped convolution. A study starts from a run or a file, without conversion, with
`alexnet-jax run --init_from=...`.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from ml_collections import ConfigDict

from alexnet_jax import config as config_lib
from alexnet_jax import model, parallel, train
from alexnet_jax.checkpoint import TrainedNetwork, save_run
from alexnet_jax.data import augment
from alexnet_jax.metrics import Progress
from alexnet_jax.parallel import TOWER
from alexnet_jax.run_dir import RunDir, atomic_write
from alexnet_jax.weights import READ_ONLY, describe_input, load_network, write_file


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


def convert(source: Path, target: Path, config: ConfigDict | None = None) -> TrainedNetwork:
    """Read a run or file and write it as another one; the names decide (see the module's docstring).

    A source that is a file needs a config. What cannot be read, does not fit or exists as a folder raises ValueError.
    """
    if target.name.lower().endswith(READ_ONLY):
        raise ValueError(f"{target}: must not be {target.suffix}, which is read only; PyTorch reads .safetensors, too")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target}: must be in an existing folder, and {target.parent} does not exist")
    network = load_network(source, config)
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
    parallel.initialize(1)
    config = None if arguments.config is None else config_lib.reference_run(arguments.config)
    network = convert(arguments.source, arguments.target, config)
    crop = network.config.data.crop
    print(
        f"{arguments.target}: {model.count_parameters(network.variables['params']):,} parameters; input "
        f"{crop}x{crop} pixels of 0 to 255, {describe_input(network.config)} (RGB)"
    )
