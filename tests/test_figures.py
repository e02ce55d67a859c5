"""Figure 3: the first kernels as a picture, and how colour-specific they are as a number."""

import numpy as np

from alexnet_jax import kernels


def test_kernels_are_shown_tower_by_tower() -> None:
    weights = np.zeros((2, 5, 4, 3, 20))
    weights[0, 0, 0, 0, 17] = 2.0  # the first tower's second row, second column: all red in a corner
    weights[1, ..., 3] = -1.0  # the second tower's first row, fourth column: all black
    picture = kernels.picture(weights)
    assert picture.shape == (2 * 2 * 6, 16 * 5, 3)
    np.testing.assert_array_equal(picture[6, 5], [1.0, 0.5, 0.5])
    assert (picture[12:17, 15:19] == 0).all()
    picture[6, 5] = picture[12:17, 15:19] = 0.5
    assert set(np.unique(picture)) == {0.5, 1.0}  # zero is grey, gaps are white


def test_grey_kernels_are_grey() -> None:
    picture = kernels.picture(np.random.default_rng(0).normal(size=(2, 5, 5, 1, 4)))
    assert (picture == picture[..., :1]).all()
    assert (picture.min(), picture.max()) >= (0.0, 1.0)


def test_the_colour_share_is_that_off_the_grey_axis() -> None:
    weights = np.zeros((1, 2, 2, 3, 4))
    weights[0, 0, 0, :, 0] = 2.0  # grey
    weights[0, 1, :, :, 1] = [1.0, -1.0, 0.0]  # a colour that is no brightness
    weights[0, 0, 1, 0, 2] = 5.0  # red: a third of its energy is grey
    weights[0, ..., 3] = np.random.default_rng(0).normal(size=(2, 2, 3)) * 1e-3
    shares = kernels.colour_shares(weights)[0]
    np.testing.assert_allclose(shares[:3], [0.0, 1.0, 2 / 3], atol=1e-12)
    np.testing.assert_allclose(kernels.colour_shares(weights * 7)[0], shares)  # how large they are does not count
    noise = np.random.default_rng(0).normal(size=(1, 11, 11, 3, 500))
    assert abs(kernels.colour_metrics(noise)["colour/share"] - 2 / 3) < 0.01


def test_towers_that_share_the_work_exceed_chance_and_others_do_not() -> None:
    generator = np.random.default_rng(0)
    grey = np.repeat(generator.normal(size=(1, 5, 5, 1, 48)), 3, axis=3)
    colour = generator.normal(size=(1, 5, 5, 3, 48))
    colour -= colour.mean(axis=3, keepdims=True)
    divided = kernels.colour_metrics(np.concatenate([grey, colour]))
    assert divided["colour/difference"] == kernels.colour_metrics(np.concatenate([colour, grey]))["colour/difference"]
    np.testing.assert_allclose(divided["colour/difference"], 1.0)
    assert divided["colour/excess"] > 0.8
    excesses = [kernels.colour_metrics(generator.normal(size=(2, 5, 5, 3, 48)))["colour/excess"] for _ in range(50)]
    assert abs(np.mean(excesses)) < 2.5 * np.std(excesses) / 50**0.5


def test_grey_images_have_no_colour_and_one_tower_no_difference() -> None:
    generator = np.random.default_rng(0)
    assert kernels.colour_metrics(generator.normal(size=(2, 5, 5, 1, 4))) == {}
    assert set(kernels.colour_metrics(generator.normal(size=(1, 5, 5, 3, 4)))) == {"colour/share"}
