"""Every AlexNet of configs/networks/ agrees with the numbers of its source, with PyTorch and with Keras."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from alexnet_jax import config as config_lib
from alexnet_jax import model, weights
from alexnet_jax.__main__ import run_verb
from alexnet_jax.checkpoint import TrainedNetwork
from alexnet_jax.evaluate import per_example_metrics
from alexnet_jax.optim import BIAS, KERNEL
from alexnet_jax.parallel import TOWER, make_executor
from alexnet_jax.tools import summary
from support import NETWORKS, REPOSITORY, assert_close, network_config, reduced

MILLION = 10**6
PAPER_SENT = (21_632, 4_608, 2_048, 2_048, 500)  # sent by a tower before conv3, fc6, fc7, fc8; the logits

TUTORIAL_CONVOLUTIONS = 52_707_600 + 111_974_400 + 37_380_096 + 56_070_144 + 37_380_096  # multiply-adds

# Parameters, multiply-adds (int: exact; float: as rounded by the source), neurons, activations sent by a tower.
NUMBERS: dict[str, tuple[int, float, int | None, tuple[int, ...]]] = {
    "paper": (60_965_224, 724_406_816, 659_272, PAPER_SENT),
    "code2012": (60_965_224, 724_406_816, 659_272, PAPER_SENT),
    "pool_before_lrn": (60_965_224, 724_406_816, 659_272, PAPER_SENT),
    "caffe_alexnet": (60_965_224, 724_406_816, 659_272, (2 * 55 * 55, 2 * 27 * 27, *PAPER_SENT)),
    "caffenet": (60_965_224, 724_406_816, 659_272, (2 * 27 * 27, 2 * 13 * 13, *PAPER_SENT)),
    "one_column": (59_798_312, 391_514_384, None, ()),
    "one_weird_trick": (61_100_840, 714_188_480, None, ()),
    "torchvision": (61_100_840, 714_188_480, None, ()),
    # By hand: conv1 as the paper's, 5x5x48x320, 3x3x160x384, conv4 and conv5 as the paper's, two towers of
    # 4608x4096 and 4096x2048, 4096x1000. The towers communicate before fc8 only: 2,048 activations.
    "no_crossing": (
        34_944 + 384_320 + 553_344 + 663_936 + 442_624 + 37_756_928 + 16_781_312 + 4_097_000,
        105_415_200 + 279_936_000 + 93_450_240 + 112_140_288 + 74_760_192 + 37_748_736 + 16_777_216 + 4_096_000,
        None,
        (2_048, 500),
    ),
    # By hand, from the tutorial's layers: the first dense layer has 6x6x128 = 4608 inputs.
    "keras_tutorial_v1": (
        17_472 + 153_728 + 221_376 + 331_968 + 221_312 + 9_439_232 + 4_196_352 + 2_049_000,
        TUTORIAL_CONVOLUTIONS + 4608 * 2048 + 2048 * 2048 + 2048 * 1000,
        None,
        (),
    ),
    "keras_tutorial_v2": (
        17_472 + 153_728 + 221_376 + 331_968 + 221_312 + 4_719_616 + 131_200 + 129_000,
        TUTORIAL_CONVOLUTIONS + 4608 * 1024 + 1024 * 128 + 128 * 1000,
        None,
        (),
    ),
    "cifar_80sec": (145_578, 12_354_176, None, ()),
    "cifar_19pct": (89_578, 12.3 * MILLION, None, ()),
    "cifar_18pct": (89_578, 12.3 * MILLION, None, ()),
    "cifar_13pct": (1_116_490, 18.5 * MILLION, None, ()),
    "cifar_11pct": (2_112_970, 19.5 * MILLION, None, ()),
}


def number_of_classes(name: str) -> int:
    return 10 if name.startswith("cifar") else 1000


def input_shape(config: ConfigDict) -> tuple[int, int, int]:
    return (config.data.crop, config.data.crop, 3)


def summary_rows(name: str) -> list[summary.Row]:
    config = network_config(name)
    return summary.rows(config.model, number_of_classes(name), input_shape(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_match_the_source(name: str) -> None:
    config_lib.validate(network_config(name))
    parameters, multiply_adds, neurons, sent = NUMBERS[name]
    rows = summary_rows(name)
    assert sum(row.parameters for row in rows) == parameters
    tolerance = 0 if isinstance(multiply_adds, int) else 0.05 * MILLION
    assert abs(sum(row.multiply_adds for row in rows) - multiply_adds) <= tolerance
    if neurons is not None:
        assert sum(row.neurons for row in rows) == neurons
    assert sorted(value for row in rows for value in row.sent) == sorted(sent)


def test_layers_match_figure_2() -> None:
    by_layer = {
        row.name: (row.maps, row.kernel, row.stride, row.sees, row.multiply_adds, row.sent)
        for row in summary_rows("paper")
    }
    assert by_layer == {
        "conv1": ((55, 55, 96), (11, 11, 3), 4, "own", 105_415_200, ()),
        "conv2": ((27, 27, 256), (5, 5, 48), 1, "own", 223_948_800, ()),
        "conv3": ((13, 13, 384), (3, 3, 256), 1, "all", 149_520_384, (21_632,)),
        "conv4": ((13, 13, 384), (3, 3, 192), 1, "own", 112_140_288, ()),
        "conv5": ((13, 13, 256), (3, 3, 192), 1, "own", 74_760_192, ()),
        "fc6": ((4096,), (9216,), 1, "all", 37_748_736, (4_608,)),
        "fc7": ((4096,), (4096,), 1, "all", 16_777_216, (2_048,)),
        "fc8": ((1000,), (4096,), 1, "all", 4_096_000, (2_048,)),
        "logits": ((1000,), (), 1, "all", 0, (500,)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "caffenet", "no_crossing"])
def test_activations_sent_match_the_collectives(name: str) -> None:
    config = network_config(name)
    network = model.AlexNet(config.model, 1000)
    variables = model.shapes(config.model, 1000, input_shape(config))
    one_tower = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), variables)

    def tower(variables: Any, images: jax.Array) -> Any:
        return network.apply(variables, images, train=False)

    program = jax.make_jaxpr(tower, axis_env=[(TOWER, 2)])(one_tower, jnp.zeros((1, *input_shape(config))))
    # Of two towers, each needs the neighbouring channels of one side, and sends those of both.
    fraction = {"all_gather": 1.0, "ppermute": 0.5}
    collectives: list[Any] = [eqn for eqn in program.eqns if eqn.primitive.name in fraction]
    carried = sum(eqn.invars[0].aval.size * fraction[eqn.primitive.name] for eqn in collectives)
    assert carried == sum(sum(row.sent) for row in summary_rows(name))


def random_images(config: ConfigDict, batch: int) -> Any:
    return np.random.default_rng(0).normal(0, 50, (batch, *input_shape(config))).astype(np.float32)


def assert_equal_to_pytorch(config: ConfigDict, executor: str, torch: ModuleType, train: bool) -> None:
    """Compare logits and all gradients, for the same parameters and images, with PyTorch's in float64."""
    import torch_alexnet  # PyTorch is optional

    classes, images, labels = 10, random_images(config, 3), jnp.array([3, 1, 9])
    network, towers = model.AlexNet(config.model, classes), make_executor(executor, config.model.towers, 1)
    variables = model.init(config.model, classes, images.shape[1:], 0)
    params, stats = variables["params"], variables.get("batch_stats", {})
    generator = np.random.default_rng(1)
    stats = jax.tree.map(lambda leaf: generator.uniform(0.5, 20, leaf.shape).astype(np.float32), stats)

    def tower(params: Any, stats: Any, images: Any) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": stats}
            logits = network.apply(variables, images, train=train, mutable=["batch_stats"])[0]
            return per_example_metrics(logits, labels)["loss"].mean() / config.model.towers, logits

        return jax.grad(loss, has_aux=True)(params)

    mapped = towers.map(tower, in_axes=(TOWER, TOWER, None), out_axes=(TOWER, None))
    gradients, logits = mapped(towers.place(params), towers.place(stats), towers.replicate(images))

    def grouped(tree: Any) -> Any:
        return weights.grouped(TrainedNetwork(config, classes, {"params": tree}, None))

    theirs: Any = torch_alexnet.tensors(grouped(params), torch.float64)
    side_by_side = jax.tree.map(lambda leaf: np.concatenate(list(leaf), axis=-1), stats)
    running = torch_alexnet.tensors(side_by_side, torch.float64)
    exact = torch_alexnet.forward(config.model, theirs, torch.tensor(images, dtype=torch.float64), running, train)
    torch.nn.functional.cross_entropy(exact, torch.tensor(labels.tolist())).backward()
    expected = exact.detach().numpy()
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max()  # the logits depend on the image
    assert_close(logits, expected, 2e-5)
    for layer, parts in grouped(gradients).items():
        for part, gradient in parts.items():
            expected = theirs[layer][part].grad.numpy()
            largest = np.abs(expected).max()
            if train and part == BIAS and f"{layer}_batch_norm" in params:  # the batch's mean takes the bias away
                largest = np.abs(parts[KERNEL]).max()
            assert largest > 1e-6
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-4 * largest, err_msg=f"{layer}.{part}")


