"""The cost model of experiments/speed against XLA's FLOPs, the collectives of the step, and counts by hand."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from alexnet_jax import layers, model, optim, train
from alexnet_jax.evaluate import per_example_metrics
from alexnet_jax.parallel import DATA, TOWER, Executor
from alexnet_jax.tools import summary
from support import REPOSITORY, TINY, network_config, noise_batch, noise_setup, random_statistics, run_config

SCRIPT = REPOSITORY / "experiments" / "speed" / "cost.py"
cost = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def costs(config: ConfigDict, devices: int, classes: int = 10, channels: int = 1) -> list[Any]:
    rows = summary.rows(config.model, classes, (config.data.crop, config.data.crop, channels))
    return cost.step(rows, config, channels, devices)


# Products with weights and nothing else; without padding, whose zeros XLA does not count.
PRODUCTS: dict[str, Any] = {
    "train.batch_size": 16,
    "model.order": ("conv1", "conv2", "conv3", "fc6", "fc8"),
    "model.layers.conv1.stride": 2,
    **{f"model.layers.{name}.then": () for name in ("conv1", "conv2", "conv3", "fc6")},
    **{f"model.layers.conv{number}.padding": (0, 0) for number in (1, 2, 3)},
}


@pytest.mark.parametrize("towers", [1, 2])
def test_flops_equal_xlas_count_of_the_plain_operations(towers: int) -> None:
    config = run_config(**PRODUCTS, **{"model.towers": towers})
    batch, side = config.train.batch_size, config.data.crop
    network = model.AlexNet(config.model, 10)

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits: Any = network.apply({"params": params}, images, train=False)
        return per_example_metrics(logits, labels)["loss"].mean() / towers

    def xla_flops(function: Callable) -> float:
        over_towers = jax.jit(jax.vmap(function, axis_name=TOWER, in_axes=(0, None, None)))
        params = model.shapes(config.model, 10, (side, side, 1))["params"]
        with layers.kernels():
            lowered = over_towers.lower(params, jnp.zeros((batch, side, side, 1)), jnp.zeros(batch, int))
        analysis: Any = lowered.cost_analysis()
        return analysis["flops"]

    total = cost.total(costs(config, devices=1))
    biases = batch * sum(row.neurons for row in summary.rows(config.model, 10, (side, side, 1)) if row.kind)
    # The loss, the gradients of biases, and the sums of gathered gradients are few beside the products.
    assert 0 <= xla_flops(loss) / (total.forward + biases) - 1 < 1e-3
    assert 0 <= xla_flops(jax.value_and_grad(loss)) / (total.flops + 2 * biases) - 1 < 1e-3


@dataclass(frozen=True)
class Unmapped(Executor):
    """An executor of any number of devices whose `map` returns the function of one tower and shard."""

    def map(self, function: Callable, **_: Any) -> Callable:
        return function


def bytes_sent(config: ConfigDict, towers: int, shards: int) -> float:
    """Return the bytes that a device sends in the collectives of a real training step."""
    sizes = {TOWER: towers, DATA: shards}
    setup = noise_setup(config, "vmap")
    setup = train.Setup(config, setup.dataset, Unmapped("shard_map", towers, shards))
    state = jax.tree.map(lambda leaf: leaf[0], train.init_state(setup))
    batch = noise_batch(config, config.train.batch_size // shards)
    arguments = (
        state,
        batch,
        random_statistics(config, 1),
        np.uint32(0),
        np.int32(1),
        optim.peak_learning_rate(config.optim),
    )
    program: Any = jax.make_jaxpr(train.make_train_step(setup), axis_env=list(sizes.items()))(*arguments)
    return sum(count for _, count in summary.collectives(program.jaxpr, sizes))


# A network whose towers communicate in every way there is.
COMMUNICATING: dict[str, Any] = {
    "model.order": ("conv1", "conv3", "fc6", "fc8"),
    "model.layers.conv3.then": ("activation", "lrn", "max_pool"),
    "model.lrn.sees": "all",
}


@pytest.mark.parametrize(
    ("towers", "shards", "changes"),
    [
        (2, 1, {}),
        (1, 2, {}),
        (2, 2, {}),
        (4, 1, {}),
        (2, 1, {"model.dtype": "bfloat16"}),
        (2, 1, {"model.order": ("fc6", "fc8")}),  # the gathered images need no gradient
    ],
)
def test_bytes_sent_equal_those_of_the_steps_collectives(towers: int, shards: int, changes: dict[str, Any]) -> None:
    config = run_config(**TINY | COMMUNICATING | changes | {"model.towers": towers})
    expected = cost.total(costs(config, towers * shards)).sent
    assert expected > 0
    assert bytes_sent(config, towers, shards) == expected


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_step_of_the_papers_network_is_4_gflop_per_image(devices: int) -> None:
    config = network_config("paper")
    total = cost.total(costs(config, devices, classes=1000, channels=3))
    assert total.forward * devices == 2 * 724_406_816 * config.train.batch_size
    assert total.flops * devices == 4_135_610_496 * config.train.batch_size
    activations = 2 * 4 * 30_836  # bytes per image, there and back
    all_reduce = 4 * 60_965_224 // 2  # of a tower's parameters, shared by two devices
    assert total.sent == {1: 0, 2: 128 * activations, 4: 64 * activations + all_reduce}[devices]


BY_HAND: dict[str, Any] = {
    "train.batch_size": 4,
    "data.crop": 9,
    "model.order": ("conv1", "fc8"),
    "model.layers.conv1.features": 4,
    "model.layers.conv1.kernel": 3,
    "model.layers.conv1.padding": (0, 0),
    "model.layers.conv1.then": ("activation", "lrn", "max_pool", "dropout"),
}
# Values per image and tower: images are 9x9, feature maps 7x7x2 and, pooled, 3x3x2.
CONV1 = 2 * (81 + 98) + 5 * 98  # without an input gradient; with the activation
LRN = 5 * 98
POOL = 3 * 98 + 2 * 18
DROPOUT = 5 * 18
FC8 = 3 * (36 + 5)
# Bytes per tower: 20 and 185 float32 parameters, once in each product, and five times in the update.
UPDATES = 4 * 7 * 20, 4 * 8 * 185


@pytest.mark.parametrize(
    ("changes", "devices", "conv1", "fc8"),
    [
        ({}, 2, 16 * (CONV1 + LRN + POOL + DROPOUT), 16 * FC8),
        ({}, 4, 8 * (CONV1 + LRN + POOL + DROPOUT), 8 * FC8),
        ({"model.dtype": "bfloat16"}, 2, 8 * (CONV1 + LRN + POOL + DROPOUT), 8 * FC8),
        ({"model.lrn.enabled": False}, 2, 16 * (CONV1 + POOL + DROPOUT), 16 * FC8),
        ({"model.dropout.rate": 0.0}, 2, 16 * (CONV1 + LRN + POOL), 16 * FC8),
    ],
)
def test_bytes_moved_equal_counts_by_hand(changes: dict[str, Any], devices: int, conv1: int, fc8: int) -> None:
    moved = [layer.moved for layer in costs(run_config(**BY_HAND, **changes), devices)]
    assert moved == [conv1 + UPDATES[0], fc8 + UPDATES[1], 0]


@pytest.mark.parametrize(
    ("towers", "devices", "message"),
    [
        (4, 2, "model.towers=4; use 1 or 4"),
        (2, 5, "model.towers=2; use 4 or 6"),
        (2, 6, "into 3 equal shards; use --config.train.batch_size=9"),
    ],
)
def test_devices_that_do_not_fit_are_refused(towers: int, devices: int, message: str) -> None:
    config = run_config(**{"model.towers": towers, "train.batch_size": 8})
    with pytest.raises(ValueError, match=f"--devices={devices}: must .*{message}"):
        costs(config, devices)


def test_roofline_takes_the_slower_of_arithmetic_and_memory_then_communication() -> None:
    peak = cost.Peak(flops=10, bandwidth=5, link=2)
    arithmetic, memory = cost.Cost("a", 20, 20, 20, 20, 2), cost.Cost("b", 20, 0, 20, 50, 0)
    assert cost.seconds([arithmetic], peak) == 6 + 1
    assert cost.seconds([memory], peak) == 10
    assert cost.seconds([arithmetic, memory], peak) == 17


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--config=configs/networks/paper.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_command_prints_the_table() -> None:
    done = run("--devices=2", "--flops=65e9", "--bandwidth=10e9", "--link=5e9")
    assert done.returncode == 0, done.stderr
    for number in ("28,665,446,400", "185,448,144,896", "31,576,064", "4,078.301", "99.8 %"):
        assert number in done.stdout


@pytest.mark.parametrize(
    ("argument", "status", "message"),
    [
        ("--devices=3", 1, "--devices=3: must be 1 or a multiple of model.towers=2"),
        ("--flops=65e9", 2, "must be given together"),
    ],
)
def test_command_reports_bad_arguments_in_one_line(
    argument: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cost.py", "--config=configs/networks/paper.py", argument])
    with pytest.raises(SystemExit) as end:
        cost.main()
    assert end.value.code == status
    assert message in capsys.readouterr().err.splitlines()[-1]
