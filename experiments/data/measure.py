"""Benchmark JPEG loaders: python experiments/data/measure.py --data_dir=... [--tensorflow=PYTHON]

Runs this repository's loader, PyTorch's DataLoader and tf.data on the same images of 256 x 256 pixels, interleaved.
Writes results.csv, a row per repetition, and prints medians.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from alexnet_jax.configs import base
from alexnet_jax.data import datasets, image_io, loader, prepare, sources

SIZE, BATCH = 256, 128
HERE = Path(__file__).parent


def write_images(folder: Path, name: str, data_dir: str, count: int) -> None:
    """Write images of a prepared dataset as JPEGs in two class folders, and prepare these."""
    config = base.get_config("imagenette")
    config.data.update(name=name, data_dir=data_dir)
    source = datasets.load(config.data).train
    for position in range(count):
        split = "val" if position % 100 >= 98 else "train"  # a folder must have both; only train is measured
        path = folder / "images" / split / str(position % 2) / f"{position}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image,) = loader.read(source, np.array([position]), SIZE)["image"]
        Image.fromarray(image).save(path, quality=image_io.JPEG_QUALITY)
    prepare.prepare(sources.folder(folder / "images"), SIZE, str(folder / "datasets"))
    for held_out in (folder / "images" / "val").rglob("*.jpg"):
        held_out.unlink()


def start(kind: str, python: str, folder: str) -> subprocess.Popen:
    """Start a loader and wait until it has read all images once."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([python, HERE / "loaders.py", kind, folder, str(BATCH)], text=True, **pipes)
    if process.stdout.readline() != "ready\n":
        sys.exit(f"{kind}: does not start; is it installed?")
    return process


def measure(pythons: dict[str, str], folder: str, repetitions: int) -> pd.DataFrame:
    """Return a row for each repetition of each loader."""
    processes = {kind: start(kind, python, folder) for kind, python in pythons.items()}
    rows = []
    for repetition in range(repetitions):
        for kind, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            rate = float(process.stdout.readline())
            rows.append({"loader": kind, "repetition": repetition, "images_per_second": rate})
    for process in processes.values():
        process.communicate()
    return pd.DataFrame(rows)


def main() -> None:
    """Measure all loaders, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="imagenette_224", help="a prepared dataset of photographs")
    parser.add_argument("--data_dir", default="", help="its folder; default: TFDS's")
    parser.add_argument("--tensorflow", help="a Python that has TensorFlow and NumPy; default: leave tf.data out")
    parser.add_argument("--count", type=int, default=5120, help="images")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=HERE, help="of results.csv")
    arguments = parser.parse_args()
    pythons = {"alexnet_jax": sys.executable, "torch": sys.executable}
    if arguments.tensorflow:
        pythons |= {"tensorflow": arguments.tensorflow, "tensorflow_approximate": arguments.tensorflow}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), arguments.name, arguments.data_dir, arguments.count)
        results = measure(pythons, folder, arguments.repetitions)
    results.round(1).to_csv(arguments.folder / "results.csv", index=False)
    table = results.groupby("loader", sort=False)["images_per_second"].agg(["count", "median", "min", "max"])
    table["ratio to ours"] = table["median"] / table["median"]["alexnet_jax"]
    print(table.round({"median": 0, "min": 0, "max": 0, "ratio to ours": 2}).to_string())


if __name__ == "__main__":
    main()