# Keras is the oracle of its tutorials. Of caffenet, also what towers communicate in a normalisation.
ON_DEVICES = [(name, "vmap") for name in NETWORKS if not name.startswith("keras")] + [("caffenet", "pmap")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "executor"), ON_DEVICES)
def test_network_equals_pytorch(name: str, executor: str, torch: ModuleType) -> None:
    # A larger alpha makes the normalisations matter.
    config = reduced(name, **{"model.lrn.alpha": 1e-3, "model.lrn.spatial.alpha": 1e-3})
    assert_equal_to_pytorch(config, executor, torch, train=False)


MODERN: dict[str, Any] = {
    f"model.layers.{layer}.then": ("batch_norm", "activation", "max_pool") for layer in ("conv1", "conv2")
}


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "train"), [("silu", False), ("gelu", True)])
def test_modern_operations_equal_pytorch(activation: str, train: bool, torch: ModuleType) -> None:
    config = reduced("paper", **MODERN, **{"model.activation": activation})
    assert_equal_to_pytorch(config, "vmap", torch, train)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fc6", "fc7"), [("keras_tutorial_v1", 2048, 2048), ("keras_tutorial_v2", 1024, 128)])
def test_keras_tutorials_equal_keras(name: str, fc6: int, fc7: int) -> None:
    """Compare the distribution of the initial weights at full size, and logits and gradients of the first tutorial.

    The second one has other dense layers, and is the same network but for them.
    """
    import keras_alexnet  # importing Keras takes seconds

    net = keras_alexnet.build_tutorial(fc6, fc7)
    config = network_config(name)
    images, labels = random_images(config, 2), jnp.array([7, 8])
    params = model.init(config.model, 1000, input_shape(config), 0)["params"]
    for layer in net.layers:
        if layer.name in params:
            ours, theirs = np.asarray(params[layer.name][KERNEL]), np.asarray(layer.kernel)
            np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.05)
            np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=0.02)
    if name != "keras_tutorial_v1":
        assert reduced(name).model == reduced("keras_tutorial_v1").model
        return
    keras_alexnet.set_weights(net, params)
    expected_logits, _, expected_gradients = keras_alexnet.logits_loss_and_gradients(net, images, np.asarray(labels))

    def loss(params: Any) -> Any:
        logits: Any = model.AlexNet(config.model, 1000).apply({"params": params}, images, train=False)
        return per_example_metrics(logits, labels)["loss"].mean(), logits

    gradients, logits = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), axis_name=TOWER))(params)
    assert_close(logits[0], expected_logits, 1e-5)
    for layer, parts in gradients.items():
        for part, expected in zip((KERNEL, BIAS), expected_gradients[layer], strict=True):
            assert_close(parts[part][0], expected, 1e-4)


