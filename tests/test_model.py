"""The network against the paper's numbers (figure 2, sections 3 and 5)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from alexnet_jax import model, train
from alexnet_jax.config import ACTIVATIONS, DTYPES
from alexnet_jax.evaluate import per_example_metrics
from alexnet_jax.parallel import TOWER, make_executor
from support import assert_close, noise_setup, run_config

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


def forward(config: ConfigDict, classes: int, images: Any) -> Callable[[dict[str, Any]], jax.Array]:
    """Return the function from variables to logits in testing, all towers on one device.

    It runs operation by operation: networks of different configs then share most of what is compiled.
    """
    network, images = model.AlexNet(config, classes), jnp.asarray(images)
    towers: Any = jax.vmap(lambda v: network.apply(v, images, train=False), axis_name=TOWER, out_axes=None)
    return towers


@pytest.fixture(scope="module")
def paper_params() -> dict[str, Any]:
    return model.shapes(run_config("imagenet2012").model, 1000, (224, 224, 3))["params"]


def test_paper_network_has_60_965_224_parameters(paper_params: dict[str, Any]) -> None:
    assert {name: model.count_parameters(layer) for name, layer in paper_params.items()} == PARAMETERS
    assert model.count_parameters(paper_params) == 60_965_224


def test_every_parameter_belongs_to_one_tower(paper_params: dict[str, Any]) -> None:
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(paper_params))
    convolutions = sum(model.count_parameters(paper_params[f"conv{i}"]) for i in range(1, 6))
    assert convolutions // 2 == 1_167_040


def test_kernels_have_the_papers_sizes(paper_params: dict[str, Any]) -> None:
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
def test_feature_maps_have_the_papers_sizes(window: int) -> None:
    """55, 27, 13, 13, 13 pixels a side, and 6 after the last pooling, with overlapping windows or not."""
    config = run_config("imagenet2012", **{"model.pool.window": window}).model
    network = model.AlexNet(config, 1000)

    def intermediates(variables: dict[str, Any]) -> Any:
        images = jnp.zeros((1, 224, 224, 3))
        _, captured = network.apply(variables, images, train=False, capture_intermediates=True)
        return captured["intermediates"]

    captured = jax.eval_shape(jax.vmap(intermediates, axis_name=TOWER), model.shapes(config, 1000, (224, 224, 3)))
    assert {name: captured[name]["__call__"][0].shape[2:] for name in PARAMETERS} == {
        "conv1": (55, 55, 48),
        "conv2": (27, 27, 128),
        "conv3": (13, 13, 192),
        "conv4": (13, 13, 192),
        "conv5": (13, 13, 128),
        "fc6": (2048,),
        "fc7": (2048,),
        "fc8": (500,),
    }


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["embedded", "imagenet2012"])
def test_initial_loss_is_that_of_guessing(scale: str) -> None:
    config = run_config(scale)
    setup = noise_setup(config, "vmap")
    classes, size = setup.dataset.classes, config.data.crop
    generator = np.random.default_rng(0)
    images = generator.normal(0, 70 / config.data.std[0], (8, size, size, setup.dataset.channels))
    logits = forward(config.model, classes, images)({"params": train.init_state(setup).params})
    losses = per_example_metrics(logits, jnp.array(generator.integers(0, classes, 8)))["loss"]
    assert abs(losses.mean() - np.log(classes)) < 0.2


@pytest.mark.slow
def test_classes_that_do_not_divide_by_the_towers_are_padded_and_cut() -> None:
    config = run_config().model
    images = np.random.default_rng(0).normal(size=(3, 24, 24, 1))
    variables = jax.tree.map(jnp.asarray, model.init(config, 7, (24, 24, 1), 0))
    fc8 = variables["params"]["fc8"]
    assert fc8["kernel"].shape == (2, 256, 4)
    predict = forward(config, 7, images)
    logits = predict(variables)
    assert logits.shape == (3, 7)
    # The eighth neuron, the last of the second tower, has no class.
    fc8["bias"] = fc8["bias"].at[1, -1].set(100.0)
    np.testing.assert_array_equal(predict(variables), logits)
    fc8["bias"] = fc8["bias"].at[1, -2].set(100.0)
    assert (predict(variables)[:, 6] > 90).all()


def test_networks_that_share_a_layer_start_from_the_same_weights_there() -> None:
    other_order = ("conv1", "conv2", "conv4", "conv5", "fc6", "fc7", "fc8")
    config, other = run_config().model, run_config(**{"model.order": other_order}).model
    one, two = (model.init(c, 10, (24, 24, 1), 3)["params"] for c in (config, other))
    for name in ("conv1", "conv2", "conv5", "fc6", "fc7", "fc8"):
        np.testing.assert_array_equal(one[name]["kernel"], two[name]["kernel"])
    assert one["conv4"]["kernel"].shape != two["conv4"]["kernel"].shape


def test_initial_weights_of_a_seed_never_change() -> None:
    """A change of these values changes all results."""
    config = run_config(**{"model.layers.conv2.bias_std": 0.5}).model
    params = model.init(config, 10, (24, 24, 1), 3)["params"]
    kernel, bias = params["conv1"]["kernel"][1, 0, 0, 0, :3], params["conv2"]["bias"][0, :3]
    np.testing.assert_array_equal(kernel, np.array([-0.006544961, 0.56428784, -0.057672698], np.float32))
    np.testing.assert_array_equal(bias, np.array([0.2371042, -0.36771494, 0.4144782], np.float32))


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_initial_weights_have_the_configured_distribution(distribution: str) -> None:
    config = run_config(**{"model.init": distribution, "model.layers.fc6.weight_std": 0.02}).model
    kernel = model.init(config, 10, (24, 24, 1), 0)["params"]["fc6"]["kernel"]
    assert kernel.dtype == np.float32
    assert abs(kernel.mean()) < 1e-3
    assert abs(kernel.std() - 0.02) < 1e-3
    within = np.abs(kernel).max() <= 0.02 * 3**0.5 + 1e-8
    assert within == (distribution == "uniform")


@pytest.mark.slow
@pytest.mark.parametrize(("inverted", "kept", "tested"), [(False, 3.0, 1.5), (True, 6.0, 3.0)])
def test_dropout_masks_in_training_and_scales(inverted: bool, kept: float, tested: float) -> None:
    """Section 4.2, in a network that is one dropout of threes: scaled in testing, or if inverted in training."""
    changes = {"model.order": ("fc6", "fc8"), "model.layers.fc6.then": ("dropout",), "model.dropout.inverted": inverted}
    config = run_config(**changes).model
    network = model.AlexNet(config, 256)
    images = jnp.ones((50, 2, 2, 1))
    variables = {
        "params": {
            "fc6": {"kernel": jnp.zeros((2, 8, 128)), "bias": jnp.full((2, 128), 3.0)},
            "fc8": {"kernel": jnp.stack(jnp.split(jnp.eye(256), 2, axis=1)), "bias": jnp.zeros((2, 128))},
        }
    }

    def outputs(train: bool) -> jax.Array:
        def tower(variables: dict[str, Any], number: jax.Array) -> Any:
            rngs = {"dropout": jax.random.fold_in(jax.random.key(0), number)}
            return network.apply(variables, images, train=train, rngs=rngs)

        executor = make_executor("vmap", 2, 50)
        return executor.map(tower, in_axes=(TOWER, TOWER), out_axes=None)(variables, jnp.arange(2))

    assert (outputs(train=False) == tested).all()
    masked = outputs(train=True)
    assert set(np.unique(masked)) == {0.0, kept}
    assert 0.47 < (masked == 0).mean() < 0.53


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.crop": 8}, r"model.pool.window=3: must fit its feature map of 1x1; use larger images"),
        (
            {"model.layers.conv1.kernel": 29},
            r"conv1.kernel=29: must fit its feature map of 23x23, padded by 2\+2; use larger",
        ),
        (
            {"model.lrn.sees": "all", "model.lrn.n": 34},
            r"model.lrn.n=34: must be at most 33 with model.lrn.sees=all, as conv1 has 16 features in each tower",
        ),
    ],
)
def test_network_that_cannot_be_computed_raises(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.open_run(run_config(**changes))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_its_formula(activation: str) -> None:
    formulas: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "relu": lambda x: np.maximum(x, 0),
        "tanh": np.tanh,
        "scaled_tanh": lambda x: 1.7159 * np.tanh(2 * x / 3),
        "gelu": lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }
    changes = {"model.order": ("fc6",), "model.layers.fc6.then": ("activation",), "model.activation": activation}
    config = run_config(**changes, **{"model.layers.fc6.features": 5, "model.towers": 1}).model
    x = np.linspace(-3, 3, 5, dtype=np.float32)
    variables = {"params": {"fc6": {"kernel": jnp.zeros((1, 1, 5)), "bias": jnp.array(x)[None]}}}
    np.testing.assert_allclose(
        forward(config, 5, np.zeros((1, 1, 1, 1)))(variables)[0], formulas[activation](x), atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "same_parameters"),
    [
        ("model.activation", "tanh", True),
        ("model.lrn.enabled", False, True),
        ("model.lrn.n", 3, True),
        ("model.lrn.k", 1.0, True),
        ("model.lrn.alpha", 0.1, True),
        ("model.lrn.beta", 0.5, True),
        ("model.lrn.sees", "all", True),
        ("model.lrn.spatial.window", 3, True),
        ("model.lrn.spatial.k", 2.0, True),
        ("model.lrn.spatial.alpha", 0.1, True),
        ("model.lrn.spatial.beta", 0.5, True),
        ("model.batch_norm.epsilon", 0.5, True),
        ("model.pool.window", 2, True),
        ("model.init", "uniform", True),
        ("model.layers.conv2.bias_std", 0.5, True),
        ("model.layers.conv4.kind", "local", False),
        ("model.layers.conv1.then", ("activation", "lrn", "avg_pool"), True),
        ("model.layers.conv1.then", ("activation", "max_pool", "lrn"), True),
        ("model.layers.conv1.then", ("batch_norm", "activation", "lrn", "max_pool"), False),
        ("model.layers.conv3.sees", "own", False),
        ("model.layers.conv2.padding", (1, 3), True),
        ("model.layers.fc6.features", 128, False),
        ("model.towers", 1, False),
    ],
)
def test_field_changes_the_function_and_only_some_the_parameters(key: str, value: Any, same_parameters: bool) -> None:
    logits, shapes = logits_and_shapes()
    changed_logits, changed_shapes = logits_and_shapes(key, value)
    assert not np.allclose(logits, changed_logits, rtol=1e-6, atol=0)
    assert (shapes == changed_shapes) == same_parameters


@functools.cache
def logits_and_shapes(*change: Any) -> tuple[np.ndarray, Any]:
    """Return the logits of two images, and the shapes of the variables, of a network with all operations."""
    changes = {
        "model.layers.conv2.then": ("activation", "lrn", "spatial_lrn", "max_pool"),
        "model.layers.conv5.then": ("batch_norm", "activation", "max_pool"),
        "model.lrn.alpha": 0.01,
    }
    if change:
        changes |= {change[0]: change[1]}
    config = run_config(**changes).model
    variables = model.init(config, 10, (23, 23, 1), 0)
    images = np.random.default_rng(0).normal(size=(2, 23, 23, 1))
    return np.asarray(forward(config, 10, images)(variables)), jax.tree.map(np.shape, variables)


@pytest.mark.slow
def test_bfloat16_logits_and_gradients_are_close_and_parameters_stay_float32() -> None:
    order = ("conv1", "conv2", "conv3", "fc6", "fc8")
    changes = {"model.order": order, "model.layers.conv3.then": ("batch_norm", "activation"), "model.lrn.alpha": 0.01}
    exact, rough = (run_config(**changes, **{"model.dtype": dtype}).model for dtype in DTYPES)
    images = jnp.array(np.random.default_rng(0).normal(size=(8, 23, 23, 1)), jnp.float32)
    variables, labels = model.init(exact, 10, (23, 23, 1), 0), jnp.arange(8)

    def gradients_and_logits(config: ConfigDict) -> tuple[Any, jax.Array]:
        def tower(variables: dict[str, Any]) -> tuple[Any, jax.Array]:
            def loss(params: Any) -> tuple[jax.Array, jax.Array]:
                logits: Any = model.AlexNet(config, 10).apply(variables | {"params": params}, images, train=False)
                return per_example_metrics(logits, labels)["loss"].mean() / 2, logits

            return jax.grad(loss, has_aux=True)(variables["params"])

        return make_executor("vmap", 2, 8).map(tower, in_axes=(TOWER,), out_axes=(TOWER, None))(variables)

    gradients, logits = gradients_and_logits(exact)
    rough_gradients, rough_logits = gradients_and_logits(rough)
    assert {leaf.dtype for leaf in jax.tree.leaves((rough_gradients, rough_logits))} == {np.dtype(np.float32)}
    assert np.abs(rough_logits - logits).max() > 1e-5 * np.abs(logits).max()
    assert_close(rough_logits, logits, 0.03)
    for name, layer in gradients.items():
        for one, other in zip(jax.tree.leaves(layer), jax.tree.leaves(rough_gradients[name]), strict=True):
            cosine = one.ravel() @ other.ravel() / jnp.linalg.norm(one) / jnp.linalg.norm(other)
            assert cosine > 0.95, name  # poolings have more equal maxima

    _, sown = jax.eval_shape(
        jax.vmap(
            lambda v: model.AlexNet(rough, 10).apply(v, images, train=False, mutable="intermediates"), axis_name=TOWER
        ),
        variables,
    )
    dtypes = {name: values.dtype for name, (values,) in sown["intermediates"].items()}
    sent = dict.fromkeys(("conv3", "fc6", "fc8"), jnp.bfloat16) | {"logits": np.dtype(np.float32)}
    assert dtypes == {f"{name}_sent": dtype for name, dtype in sent.items()}
