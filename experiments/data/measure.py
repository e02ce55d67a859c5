"""How fast JPEGs are decoded and batched: python experiments/data/measure.py --data_dir=... [--tensorflow=...]

Ours, PyTorch's DataLoader and tf.data, on the same pictures of 256 pixels, in turn. Writes results.csv beside it.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from alexnet_jax import batches, data, originals, pictures, prepare
from configs import base

SIZE, BATCH = 256, 128
HERE = Path(__file__).parent


def write_pictures(folder: Path, name: str, data_dir: str, count: int) -> None:
    """Photos of a prepared set as JPEGs of 256 pixels: in two classes, as a folder, and prepared."""
    config = base.get_config("imagenette")
    config.data.update(name=name, data_dir=data_dir)
    source = data.load(config.data).train
    for position in range(count):
        split = "val" if position % 100 >= 98 else "train"  # a folder needs held-out ones; nothing is measured on them
        path = folder / "pictures" / split / str(position % 2) / f"{position}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        (square,) = batches.read(source, np.array([position]), SIZE)["image"]
        Image.fromarray(square).save(path, quality=pictures.JPEG_QUALITY)
    prepare.prepare(originals.folder(folder / "pictures"), SIZE, str(folder / "sets"))
    for held_out in (folder / "pictures" / "val").rglob("*.jpg"):
        held_out.unlink()


def main() -> None:
    """Measures all loaders in turn and prints their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="imagenette_224", help="a prepared set of photos")
    parser.add_argument("--data_dir", default="", help="where it is")
    parser.add_argument("--tensorflow", help="a Python that has TensorFlow and NumPy; left out without")
    parser.add_argument("--count", type=int, default=5120)
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    pythons = {
        "alexnet_jax": sys.executable,
        "torch": sys.executable,
        "tensorflow": arguments.tensorflow,
        "tensorflow_approximate": arguments.tensorflow,
    }
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        write_pictures(Path(temporary), arguments.name, arguments.data_dir, arguments.count)
        loaders = {
            kind: subprocess.Popen(
                [python, HERE / "loaders.py", kind, temporary, str(BATCH)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for kind, python in pythons.items()
            if python
        }
        for kind, loader in loaders.items():
            if loader.stdout.readline() != "ready\n":
                sys.exit(f"{kind}: does not start; is it installed?")
        for repetition in range(arguments.repetitions):
            for kind, loader in loaders.items():
                loader.stdin.write("go\n")
                loader.stdin.flush()
                rows.append(
                    {"loader": kind, "repetition": repetition, "images_per_second": float(loader.stdout.readline())}
                )
        for loader in loaders.values():
            loader.stdin.close()
            loader.wait()
    results = pd.DataFrame(rows)
    results.round(1).to_csv(HERE / "results.csv", index=False)
    table = results.groupby("loader", sort=False)["images_per_second"].agg(["count", "median", "min", "max"])
    table["ratio to ours"] = table["median"] / table["median"]["alexnet_jax"]
    print(table.round({"median": 0, "min": 0, "max": 0, "ratio to ours": 2}).to_string())


if __name__ == "__main__":
    main()
