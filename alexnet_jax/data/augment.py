"""What happens to a batch of images inside the jitted step: views, colour noise, the mean, the input's scale."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from alexnet_jax.pixels import Pixels
from alexnet_jax.towers import drawn


class View(NamedTuple):
    """A square of an image. Each field is one number, or one for each image of a batch.

    Attributes:
      top: of its first row, in pixels.
      left: of its first column, in pixels.
      flipped: whether left and right change places.
    """

    top: jax.typing.ArrayLike
    left: jax.typing.ArrayLike
    flipped: jax.typing.ArrayLike


def evaluation_views(count: int, image_size: int, crop: int) -> list[View]:
    """The views that are averaged at test time (paper, section 4.1).

    Args:
      count: 1, the centre; or 10, the four corners and the centre, and then the mirror images of the five.
    """
    border = image_size - crop
    centre = View(border // 2, border // 2, False)
    if count == 1:
        return [centre]
    five = [*(View(top, left, False) for top in (0, border) for left in (0, border)), centre]
    return five + [view._replace(flipped=True) for view in five]


def inputs(images: jax.Array, view: View, config: ConfigDict, pixels: Pixels) -> jax.Array:
    """A view of each image, less the mean, divided by ``std``.

    Args:
      images: (batch, image_size, image_size, channels) of uint8.
      config: the ``data`` section of a config.

    Returns:
      (batch, config.crop, config.crop, channels) of float32.
    """
    return _centred(images, view, config, pixels) / jnp.array(config.std)


def random_inputs(
    images: jax.Array,
    positions: jax.Array,
    config: ConfigDict,
    pixels: Pixels,
    key: jax.Array,
    colours: jax.typing.ArrayLike = True,
) -> jax.Array:
    """Training input (paper, section 4.1): random crops, horizontal flips and colour noise, drawn anew for each image.

    Args:
      positions: int (batch,), of each image in the whole batch: with the key, all that what is drawn depends on.
      colours: whether there is colour noise (yet).

    The other arguments and the result are as for ``inputs``.
    """
    crop_key, flip_key, colour_key = jax.random.split(key, 3)
    chunks = positions // config.augment.chunk
    (view,) = evaluation_views(1, config.image_size, config.crop)
    if config.augment.random_crop:
        places = config.image_size - config.crop + 1
        top, left = drawn(lambda key: jax.random.randint(key, (2,), 0, places), crop_key, chunks).T
        view = view._replace(top=top, left=left)
    if config.augment.flip:
        view = view._replace(flipped=drawn(jax.random.bernoulli, flip_key, chunks))
    views = _centred(images, view, config, pixels)
    colour = config.augment.colour
    if colour.noise:
        noise = drawn(lambda key: colour_noise(colour, pixels, key), colour_key, positions)[:, None, None, :]
        noisy = (views + noise) / (1 + colour.noise if colour.shrink else 1)
        views = jnp.where(colours, noisy, views)
    return views / jnp.array(config.std)


def colour_noise(config: ConfigDict, pixels: Pixels, key: jax.Array) -> jax.Array:
    """What is added to all pixels of an image: normal along each principal axis of the colours.

    The paper's text (section 4.1) multiplies the normal number by the axis's eigenvalue, a variance, which depends on
    the unit; its code by the square root.

    Args:
      config: ``data.augment.colour``.

    Returns:
      (3,) grey levels.
    """
    scales = jnp.array(pixels.deviations)
    if config.eigenvalue_unit is not None:
        scales = (scales / config.eigenvalue_unit) ** 2 * config.eigenvalue_unit
    return (config.noise * jax.random.normal(key, (3,)) * scales) @ jnp.array(pixels.axes)


def _centred(images: jax.Array, view: View, config: ConfigDict, pixels: Pixels) -> jax.Array:
    """The views of the images, less the mean."""
    batch, *_, channels = images.shape
    size = (config.crop, config.crop, channels)
    means = jnp.array(pixels.mean)
    (centre,) = evaluation_views(1, config.image_size, config.crop)
    central = jax.lax.dynamic_slice(means, (centre.top, centre.left, 0), size)

    def cut(image: jax.Array, top: jax.Array, left: jax.Array, flipped: jax.Array) -> jax.Array:
        def seen(whole: jax.Array) -> jax.Array:
            square = jax.lax.dynamic_slice(whole, (top, left, 0), size)
            return jnp.where(flipped, square[:, ::-1], square)

        # The 2012 code takes the centre of the mean image from every view; a uniform mean has the same everywhere.
        return seen(image).astype(jnp.float32) - (seen(means) if config.subtract == "mean_image" else central)

    return jax.vmap(cut)(images, *(jnp.broadcast_to(jnp.array(field), batch) for field in view))
