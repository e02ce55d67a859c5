"""The first layer's kernels, as the paper's figure 3 shows them, and what it says of them as a number. Needs no JAX."""

import numpy as np

SHUFFLES = 1000


def picture(kernels: np.ndarray) -> np.ndarray:
    """Kernels as figure 3 shows them: one tower's in the upper rows, the next one's below.

    Args:
      kernels: (towers, height, width, channels, features) with 1 or 3 channels.

    Returns:
      (height, width, 3) from 0 to 1; each kernel is scaled to its own largest value, grey is zero.
    """
    towers, height, width, _, features = kernels.shape
    columns = min(features, 16)
    rows = -(-features // columns)
    kernels = kernels / np.abs(kernels).max(axis=(1, 2, 3), keepdims=True).clip(1e-12)
    pixels = np.full((towers * rows, height + 1, columns, width + 1, 3), 1.0)
    for tower in range(towers):
        for feature in range(features):
            row, column = divmod(feature, columns)
            pixels[tower * rows + row, :height, column, :width] = 0.5 + 0.5 * kernels[tower, ..., feature]
    return pixels.reshape(towers * rows * (height + 1), columns * (width + 1), 3)


def colour_shares(kernels: np.ndarray) -> np.ndarray:
    """The share of each kernel's energy (its sum of squares) that lies off the grey axis: 0 sees no colour.

    Args:
      kernels: (towers, height, width, 3, features).

    Returns:
      (towers, features), from 0 to 1; noise has 2/3.
    """
    grey = kernels.sum(axis=3) ** 2 / kernels.shape[3]
    energy = (kernels**2).sum(axis=(1, 2, 3))
    return 1 - grey.sum(axis=(1, 2)) / energy.clip(1e-12)


def colour_metrics(kernels: np.ndarray) -> dict[str, float]:
    """How colour-specific the kernels are, and whether one of two towers is more so (paper, section 6.1).

    Args:
      kernels: (towers, height, width, channels, features).

    Returns:
      Nothing for grey images. Otherwise ``colour/share``, the mean over all kernels; with two towers also
      ``colour/difference`` between their means, which one is the larger not counting, and ``colour/excess``: how much
      more that is than if the same kernels were dealt to the towers by chance (``SHUFFLES`` times).
    """
    if kernels.shape[3] != 3:
        return {}
    shares = colour_shares(kernels)
    found = {"colour/share": float(shares.mean())}
    if len(shares) != 2:
        return found
    difference = abs(float(shares[0].mean() - shares[1].mean()))
    pool, generator = shares.ravel(), np.random.default_rng(0)
    dealt = np.stack([generator.permutation(pool) for _ in range(SHUFFLES)]).reshape(SHUFFLES, *shares.shape).mean(2)
    by_chance = float(np.abs(dealt[:, 0] - dealt[:, 1]).mean())
    return found | {"colour/difference": difference, "colour/excess": difference - by_chance}
