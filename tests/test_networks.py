"""Every AlexNet of configs/nets/ against the numbers of its source, PyTorch, and Keras."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NETS, REPOSITORY, command, net_config, reduced

from alexnet_jax import config as config_lib
from alexnet_jax import model, summary, weights
from alexnet_jax.evaluate import per_image
from alexnet_jax.optim import KERNEL
from alexnet_jax.towers import TOWER, Executor

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MILLION = 10**6
PAPERS_MAPS = (21_632, 4_608, 2_048, 2_048, 500)  # what a tower gives away before conv3, fc6, fc7, fc8; the logits

# Parameters, multiply-adds (as exactly as the source has them), neurons, and what a tower gives away.
NUMBERS = {
    "paper": (60_965_224, 724_406_816, 659_272, PAPERS_MAPS),
    "code2012": (60_965_224, 724_406_816, 659_272, PAPERS_MAPS),
    "seed": (60_965_224, 724_406_816, 659_272, PAPERS_MAPS),
    "caffe_alexnet": (60_965_224, 724_406_816, 659_272, (2 * 55 * 55, 2 * 27 * 27, *PAPERS_MAPS)),
    "caffenet": (60_965_224, 724_406_816, 659_272, (2 * 27 * 27, 2 * 13 * 13, *PAPERS_MAPS)),
    "one_column": (59_798_312, 391_514_384, None, ()),
    "one_weird_trick": (61_100_840, 714_188_480, None, ()),
    "torchvision": (61_100_840, 714_188_480, None, ()),
    # By hand: conv1 as the paper's, 5x5x48x320, 3x3x160x384, conv4 and conv5 as the paper's, two towers of
    # 4608x4096 and 4096x2048, 4096x1000; it meets before fc8, and there it gives away 2,048 values.
    "no_crossing": (
        34_944 + 384_320 + 553_344 + 663_936 + 442_624 + 37_756_928 + 16_781_312 + 4_097_000,
        None,
        None,
        (2_048, 500),
    ),
    # By hand, from the layers that the seed names: 6x6x128 = 4608 inputs of the first dense layer.
    "seed_v1": (
        17_472 + 153_728 + 221_376 + 331_968 + 221_312 + 9_439_232 + 4_196_352 + 2_049_000,
        None,
        None,
        (),
    ),
    "seed_v2": (17_472 + 153_728 + 221_376 + 331_968 + 221_312 + 4_719_616 + 131_200 + 129_000, None, None, ()),
    "cifar_80sec": (145_578, None, None, ()),
    "cifar_19pct": (89_578, 12.3 * MILLION, None, ()),
    "cifar_18pct": (89_578, 12.3 * MILLION, None, ()),
    "cifar_13pct": (1_116_490, 18.5 * MILLION, None, ()),
    "cifar_11pct": (2_112_970, 19.5 * MILLION, None, ()),
}


def classes_of(name: str) -> int:
    return 10 if name.startswith("cifar") else 1000


def rows(name: str) -> list[summary.Row]:
    config = net_config(name)
    return summary.rows(config.model, classes_of(name), (config.data.crop, config.data.crop, 3))


@pytest.mark.parametrize("name", NETS)
def test_the_numbers_of_every_net_are_those_of_its_source(name: str) -> None:
    config_lib.validate(net_config(name))
    parameters, multiply_adds, neurons, exchanged = NUMBERS[name]
    table = rows(name)
    assert sum(row.parameters for row in table) == parameters
    if multiply_adds:
        tolerance = 0 if isinstance(multiply_adds, int) else 0.05 * MILLION
        assert abs(sum(row.multiply_adds for row in table) - multiply_adds) <= tolerance
    if neurons:
        assert sum(row.neurons for row in table) == neurons
    # In the order of the layers; what the normalisation exchanges comes with the layer that it follows.
    assert sorted(value for row in table for value in row.exchanged) == sorted(exchanged)


def test_the_summary_of_every_layer_is_the_papers() -> None:
    """Section 3.5, figure 2."""
    by_layer = {row.name: (row.maps, row.kernel, row.stride, row.crosses, row.multiply_adds) for row in rows("paper")}
    assert by_layer == {
        "conv1": ((55, 55, 96), (11, 11, 3), 4, False, 105_415_200),
        "conv2": ((27, 27, 256), (5, 5, 48), 1, False, 223_948_800),
        "conv3": ((13, 13, 384), (3, 3, 256), 1, True, 149_520_384),
        "conv4": ((13, 13, 384), (3, 3, 192), 1, False, 112_140_288),
        "conv5": ((13, 13, 256), (3, 3, 192), 1, False, 74_760_192),
        "fc6": ((4096,), (9216,), 1, True, 37_748_736),
        "fc7": ((4096,), (4096,), 1, True, 16_777_216),
        "fc8": ((1000,), (4096,), 1, True, 4_096_000),
        "logits": ((1000,), (), 1, True, 0),
    }


@pytest.mark.parametrize("name", ["paper", "caffenet", "no_crossing"])
def test_what_is_exchanged_is_what_the_collectives_carry(name: str) -> None:
    config = net_config(name)
    net = model.AlexNet(config.model, 1000)
    shape = (config.data.crop, config.data.crop, 3)
    params = model.shapes(config.model, 1000, shape)
    own = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), params)

    def tower(own, images):
        return net.apply({"params": own}, images, train=False)

    program = jax.make_jaxpr(tower, axis_env=[(TOWER, 2)])(own, jnp.zeros((1, *shape)))
    carried = [eqn for eqn in program.eqns if eqn.primitive.name in ("all_gather", "ppermute")]
    # Two towers in a row need the halo of one side each, and send that of both.
    halves = {"all_gather": 2, "ppermute": 4}
    given = sum(eqn.invars[0].aval.size * 2 / halves[eqn.primitive.name] for eqn in carried)
    assert given == sum(sum(row.exchanged) for row in rows(name))


def images_of(config, batch: int) -> np.ndarray:
    size = config.data.crop
    return np.random.default_rng(0).normal(0, 50, (batch, size, size, 3)).astype(np.float32)


ON_DEVICES = [(name, "vmap") for name in NETS] + [(name, "pmap") for name in ("code2012", "caffenet", "no_crossing")]


@pytest.mark.parametrize(("name", "executor"), ON_DEVICES)
def test_every_net_is_the_one_in_pytorch(name: str, executor: str, torch) -> None:
    """Logits and all gradients, with the same weights; every operation and constant, with few features."""
    import torch_alexnet

    # A larger alpha makes the normalisations count.
    config = reduced(name, **{"model.lrn.alpha": 1e-3, "model.lrn.spatial.alpha": 1e-3})
    towers = Executor(executor, config.model.towers)
    classes, images, labels = 10, images_of(config, 3), np.array([3, 1, 9])
    params = model.init(config.model, classes, images.shape[1:], 0)
    net = model.AlexNet(config.model, classes)

    def tower(own):
        def loss(own):
            logits = net.apply({"params": own}, images, train=False)
            return per_image(logits, labels)["loss"].mean() / config.model.towers, logits

        return jax.grad(loss, has_aux=True)(own)

    gradients, logits = towers.map(tower, in_axes=(0,), out_axes=(0, None))(towers.place(params))

    theirs = torch_alexnet.tensors(weights.grouped(weights.Weights(config, classes, params)))
    expected = torch_alexnet.forward(config.model, theirs, torch.tensor(images))
    torch.nn.functional.cross_entropy(expected, torch.tensor(labels)).backward()
    expected = expected.detach().numpy()
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max()  # the images tell
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    for layer, kinds in weights.grouped(weights.Weights(config, classes, gradients)).items():
        for kind, gradient in kinds.items():
            wanted = theirs[layer][kind].grad.numpy()
            assert np.abs(wanted).max() > 0
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max(), err_msg=layer)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fc6", "fc7"), [("seed_v1", 2048, 2048), ("seed_v2", 1024, 128)])
def test_the_seeds_nets_are_its_keras_models(name: str, fc6: int, fc7: int) -> None:
    """Written in the Keras API from the seed's layer lists, at full size: logits and gradients."""
    import keras_alexnet
    from keras import Model, layers

    image = layers.Input((224, 224, 3))
    x = layers.ZeroPadding2D(((1, 2), (1, 2)))(image)
    x = layers.Conv2D(48, 11, strides=4, activation="relu", name="conv1")(x)
    x = layers.MaxPool2D(3, 2)(x)
    x = layers.Conv2D(128, 5, padding="same", activation="relu", name="conv2")(x)
    x = layers.MaxPool2D(3, 2)(x)
    x = layers.Conv2D(192, 3, padding="same", activation="relu", name="conv3")(x)
    x = layers.Conv2D(192, 3, padding="same", activation="relu", name="conv4")(x)
    x = layers.Conv2D(128, 3, padding="same", activation="relu", name="conv5")(x)
    x = layers.Flatten()(layers.MaxPool2D(3, 2)(x))
    x = layers.Dense(fc6, activation="relu", name="fc6")(layers.Dropout(0.2)(x))
    x = layers.Dense(fc7, activation="relu", name="fc7")(layers.Dropout(0.2)(x))
    net = Model(image, layers.Dense(1000, name="fc8")(x))

    config = net_config(name)
    images = images_of(config, 2)
    params = model.init(config.model, 1000, (224, 224, 3), 0)
    for layer in net.layers:
        if layer.name in params:  # its own initial weights are drawn as ours are
            ours = np.asarray(params[layer.name][KERNEL])
            np.testing.assert_allclose(ours.std(), np.asarray(layer.kernel).std(), rtol=0.05)
            np.testing.assert_allclose(np.abs(ours).max(), np.abs(layer.kernel).max(), rtol=0.02)
    keras_alexnet.set_weights(net, params)
    labels = np.array([7, 8])
    logits, _, gradients = keras_alexnet.logits_loss_and_gradients(net, images, labels)

    def loss(own):
        output = model.AlexNet(config.model, 1000).apply({"params": own}, images, train=False)
        return per_image(output, labels)["loss"].mean(), output

    ours, output = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), axis_name=TOWER))(params)
    np.testing.assert_allclose(output[0], logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    for layer, kinds in ours.items():
        for kind, wanted in zip((KERNEL, "bias"), gradients[layer], strict=True):
            got = np.asarray(kinds[kind][0])
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=layer)


