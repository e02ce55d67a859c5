"""Three loaders of the same JPEGs; each times a pass over all of them whenever a line comes in on standard input.

Run by measure.py: python loaders.py KIND FOLDER BATCH, where FOLDER/pictures has the JPEGs and FOLDER/sets the same
ones prepared. Only what KIND needs is imported.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

THREADS = 2


def alexnet_jax(folder: Path, batch: int) -> Callable[[int], Iterator[np.ndarray]]:
    """The run's own: shuffled, decoded and batched by Grain's threads, from ArrayRecord."""
    from alexnet_jax import batches, data
    from configs import base

    config = base.get_config("imagenette")
    config.data.update(name="pictures", data_dir=str(folder / "sets"), threads=THREADS)
    config.train.batch_size = batch
    source = data.load(config.data).train

    def read(epoch: int) -> Iterator[np.ndarray]:
        steps = len(source) // batch
        for example in batches.train_batches(source, config, seed=epoch, start=0, stop=steps):
            yield example["image"]

    return read


def torch(folder: Path, batch: int) -> Callable[[int], Iterator[np.ndarray]]:
    """PyTorch's DataLoader, with two worker processes and Pillow."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    class Pictures(Dataset):
        files = sorted((folder / "pictures").rglob("*.jpg"))

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, position: int) -> np.ndarray:
            with Image.open(self.files[position]) as picture:
                return np.array(picture.convert("RGB"))

    loader = DataLoader(Pictures(), batch, shuffle=True, num_workers=THREADS, drop_last=True, persistent_workers=True)
    return lambda epoch: (images.numpy() for images in loader)


def tensorflow(folder: Path, batch: int, dct: str = "INTEGER_ACCURATE") -> Callable[[int], Iterator[np.ndarray]]:
    """tf.data, with two parallel calls; decoded as exactly as the others do, which is not its default."""
    import tensorflow as tf

    files = sorted(map(str, (folder / "pictures").rglob("*.jpg")))

    def decode(path):
        return tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method=dct)

    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files))
    dataset = dataset.map(decode, num_parallel_calls=THREADS).batch(batch, drop_remainder=True).prefetch(8)
    return lambda epoch: dataset.as_numpy_iterator()


def tensorflow_approximate(folder: Path, batch: int) -> Callable[[int], Iterator[np.ndarray]]:
    """tf.data as it comes: its decoder's cosine transform is an approximation, some grey levels off."""
    return tensorflow(folder, batch, dct="")


LOADERS = {loader.__name__: loader for loader in (alexnet_jax, torch, tensorflow, tensorflow_approximate)}


def main() -> None:
    """Warms up, then prints images per second for each line that comes in."""
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
