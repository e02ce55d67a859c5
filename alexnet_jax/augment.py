"""What happens to a batch of images inside the jitted step: crops, flips, colour noise, and the input's scale."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


def random_views(
    images: jax.Array, config: ConfigDict, key: jax.Array, colours: jax.typing.ArrayLike = True
) -> jax.Array:
    """Training input (paper, section 4.1): random crops, horizontal flips and colour noise, drawn anew for each image.

    Args:
      images: (batch, height, width, channels) of uint8.
      config: the ``data`` section of a config.
      colours: whether there is colour noise (yet).

    Returns:
      (batch, config.crop, config.crop, channels) of float32.
    """
    crop_key, flip_key, colour_key = jax.random.split(key, 3)
    batch, height, width, channels = images.shape
    size, chunk = config.crop, config.augment.chunk
    draws = -(-batch // chunk)
    if config.augment.random_crop:
        limits = jnp.array([height - size + 1, width - size + 1])
        corners = jax.random.randint(crop_key, (draws, 2), 0, limits).repeat(chunk, axis=0)[:batch]

        def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, channels))

        views = jax.vmap(cut)(images, corners)
    else:
        views = _centre(images, size)
    if config.augment.flip:
        flipped = jax.random.bernoulli(flip_key, shape=(draws, 1, 1, 1)).repeat(chunk, axis=0)[:batch]
        views = jnp.where(flipped, views[:, :, ::-1], views)
    views = views.astype(jnp.float32) - jnp.array(config.mean)
    colour = config.augment.colour
    if colour.noise:
        noise = colour_noise(colour, colour_key, batch)[:, None, None, :]
        noisy = (views + noise) / (1 + colour.noise if colour.shrink else 1)
        views = jnp.where(colours, noisy, views)
    return views / jnp.array(config.std)


def colour_noise(config: ConfigDict, key: jax.Array, batch: int) -> jax.Array:
    """What is added to all pixels of an image: normal along each principal axis of the colours.

    The paper's text (section 4.1) multiplies the normal number by the axis's eigenvalue, which depends on the unit;
    its code by the square root, the standard deviation, as here.

    Args:
      config: ``data.augment.colour``.

    Returns:
      (batch, 3) grey levels.
    """
    shares = config.noise * jax.random.normal(key, (batch, len(config.stds)))
    return (shares * jnp.array(config.stds)) @ jnp.array(config.axes)


def centre_views(images: jax.Array, config: ConfigDict) -> jax.Array:
    """Evaluation input: the centre crop of each image; arguments and result as for ``random_views``."""
    return (_centre(images, config.crop).astype(jnp.float32) - jnp.array(config.mean)) / jnp.array(config.std)


def _centre(images: jax.Array, size: int) -> jax.Array:
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]
