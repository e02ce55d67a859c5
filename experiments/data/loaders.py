"""Time one loader: python loaders.py KIND FOLDER BATCH

measure.py starts it. FOLDER/images has the JPEGs and FOLDER/datasets the same ones prepared. After a first pass over
all images it prints "ready"; for each line on standard input it runs another pass and prints the images per second.
Only what KIND needs is imported.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

THREADS = 2


def alexnet_jax(folder: Path, batch: int) -> Callable[[int], Iterator[np.ndarray]]:
    """Return this repository's loader: Grain threads shuffle, decode and batch an ArrayRecord dataset."""
    from alexnet_jax.configs import base
    from alexnet_jax.data import datasets, loader

    config = base.get_config("imagenette")
    config.data.update(name="images", data_dir=str(folder / "datasets"), threads=THREADS)
    config.train.batch_size = batch
    source = datasets.load(config.data).train

    def read(epoch: int) -> Iterator[np.ndarray]:
        steps = len(source) // batch
        for examples in loader.train_batches(source, config, seed=epoch, start=0, stop=steps):
            yield examples["image"]

    return read


def torch(folder: Path, batch: int) -> Callable[[int], Iterator[np.ndarray]]:
    """Return PyTorch's DataLoader with two worker processes and Pillow."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    class Images(Dataset):
        files = sorted((folder / "images").rglob("*.jpg"))

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, position: int) -> np.ndarray:
            with Image.open(self.files[position]) as image:
                return np.array(image.convert("RGB"))

    loader = DataLoader(Images(), batch, shuffle=True, num_workers=THREADS, drop_last=True, persistent_workers=True)
    return lambda epoch: (images.numpy() for images in loader)


def tensorflow(folder: Path, batch: int, dct: str = "INTEGER_ACCURATE") -> Callable[[int], Iterator[np.ndarray]]:
    """Return tf.data with two parallel calls and the exact JPEG decoder, as in the other loaders."""
    import tensorflow as tf

    files = sorted(map(str, (folder / "images").rglob("*.jpg")))

    def decode(path):
        return tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method=dct)

    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files))
    dataset = dataset.map(decode, num_parallel_calls=THREADS).batch(batch, drop_remainder=True).prefetch(8)
    return lambda epoch: dataset.as_numpy_iterator()


def tensorflow_approximate(folder: Path, batch: int) -> Callable[[int], Iterator[np.ndarray]]:
    """Return tf.data with its default decoder, which approximates: pixels differ by a few grey levels."""
    return tensorflow(folder, batch, dct="")


LOADERS = {loader.__name__: loader for loader in (alexnet_jax, torch, tensorflow, tensorflow_approximate)}


def main() -> None:
    """Warm up, then time a pass for each line of standard input."""
    kind, folder, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    read = LOADERS[kind](folder, batch)
    sum(1 for _ in read(0))
    print("ready", flush=True)
    for epoch, _ in enumerate(sys.stdin, 1):
        began = time.perf_counter()
        shapes = [images.shape for images in read(epoch)]
        seconds = time.perf_counter() - began
        assert set(shapes) == {(batch, 256, 256, 3)}
        print(batch * len(shapes) / seconds, flush=True)


if __name__ == "__main__":
    main()