# Standard deviation of the weights and mean of the biases by layer, from conv1 to the last.
INITIAL: dict[str, tuple[list[float], list[float]]] = {
    "paper": ([0.01] * 8, [0, 1, 0, 1, 1, 1, 1, 0]),
    "code2012": ([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 1, 0]),
    "caffe_alexnet": ([0.01] * 5 + [0.005, 0.005, 0.01], [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0]),
    "caffenet": ([0.01] * 5 + [0.005, 0.005, 0.01], [0, 1, 0, 1, 1, 1, 1, 0]),
    "one_weird_trick": ([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 1, -7]),
    "cifar_80sec": ([0.0001, 0.01, 0.01, 0.1, 0.1], [0] * 5),
    "cifar_19pct": ([0.0001, 0.01, 0.01, 0.01], [0] * 4),
    "cifar_11pct": ([0.0001, 0.01, 0.04, 0.04, 0.01], [0] * 5),
}


@pytest.mark.parametrize("name", INITIAL)
def test_initial_values_match_the_source(name: str) -> None:
    """Few dense neurons: their number does not change the distribution."""
    fewer = {} if name.startswith("cifar") else {f"model.layers.fc{i}.features": 64 for i in (6, 7)}
    config = network_config(name, **fewer)
    params = model.init(config.model, number_of_classes(name), input_shape(config), 0)["params"]
    for layer, deviation, bias in zip(config.model.order, *INITIAL[name], strict=True):
        kernel = params[layer][KERNEL]
        assert abs(kernel.std() / deviation - 1) < 5 / (2 * kernel.size) ** 0.5
        assert abs(kernel.mean()) < 5 * deviation / kernel.size**0.5
        np.testing.assert_allclose(params[layer][BIAS], bias, rtol=1e-6)
        assert config.model.towers == 1 or not np.array_equal(kernel[0], kernel[1])


