"""Input transformations inside the compiled step: crops, flips, colour noise, mean subtraction and scaling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from alexnet_jax.data.statistics import Statistics
from alexnet_jax.parallel import per_example

Images = jax.Array | np.ndarray  # uint8 (batch, image_size, image_size, channels)


class View(NamedTuple):
    """A square crop of an image: first row and column, in pixels. A field may have one value for each image."""

    top: ArrayLike
    left: ArrayLike
    flipped: ArrayLike  # horizontally


def evaluation_views(count: int, image_size: int, crop: int) -> list[View]:
    """Return the views to average over at test time (paper, section 4.1); sizes are sides, in pixels.

    One view is the centre; ten are the four corners and the centre, then the mirror images of these five.
    """
    border = image_size - crop
    centre = View(border // 2, border // 2, False)
    if count == 1:
        return [centre]
    five = [*(View(top, left, False) for top in (0, border) for left in (0, border)), centre]
    return five + [view._replace(flipped=True) for view in five]


def inputs(images: Images, view: View, data_config: ConfigDict, statistics: Statistics) -> jax.Array:
    """Return the network's input: a view of each image, minus the mean, divided by `data.std`; float32."""
    return _crop_and_subtract(images, view, data_config, statistics) / jnp.array(data_config.std)


def random_inputs(
    images: Images,
    positions: jax.Array,
    data_config: ConfigDict,
    statistics: Statistics,
    key: jax.Array,
    noise_on: ArrayLike = True,
) -> jax.Array:
    """Return training input (paper, section 4.1): random crops, horizontal flips and colour noise.

    Args:
      positions: int (batch,), of the images in the global batch; with the key, they determine the random numbers.
      key: the step's random key.
      noise_on: bool scalar, whether to add colour noise at this step.
    """
    crop_key, flip_key, colour_key = jax.random.split(key, 3)
    augment = data_config.augment
    crop_positions = positions // augment.code2012.images_per_crop
    (view,) = evaluation_views(1, data_config.image_size, data_config.crop)
    if augment.random_crop:
        offsets = data_config.image_size - data_config.crop + 1
        top, left = per_example(lambda key: jax.random.randint(key, (2,), 0, offsets), crop_key, crop_positions).T
        view = view._replace(top=top, left=left)
    if augment.flip:
        view = view._replace(flipped=per_example(jax.random.bernoulli, flip_key, crop_positions))
    views = _crop_and_subtract(images, view, data_config, statistics)
    if augment.colour.noise:
        noise = per_example(lambda key: _colour_noise(augment.colour, statistics, key), colour_key, positions)
        noisy = views + noise[:, None, None, :]
        if augment.code2012.shrink_noise:
            noisy = noisy / (1 + augment.colour.noise)
        views = jnp.where(noise_on, noisy, views)
    return views / jnp.array(data_config.std)


def _colour_noise(colour_config: ConfigDict, statistics: Statistics, key: jax.Array) -> jax.Array:
    """Sample what is added to all pixels of an image, (3,) grey levels: normal along each principal colour axis.

    The paper's text (section 4.1) scales the normal number by the axis's eigenvalue, a variance, which depends on the
    unit of the pixels; the 2012 code scales it by the standard deviation.
    """
    scales = statistics.deviations
    if colour_config.eigenvalue_unit is not None:
        scales = (scales / colour_config.eigenvalue_unit) ** 2 * colour_config.eigenvalue_unit
    return (colour_config.noise * jax.random.normal(key, (3,)) * scales) @ statistics.axes


def _crop_and_subtract(images: Images, view: View, data_config: ConfigDict, statistics: Statistics) -> jax.Array:
    """Return the views of the images, minus the mean."""
    batch, *_, channels = images.shape
    size = (data_config.crop, data_config.crop, channels)
    (centre,) = evaluation_views(1, data_config.image_size, data_config.crop)
    central_mean = jax.lax.dynamic_slice(statistics.mean, (centre.top, centre.left, 0), size)

    def crop_one(image: Images, top: jax.Array, left: jax.Array, flipped: jax.Array) -> jax.Array:
        def crop(array: Images) -> jax.Array:
            square = jax.lax.dynamic_slice(array, (top, left, 0), size)
            return jnp.where(flipped, square[:, ::-1], square)

        # The 2012 code subtracts the centre of the mean image from every view; a uniform mean has no other value.
        mean = crop(statistics.mean) if data_config.subtract == "mean_image" else central_mean
        return crop(image).astype(jnp.float32) - mean

    return jax.vmap(crop_one)(images, *(jnp.broadcast_to(jnp.array(field), batch) for field in view))