INITIAL = {
    # Weights' deviation and mean bias by layer, from conv1 to fc8.
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
def test_initial_values_are_those_of_the_source(name: str) -> None:
    """Drawn with few dense neurons: what is drawn does not depend on how many there are."""
    fewer = {} if name.startswith("cifar") else {f"model.layers.fc{i}.features": 64 for i in (6, 7)}
    config = net_config(name, **fewer)
    shape = (config.data.crop, config.data.crop, 3)
    params = model.init(config.model, classes_of(name), shape, 0)
    for layer, deviation, bias in zip(config.model.order, *INITIAL[name], strict=True):
        kernel = np.asarray(params[layer][KERNEL])
        assert abs(kernel.std() / deviation - 1) < 5 / (2 * kernel.size) ** 0.5
        assert abs(kernel.mean()) < 5 * deviation / kernel.size**0.5
        np.testing.assert_allclose(params[layer]["bias"], bias, rtol=1e-6)
        assert config.model.towers == 1 or not np.array_equal(kernel[0], kernel[1])


def test_torchvisions_initial_values_are_pytorchs(torch) -> None:
    config = net_config("torchvision")
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(192, 384, 3)
    shape = (224, 224, 3)
    ours = model.init(config.model, 1000, shape, 0)["conv3"]
    for array, tensor in ((ours[KERNEL], theirs.weight), (ours["bias"], theirs.bias)):
        expected = tensor.detach().numpy()
        np.testing.assert_allclose(np.asarray(array).std(), expected.std(), rtol=0.1)
        np.testing.assert_allclose(np.abs(array).max(), np.abs(expected).max(), rtol=0.02)


def test_the_summary_prints_the_totals_of_figure_2() -> None:
    done = command("alexnet_jax.summary", "--config=configs/nets/paper.py")
    assert (done.returncode, done.stderr) == (0, "")
    for number in ("60,965,224", "724,406,816", "659,272", "21,632", "4,608", "30,482,612", "all towers"):
        assert number in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/nets/code2012.py:embedded"], "goes one of: imagenet2012, imagenette"),
        (["--config=configs/nets/paper.py", "--config.data.crop=30"], "does not fit a map"),
        (["--config=configs/nets/paper.py", "--config.model.layers.conv2.features=255"], "a multiple of model.towers"),
        ([], "say which net"),
    ],
)
def test_a_net_that_cannot_be_summed_up_is_one_clear_line(arguments: list[str], message: str) -> None:
    done = command("alexnet_jax.summary", *arguments)
    assert done.returncode == 1
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_the_page_has_every_net() -> None:
    page = (REPOSITORY / "configs" / "nets" / "README.md").read_text()
    for name in NETS:
        assert f"[{name}]({name}.py)" in page
        assert f"{NUMBERS[name][0]:,}" in page
