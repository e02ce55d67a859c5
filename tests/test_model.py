"""The net against the paper's numbers (figure 2, sections 3 and 5)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_config

from alexnet_jax import model, train
from alexnet_jax.data import DataSet
from alexnet_jax.evaluate import per_image
from alexnet_jax.towers import TOWER, Executor

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PARAMETERS = {
    "conv1": 34_944,
    "conv2": 307_456,
    "conv3": 885_120,
    "conv4": 663_936,
    "conv5": 442_624,
    "fc6": 37_752_832,
    "fc7": 16_781_312,
    "fc8": 4_097_000,
}


@pytest.fixture(scope="module")
def paper_params() -> dict:
    config = run_config("imagenet2012")
    return model.shapes(config.model, 1000, (224, 224, 3))


def test_the_papers_net_has_60_965_224_parameters(paper_params) -> None:
    assert {name: model.count_parameters(layer) for name, layer in paper_params.items()} == PARAMETERS
    assert model.count_parameters(paper_params) == 60_965_224


def test_every_parameter_belongs_to_one_tower(paper_params) -> None:
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(paper_params))
    convolutions = sum(model.count_parameters(paper_params[f"conv{i}"]) for i in range(1, 6))
    assert convolutions // 2 == 1_167_040


def test_kernels_see_what_the_paper_says_they_see(paper_params) -> None:
    """Section 3.5: 11x11x3, 5x5x48, 3x3x256, 3x3x192, 3x3x192; all of the 6x6x256 and 4096 neurons before."""
    assert {name: layer["kernel"].shape[1:] for name, layer in paper_params.items()} == {
        "conv1": (11, 11, 3, 48),
        "conv2": (5, 5, 48, 128),
        "conv3": (3, 3, 256, 192),
        "conv4": (3, 3, 192, 192),
        "conv5": (3, 3, 192, 128),
        "fc6": (6 * 6 * 256, 2048),
        "fc7": (4096, 2048),
        "fc8": (4096, 500),
    }


@pytest.mark.parametrize("window", [3, 2])
def test_maps_of_the_papers_net(window: int) -> None:
    """55, 27, 13, 13, 13 pixels a side, and 6 after the last pooling, which may overlap or not."""
    config = run_config("imagenet2012", **{"model.pool.window": window}).model
    net = model.AlexNet(config, 1000)
    images = jnp.zeros((1, 224, 224, 3))

    def shapes(key: jax.Array) -> dict:
        variables = net.init(key, images, train=False)
        return net.apply(variables, images, train=False, capture_intermediates=True, mutable=["intermediates"])[1]

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    captured = jax.eval_shape(jax.vmap(shapes, axis_name=TOWER), keys)["intermediates"]
    maps = {name: captured[name]["__call__"][0].shape[2:] for name in PARAMETERS}
    assert maps == {
        "conv1": (55, 55, 48),
        "conv2": (27, 27, 128),
        "conv3": (13, 13, 192),
        "conv4": (13, 13, 192),
        "conv5": (13, 13, 128),
        "fc6": (2048,),
        "fc7": (2048,),
        "fc8": (500,),
    }


@pytest.mark.parametrize(("scale", "classes", "channels"), [("embedded", 10, 1), ("imagenet2012", 1000, 3)])
def test_initial_loss_is_that_of_guessing(scale: str, classes: int, channels: int) -> None:
    config = run_config(scale)
    dataset = DataSet([None] * 1000, None, [], range(classes), channels)
    params = train.init_state(config, dataset).params
    generator = np.random.default_rng(0)
    images = generator.normal(0, 70 / config.data.std[0], (8, config.data.crop, config.data.crop, channels))
    net = model.AlexNet(config.model, classes)
    forward = jax.jit(
        jax.vmap(lambda p: net.apply({"params": p}, jnp.array(images), train=False), axis_name=TOWER, out_axes=None)
    )
    labels = jnp.array(generator.integers(0, classes, 8))
    assert abs(per_image(forward(params), labels)["loss"].mean() - np.log(classes)) < 0.2


def test_classes_that_do_not_divide_by_the_towers_are_padded_and_cut() -> None:
    config = run_config().model
    net = model.AlexNet(config, 7)
    images = jnp.array(np.random.default_rng(0).normal(size=(3, 24, 24, 1)))
    params = jax.tree.map(jnp.asarray, model.init(config, 7, images.shape[1:], 0))
    assert params["fc8"]["kernel"].shape == (2, 256, 4)
    forward = jax.jit(jax.vmap(lambda p: net.apply({"params": p}, images, train=False), axis_name=TOWER, out_axes=None))
    logits = forward(params)
    assert logits.shape == (3, 7)
    # The eighth neuron, the second tower's last, is the one that counts for nothing.
    params["fc8"]["bias"] = params["fc8"]["bias"].at[1, -1].set(100.0)
    np.testing.assert_array_equal(forward(params), logits)
    params["fc8"]["bias"] = params["fc8"]["bias"].at[1, -2].set(100.0)
    assert (forward(params)[:, 6] > 90).all()


def test_nets_that_share_a_layer_start_from_the_same_weights_there() -> None:
    config = run_config().model
    other = run_config(**{"model.order": ("conv1", "conv2", "conv4", "conv5", "fc6", "fc7", "fc8")}).model
    one = model.init(config, 10, (24, 24, 1), 3)
    two = model.init(other, 10, (24, 24, 1), 3)
    for name in ("conv1", "conv2", "conv5", "fc6", "fc7", "fc8"):
        np.testing.assert_array_equal(one[name]["kernel"], two[name]["kernel"])
    assert one["conv4"]["kernel"].shape != two["conv4"]["kernel"].shape


@pytest.mark.parametrize(("inverted", "kept", "tested"), [(False, 3.0, 1.5), (True, 6.0, 3.0)])
def test_dropout_masks_in_training_and_halves_in_testing(inverted: bool, kept: float, tested: float) -> None:
    """Section 4.2, with a net that is one dropout: half of the outputs are 0, the others are left as they are.

    Inverted, as others have it, they are doubled in training and left as they are in testing.
    """
    changes = {"model.order": ("fc6", "fc8"), "model.layers.fc6.then": ("dropout",), "model.dropout.inverted": inverted}
    config = run_config(**changes).model
    params = model.init(config, 4, (2, 2, 1), 0)
    eye = jnp.concatenate([jnp.eye(256)[:, :128][None], jnp.eye(256)[:, 128:][None]])
    params["fc6"] = {"kernel": jnp.zeros_like(params["fc6"]["kernel"]), "bias": jnp.full((2, 128), 3.0)}
    params["fc8"] = {"kernel": eye[..., :128], "bias": jnp.zeros((2, 128))}
    net = model.AlexNet(config, 256)
    images = jnp.ones((50, 2, 2, 1))

    def outputs(train: bool) -> jax.Array:
        def tower(p: dict, number: jax.Array) -> jax.Array:
            rngs = {"dropout": jax.random.fold_in(jax.random.key(0), number)}
            return net.apply({"params": p}, images, train=train, rngs=rngs)

        return Executor("vmap", 2).map(tower, in_axes=(0, 0), out_axes=None)(params, jnp.arange(2))

    assert (outputs(train=False) == tested).all()
    masked = outputs(train=True)
    assert set(np.unique(masked)) == {0.0, kept}
    assert 0.47 < (masked == 0).mean() < 0.53


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.crop": 8}, r"pooling window of 3x3 does not fit a map of 1x1: use larger images"),
        ({"model.layers.conv1.kernel": 29}, r"conv1: a kernel of 29x29 does not fit a map of 23x23 padded by 2\+2"),
    ],
)
def test_a_net_that_does_not_fit_its_images_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.prepare(run_config(**changes))


@pytest.mark.parametrize(
    ("key", "value", "same_parameters"),
    [
        ("model.activation", "tanh", True),
        ("model.lrn.enabled", False, True),
        ("model.lrn.n", 3, True),
        ("model.lrn.k", 1.0, True),
        ("model.lrn.alpha", 0.1, True),
        ("model.lrn.beta", 0.5, True),
        ("model.lrn.crosses", True, True),
        ("model.lrn.spatial.window", 3, True),
        ("model.lrn.spatial.k", 2.0, True),
        ("model.lrn.spatial.alpha", 0.1, True),
        ("model.lrn.spatial.beta", 0.5, True),
        ("model.pool.window", 2, True),
        ("model.init", "uniform", True),
        ("model.layers.conv2.bias_std", 0.5, True),
        ("model.layers.conv4.kind", "local", False),
        ("model.layers.conv1.then", ("activation", "lrn", "avg_pool"), True),
        ("model.layers.conv1.then", ("activation", "max_pool", "lrn"), True),
        ("model.layers.conv3.crosses", False, False),
        ("model.layers.conv2.padding", (1, 3), True),
        ("model.layers.fc6.features", 128, False),
        ("model.towers", 1, False),
    ],
)
def test_a_field_changes_the_function_and_only_some_the_parameters(key, value, same_parameters) -> None:
    everything = {"model.layers.conv2.then": ("activation", "lrn", "spatial_lrn", "max_pool"), "model.lrn.alpha": 0.01}
    config, changed = (run_config(**everything | change).model for change in ({}, {key: value}))
    images = jnp.array(np.random.default_rng(0).normal(size=(2, 23, 23, 1)))

    def logits_and_shapes(config) -> tuple[np.ndarray, dict]:
        params = model.init(config, 10, (23, 23, 1), 0)
        net = model.AlexNet(config, 10)
        forward = jax.vmap(lambda p: net.apply({"params": p}, images, train=False), axis_name=TOWER, out_axes=None)
        return np.asarray(jax.jit(forward)(params)), jax.tree.map(jnp.shape, params)

    one, shapes = logits_and_shapes(config)
    other, changed_shapes = logits_and_shapes(changed)
    assert not np.allclose(one, other, rtol=1e-6, atol=0)
    assert (shapes == changed_shapes) == same_parameters


def test_in_bfloat16_logits_and_gradients_are_close_and_parameters_stay_float32() -> None:
    exact, rough = (run_config(**{"model.dtype": dtype, "model.lrn.alpha": 0.01}).model for dtype in model.DTYPES)
    images = jnp.array(np.random.default_rng(0).normal(size=(8, 23, 23, 1)), jnp.float32)
    params = model.init(exact, 10, (23, 23, 1), 0)
    labels = jnp.arange(8)

    def of(config):
        net = model.AlexNet(config, 10)

        def tower(p: dict):
            def loss(p: dict):
                logits = net.apply({"params": p}, images, train=False)
                return per_image(logits, labels)["loss"].mean() / 2, logits

            return jax.grad(loss, has_aux=True)(p)

        return Executor("vmap", 2).map(lambda p: (tower(p)[0], tower(p)[1][None]), in_axes=(0,), out_axes=0)(params)

    gradients, logits = of(exact)
    rough_gradients, rough_logits = of(rough)
    assert {leaf.dtype for leaf in jax.tree.leaves((rough_gradients, rough_logits))} == {np.dtype(np.float32)}
    difference = np.abs(rough_logits - logits).max() / np.abs(logits).max()
    assert 1e-5 < difference < 0.03
    for name, layer in gradients.items():
        rough_layer = rough_gradients[name]
        kernel, rough_kernel = layer["kernel"].ravel(), rough_layer["kernel"].ravel()
        cosine = kernel @ rough_kernel / jnp.linalg.norm(kernel) / jnp.linalg.norm(rough_kernel)
        assert cosine > 0.95, name  # poolings have more equal maxima

    net = model.AlexNet(rough, 10)
    _, sown = jax.eval_shape(
        jax.vmap(lambda p: net.apply({"params": p}, images, train=False, mutable="intermediates"), axis_name=TOWER),
        params,
    )
    computed = {name: values.dtype for name, (values,) in sown["intermediates"].items()}
    exchanged = dict.fromkeys(("conv3", "fc6", "fc7", "fc8"), jnp.bfloat16) | {"logits": np.dtype(np.float32)}
    assert computed == {f"{name}_exchanged": dtype for name, dtype in exchanged.items()}
