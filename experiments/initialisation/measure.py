"""Measure how much the logits depend on the image before training: python experiments/initialisation/measure.py

Writes results.csv, a row per network and seed, and prints the table.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from alexnet_jax import model
from alexnet_jax.config import reference_run
from alexnet_jax.data import augment, statistics
from alexnet_jax.parallel import TOWER
from alexnet_jax.studies import analysis

NETWORKS = {  # config, divisor of the pixels
    "paper": ("paper", 1.0),
    "code2012": ("code2012", 1.0),
    "caffe_alexnet": ("caffe_alexnet", 1.0),
    "paper, pixels / 58": ("paper", 58.0),
    "code2012, pixels / 58": ("code2012", 58.0),
}
IMAGES = 16


def photo_like_noise(size: int) -> np.ndarray:
    """Return noise whose amplitudes fall as 1/f, as those of photographs do: uint8 (images, size, size, 3)."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    frequency[0, 0] = 1 / size
    spectrum = np.fft.fft2(generator.normal(size=(IMAGES, 3, size, size))) / frequency
    noise = np.fft.ifft2(spectrum).real
    grey, colour = noise.mean(1, keepdims=True), noise - noise.mean(1, keepdims=True)
    mixed = grey / grey.std((2, 3), keepdims=True) + 0.3 * colour / colour.std((2, 3), keepdims=True)
    return np.clip(120 + 60 * mixed, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def dependence(name: str, divisor: float, seeds: range) -> list[float]:
    """Return for each seed the logits' standard deviation over images, averaged over classes, relative to their RMS."""
    config = reference_run(importlib.import_module(f"alexnet_jax.configs.networks.{name}").get_config())
    with config.unlocked():
        config.data.update(subtract="mean", mean=(122.7, 116.7, 104.0), std=(divisor,))
    (centre,) = augment.evaluation_views(1, config.data.image_size, config.data.crop)
    images = augment.inputs(
        photo_like_noise(config.data.image_size), centre, config.data, statistics.uniform(config.data, 3)
    )
    network = model.AlexNet(config.model, 1000)

    @jax.jit
    def compute_logits(variables: Any) -> jax.Array:
        def tower(variables: Any) -> Any:
            return network.apply(variables, images, train=False)

        return jax.vmap(tower, axis_name=TOWER, out_axes=None)(variables)

    ratios = []
    for seed in seeds:
        variables = model.init(config.model, 1000, images.shape[1:], seed)
        logits = np.asarray(compute_logits(variables), np.float64)
        ratios.append(float(logits.std(0).mean() / np.sqrt((logits**2).mean())))
    return ratios


def main() -> None:
    """Measure every network with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of results.csv")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    rows = [
        {"network": label, "seed": seed, "dependence": value}
        for label, (name, divisor) in NETWORKS.items()
        for seed, value in zip(seeds, dependence(name, divisor, seeds), strict=True)
    ]
    results = pd.DataFrame(rows)
    results.to_csv(arguments.folder / "results.csv", index=False)
    for network, group in results.groupby("network", sort=False):
        mean, low, high = analysis.mean_and_interval(group["dependence"].to_numpy())
        print(f"{network:24} n = {len(group)}   {mean:.5f}   95 % CI {low:.5f} to {high:.5f}")


if __name__ == "__main__":
    main()
