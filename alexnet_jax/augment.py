"""What happens to a batch of images inside the jitted step: crops, flips, and the input's scale."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


def random_views(images: jax.Array, config: ConfigDict, key: jax.Array) -> jax.Array:
    """Training input (paper, section 4.1): random crops and horizontal flips, drawn anew for each image.

    Args:
      images: (batch, height, width, channels) of uint8.
      config: the ``data`` section of a config.

    Returns:
      (batch, config.crop, config.crop, channels) of float32.
    """
    crop_key, flip_key = jax.random.split(key)
    batch, height, width, channels = images.shape
    size = config.crop
    if config.augment.random_crop:
        limits = jnp.array([height - size + 1, width - size + 1])
        corners = jax.random.randint(crop_key, (batch, 2), 0, limits)

        def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, channels))

        views = jax.vmap(cut)(images, corners)
    else:
        views = _centre(images, size)
    if config.augment.flip:
        flipped = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        views = jnp.where(flipped, views[:, :, ::-1], views)
    return _standardise(views, config)


def centre_views(images: jax.Array, config: ConfigDict) -> jax.Array:
    """Evaluation input: the centre crop of each image; arguments and result as for ``random_views``."""
    return _standardise(_centre(images, config.crop), config)


def _centre(images: jax.Array, size: int) -> jax.Array:
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def _standardise(images: jax.Array, config: ConfigDict) -> jax.Array:
    return (images.astype(jnp.float32) - jnp.array(config.mean)) / config.std
