"""How much the logits depend on the image before training: python experiments/initialisation/measure.py

Writes results.csv beside it and prints the table; `--seeds=1` for a first look.
"""

import argparse
import importlib
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from alexnet_jax import augment, model, pixels, report
from alexnet_jax.config import reference_run
from alexnet_jax.towers import TOWER

NETS = {
    "paper": ("paper", 1.0),
    "code2012": ("code2012", 1.0),
    "caffe_alexnet": ("caffe_alexnet", 1.0),
    "paper, pixels / 58": ("paper", 58.0),
    "code2012, pixels / 58": ("code2012", 58.0),
}
IMAGES = 16


def photo_like(size: int) -> np.ndarray:
    """Noise whose amplitudes fall as 1/f, as those of photographs do: uint8 (images, size, size, 3)."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    frequency[0, 0] = 1 / size
    spectrum = np.fft.fft2(generator.normal(size=(IMAGES, 3, size, size))) / frequency
    noise = np.fft.ifft2(spectrum).real
    grey, colour = noise.mean(1, keepdims=True), noise - noise.mean(1, keepdims=True)
    mixed = grey / grey.std((2, 3), keepdims=True) + 0.3 * colour / colour.std((2, 3), keepdims=True)
    return np.clip(120 + 60 * mixed, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def dependence(name: str, divisor: float, seeds: range) -> list[float]:
    """The logits' standard deviation over images, mean of all units, over their root mean square, for each seed."""
    config = reference_run(importlib.import_module(f"configs.nets.{name}").get_config())
    with config.unlocked():
        config.data.update(subtract="mean", mean=(122.7, 116.7, 104.0), std=(divisor,))
    (centre,) = augment.evaluation_views(1, config.data.image_size, config.data.crop)
    seen = pixels.uniform(config.data, 3)
    images = augment.inputs(photo_like(config.data.image_size), centre, config.data, seen)
    net = model.AlexNet(config.model, 1000)

    @jax.jit
    def logits(params: dict) -> jax.Array:
        return jax.vmap(lambda own: net.apply({"params": own}, images, train=False), axis_name=TOWER, out_axes=None)(
            params
        )

    drawn = (model.init(config.model, 1000, images.shape[1:], seed) for seed in seeds)
    every = [np.asarray(logits(params), np.float64) for params in drawn]
    return [float(values.std(0).mean() / np.sqrt((values**2).mean())) for values in every]


def main() -> None:
    """Measures every net with every seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    rows = [
        {"net": label, "seed": seed, "dependence": value}
        for label, (name, divisor) in NETS.items()
        for seed, value in zip(seeds, dependence(name, divisor, seeds), strict=True)
    ]
    measured = pd.DataFrame(rows)
    measured.to_csv(Path(__file__).with_name("results.csv"), index=False)
    print(report.compare(measured.rename(columns={"net": "arm"}), "dependence")[["n", "mean", "low", "high"]])


if __name__ == "__main__":
    main()