@pytest.mark.slow
def test_torchvision_initial_values_match_pytorch(torch: ModuleType) -> None:
    config = network_config("torchvision")
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(192, 384, 3)
    ours = model.init(config.model, 1000, input_shape(config), 0)["params"]["conv3"]
    for array, tensor in ((ours[KERNEL], theirs.weight), (ours[BIAS], theirs.bias)):
        expected = tensor.detach().numpy()
        np.testing.assert_allclose(array.std(), expected.std(), rtol=0.1)
        np.testing.assert_allclose(np.abs(array).max(), np.abs(expected).max(), rtol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/networks/code2012.py:embedded"], "must be one of imagenet2012, imagenette"),
        (["--config=configs/networks/paper.py", "--config.data.crop=30"], "must fit its feature map"),
        (
            ["--config=configs/networks/paper.py", "--config.model.layers.conv2.features=255"],
            "a multiple of model.towers",
        ),
    ],
)
def test_summary_of_an_impossible_network_is_a_one_line_error(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as ended:
        run_verb("summary", arguments)
    assert message in str(ended.value.code)
    assert "\n" not in str(ended.value.code)


def test_readme_has_every_network_with_its_size() -> None:
    readme = (REPOSITORY / "configs" / "networks" / "README.md").read_text()
    for name in NETWORKS:
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| [{name}]({name}.py)")]
        parameters, multiply_adds, _, _ = NUMBERS[name]
        assert f"{parameters:,}" in row
        assert f"{multiply_adds:,}" in row or f"{multiply_adds / MILLION:.1f} million" in row
