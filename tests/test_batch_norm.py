"""Batch normalisation against PyTorch's, with the towers and the shards of a batch on one device or on two."""

from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax

from alexnet_jax import model
from alexnet_jax.evaluate import per_example_metrics
from alexnet_jax.parallel import DATA, TOWER, Executor
from support import assert_close, run_config

MOMENTUM, EPSILON = 0.8, 1e-3
CLASSES, FEATURES, SIZE = 10, 8, 9


def conv_to_torch(kernel: np.ndarray) -> np.ndarray:
    """Return a kernel (towers, height, width, channels, features) as PyTorch's: features first, of all towers."""
    return np.concatenate([np.transpose(tower, (3, 2, 0, 1)) for tower in kernel])


@pytest.mark.slow
@pytest.mark.parametrize(
    "executor",
    [Executor("vmap", 2), Executor("pmap", 2), Executor("vmap", 1), Executor("shard_map", 1, shards=2)],
    ids=["two towers, one device", "two towers, two devices", "one tower, one device", "two shards"],
)
def test_training_and_testing_match_pytorch(executor: Executor, torch: ModuleType) -> None:
    """In two steps: logits, loss, all gradients and the running averages; then logits in testing.

    PyTorch's momentum is that of the new value. Its running variance is the unbiased one, that is n / (n - 1) times the
    variance of a batch, where n counts images and positions; Flax's is the variance that normalises the batch.
    """
    config = run_config(
        **{
            "model.towers": executor.towers,
            "model.order": ("conv1", "fc8"),
            "model.layers.conv1.features": FEATURES,
            "model.layers.conv1.then": ("batch_norm", "activation"),
            "model.batch_norm.momentum": MOMENTUM,
            "model.batch_norm.epsilon": EPSILON,
        }
    ).model
    network = model.AlexNet(config, CLASSES)
    variables = model.init(config, CLASSES, (SIZE, SIZE, 1), seed=0)
    generator = np.random.default_rng(0)
    for name, mean in (("scale", 1.0), ("bias", 0.0)):
        values = variables["params"]["conv1_batch_norm"][name]
        variables["params"]["conv1_batch_norm"][name] = generator.normal(mean, 0.3, values.shape).astype(np.float32)

    def gradients(variables: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, ...]:
        def tower_loss(params: Any) -> tuple[jax.Array, Any]:
            updated = variables | {"params": params}
            logits, updated = network.apply(updated, images, train=True, mutable=["batch_stats"])
            losses = per_example_metrics(logits, labels)["loss"]
            count = len(images) * lax.axis_size(DATA)
            return losses.sum() / count / lax.axis_size(TOWER), (logits, updated["batch_stats"])

        gradients, (logits, batch_stats) = jax.grad(tower_loss, has_aux=True)(variables["params"])
        return lax.psum(gradients, DATA), batch_stats, logits

    step = executor.map(gradients, in_axes=(TOWER, DATA, DATA), out_axes=(TOWER, TOWER, DATA))
    predict = executor.map(
        lambda variables, images: network.apply(variables, images, train=False), in_axes=(TOWER, DATA), out_axes=DATA
    )

    params = variables["params"]
    conv1, fc8 = params["conv1"], params["fc8"]
    norm = torch.nn.BatchNorm2d(FEATURES, eps=EPSILON, momentum=1 - MOMENTUM)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(params["conv1_batch_norm"]["scale"].ravel()))
        norm.bias.copy_(torch.tensor(params["conv1_batch_norm"]["bias"].ravel()))
    kernel = torch.tensor(conv_to_torch(conv1["kernel"]), requires_grad=True)
    layer = config.layers.conv1
    before, after = layer.padding

    def oracle(images: np.ndarray) -> Any:
        padded = torch.nn.functional.pad(torch.tensor(images.transpose(0, 3, 1, 2)), (before, after, before, after))
        maps = torch.nn.functional.conv2d(padded, kernel, torch.tensor(conv1["bias"].ravel()), stride=layer.stride)
        units = torch.relu(norm(maps)).permute(0, 2, 3, 1).flatten(1)
        return units @ torch.tensor(np.concatenate(fc8["kernel"], axis=1)) + torch.tensor(fc8["bias"].ravel()), maps

    for number in (1, 2):
        images = generator.normal(number, 2, (4, SIZE, SIZE, 1)).astype(np.float32)
        labels = generator.integers(0, CLASSES, 4)
        ours, variables["batch_stats"], logits = step(executor.place(variables), images, labels)
        expected, maps = oracle(images)
        assert_close(logits, expected.detach(), 1e-5)

        norm.zero_grad()
        kernel.grad = None
        torch.nn.functional.cross_entropy(expected, torch.tensor(labels)).backward()
        assert_close(conv_to_torch(ours["conv1"]["kernel"]), kernel.grad, 1e-4)
        assert_close(ours["conv1_batch_norm"]["scale"].ravel(), norm.weight.grad, 1e-5)
        assert_close(ours["conv1_batch_norm"]["bias"].ravel(), norm.bias.grad, 1e-5)

        averages = variables["batch_stats"]["conv1_batch_norm"]
        assert_close(averages["mean"].ravel(), norm.running_mean, 1e-5)
        n, initial = maps.numel() / FEATURES, MOMENTUM**number
        unbiased = initial + (averages["var"].ravel() - initial) * n / (n - 1)
        assert_close(unbiased, norm.running_var, 1e-5)

    norm.eval()
    with torch.no_grad():
        # Its running variance is replaced by ours, see above.
        norm.running_var.copy_(torch.tensor(np.asarray(averages["var"]).ravel()))
        expected, _ = oracle(images)
    assert_close(predict(executor.place(variables), images), expected, 1e-5)
