"""What a step costs on paper, against what XLA counts, the collectives of the compiled step, and counts by hand."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, any_pixels, command, net_config, run_config, run_script
from ml_collections import ConfigDict
from test_towers import noise_batch, noise_dataset

from alexnet_jax import cost, layers, model, summary, train
from alexnet_jax.evaluate import per_image
from alexnet_jax.towers import TOWER, Executor

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def costs(config: ConfigDict, devices: int, classes: int = 10, channels: int = 1) -> list[cost.Cost]:
    rows = summary.rows(config.model, classes, (config.data.crop, config.data.crop, channels))
    return cost.step(rows, config, channels, devices)


# Products with weights and nothing else: two convolutions that the stride makes small, one that crosses, two dense.
PRODUCTS = {
    "train.batch_size": 16,
    "model.order": ("conv1", "conv2", "conv3", "fc6", "fc8"),
    "model.layers.conv1.features": 128,
    "model.layers.conv1.stride": 2,
    **{f"model.layers.{name}.then": () for name in ("conv1", "conv2", "conv3", "fc6")},
}


def multiply_adds_with_zeros(config: ConfigDict) -> list[int]:
    """Of each layer for one image, which XLA does not count: those of kernels where they stand on padding."""
    counts = []
    for row in summary.rows(config.model, 10, (config.data.crop, config.data.crop, 1))[: len(config.model.order)]:
        layer, inside = config.model.layers[row.name], 1.0
        if row.kind == "conv":
            before, after = layer.padding
            side = (row.maps[0] - 1) * layer.stride + layer.kernel - before - after  # kernels reach all of it
            reached = np.arange(row.maps[0])[:, None] * layer.stride - before + np.arange(layer.kernel)
            inside = ((reached >= 0) & (reached < side)).mean() ** 2
        counts.append(round(row.multiply_adds * (1 - inside)))
    return counts


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_flops_are_those_that_xla_counts(towers: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plain operations: CPUs run loops, of which XLA counts the body once."""
    monkeypatch.setattr(layers, "_with_cpu_form", lambda plain, **_: plain)
    paddings = {} if padded else {f"model.layers.conv{i}.padding": (0, 0) for i in (1, 2, 3)}
    config = run_config(**PRODUCTS, **paddings, **{"model.towers": towers})
    batch, side = config.train.batch_size, config.data.crop
    net = model.AlexNet(config.model, 10)

    def forward(own: Any, images: jax.Array, labels: jax.Array) -> Any:
        return net.apply({"params": own}, images, train=False)

    def gradients(own: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(own: Any) -> jax.Array:
            return per_image(forward(own, images, labels), labels)["loss"].mean() / towers

        return jax.value_and_grad(loss)(own)

    def counted(function: Callable) -> float:
        over_towers = jax.jit(jax.vmap(function, axis_name=TOWER, in_axes=(0, None, None)))
        params = model.shapes(config.model, 10, (side, side, 1))
        program = over_towers.lower(params, jnp.zeros((batch, side, side, 1)), jnp.zeros(batch, int))
        return program.cost_analysis()["flops"]

    total = cost.total(costs(config, devices=1))
    zeros = 2 * batch * np.array(multiply_adds_with_zeros(config))
    assert (zeros.sum() > 0.1 * total.forward) == padded
    biases = batch * sum(row.neurons for row in summary.rows(config.model, 10, (side, side, 1)) if row.kind)
    # XLA adds up in float32.
    assert counted(forward) == pytest.approx(total.forward - zeros.sum() + biases, rel=1e-6)
    # The gradients of biases are as many additions again; the loss, and adding up gradients of gathered maps, are few.
    expected = total.flops - (3 * zeros.sum() - zeros[0]) + 2 * biases
    assert 0 < counted(gradients) / expected - 1 < 5e-4


def sent(program: str) -> float:
    """The bytes that each device sends, by the collectives in the text of a program."""
    factors = {
        "all-gather": lambda n: (n - 1) / n,
        "reduce-scatter": lambda n: n - 1,
        "all-reduce": lambda n: 2 * (n - 1) / n,
        "collective-permute": lambda n: n > 1,
    }
    total = 0.0
    for results, kind, line in re.findall(rf"= (\(?\w+\[.*?) ({'|'.join(factors)})\((.*)", program):
        groups = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line)
        assert groups, line
        devices = len(set(groups[1].split(",")))  # one, where an only tower sends to itself
        # A sum without axes is one of the metrics, which are not counted.
        arrays = [(bits, shape) for bits, shape in re.findall(r"f(\d+)\[([\d,]*)\]", results) if shape]
        values = sum(int(bits) // 8 * math.prod(map(int, shape.split(","))) for bits, shape in arrays)
        total += factors[kind](devices) * values
    return total


def exchanging(**changes: Any) -> ConfigDict:
    """A net whose towers meet in every way there is."""
    order = ("conv1", "conv3", "fc6", "fc8")
    then = ("activation", "lrn", "max_pool")
    meeting = {"model.order": order, "model.layers.conv3.then": then, "model.lrn.crosses": True}
    return run_config(**TINY | meeting | changes)


def programs(config: ConfigDict) -> tuple[int, jax.stages.Lowered]:
    """How many devices a real step runs on, and its program."""
    dataset, executor = noise_dataset("embedded"), Executor("auto", config.model.towers)
    step: Any = train.train_step(config, dataset, any_pixels(config, 1), executor)
    state = executor.place(train.init_state(config, dataset))
    batch = noise_batch(config, dataset, config.train.batch_size)
    lowered = step.__wrapped__.lower(state, batch, np.uint32(0), np.int32(1), np.int32(0))
    return len(executor.devices), lowered


@pytest.mark.parametrize("towers", [1, 2])
def test_bytes_exchanged_are_those_of_the_compiled_collectives(towers: int) -> None:
    """One tower's devices share the batch and add up gradients; two towers gather maps."""
    config = exchanging(**{"model.towers": towers})
    devices, lowered = programs(config)
    assert devices == 2
    assert sent(lowered.compile().as_text()) == cost.total(costs(config, devices)).exchanged > 0


@pytest.mark.parametrize("changes", [{"model.dtype": "bfloat16"}, {"model.order": ("fc6", "fc8")}])
def test_maps_are_exchanged_in_their_dtype_and_images_have_no_gradient(changes: dict[str, Any]) -> None:
    """By the program before it is compiled: for CPUs that widens bfloat16."""
    config = exchanging(**changes)
    devices, lowered = programs(config)
    assert sent(lowered.as_text("hlo")) == cost.total(costs(config, devices)).exchanged


FOUR_DEVICES = """
import jax
from test_cost import cost, costs, exchanging, programs, sent
jax.config.update("jax_num_cpu_devices", 4)
for towers in (2, 4):
    config = exchanging(**{"model.towers": towers, "train.batch_size": 5})
    devices, lowered = programs(config)
    print(towers, devices, sent(lowered.as_text("hlo")), cost.total(costs(config, devices)).exchanged)
"""


def test_on_four_devices_maps_and_gradients_are_exchanged() -> None:
    """When the batch cannot be halved; and four towers exchange more than two."""
    done = run_script(FOUR_DEVICES, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    two, four = (list(map(float, line.split())) for line in done.stdout.splitlines())
    assert two[:2] == [2, 4]
    assert four[:2] == [4, 4]
    assert two[2] == two[3]
    assert four[2] == four[3]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_step_of_the_papers_net_is_4_billion_flops_an_image(devices: int) -> None:
    """132 GFLOP at batch 32: thrice the forward pass, less conv1's input gradient."""
    config = net_config("paper")
    total = cost.total(costs(config, devices, classes=1000, channels=3))
    assert total.forward * devices == 2 * 724_406_816 * config.train.batch_size
    assert total.flops * devices == 4_135_610_496 * config.train.batch_size
    there_and_back = 2 * 4 * 30_836
    gradients = 4 * 60_965_224 // 2  # of a tower's parameters, which two devices share: of each half, its sum
    assert total.exchanged == {1: 0, 2: 128 * there_and_back, 4: 64 * there_and_back + gradients}[devices]


BY_HAND = {
    "train.batch_size": 4,
    "data.crop": 9,
    "model.order": ("conv1", "fc8"),
    "model.layers.conv1.features": 4,
    "model.layers.conv1.kernel": 3,
    "model.layers.conv1.padding": (0, 0),
    "model.layers.conv1.then": ("activation", "lrn", "max_pool", "dropout"),
}
# Of one tower and image, values: images are 9x9, maps 7x7x2 and then 3x3x2.
CONV1 = 2 * (81 + 98) + 5 * 98  # without an input gradient; activation
LRN = 5 * 98
POOL = 3 * 98 + 2 * 18
DROPOUT = 5 * 18
FC8 = 3 * (36 + 5)
# Of one tower, values of float32: 20 and 185 parameters, in each product once, and five times in their update.
UPDATES = 7 * 20, 8 * 185


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
def test_bytes_moved_are_those_counted_by_hand(changes: dict[str, Any], devices: int, conv1: int, fc8: int) -> None:
    config = run_config(**BY_HAND, **changes)
    moved = [each.moved for each in costs(config, devices)]
    assert moved == [conv1 + 4 * UPDATES[0], fc8 + 4 * UPDATES[1], 0]


def test_one_device_moves_what_two_towers_do() -> None:
    config = run_config(**BY_HAND)
    one, two = costs(config, 1), costs(config, 2)
    assert [each.moved for each in one] == [2 * each.moved for each in two]
    assert [each.flops for each in one] == [2 * each.flops for each in two]


@pytest.mark.parametrize(("towers", "devices", "remedy"), [(4, 2, "use 1 or 4"), (2, 5, "use 4 or 6")])
def test_devices_that_towers_cannot_share_are_refused(towers: int, devices: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"--devices={devices}: .* model.towers={towers}, .*{remedy}"):
        costs(run_config(**{"model.towers": towers}), devices)


def test_a_layer_takes_the_longer_of_arithmetic_and_memory_and_then_exchanges() -> None:
    peak = cost.Peak(flops=10, bandwidth=5, link=2)
    arithmetic, memory = cost.Cost("a", 20, 20, 20, 20, 2), cost.Cost("b", 20, 0, 20, 50, 0)
    assert cost.seconds([arithmetic], peak) == 6 + 1
    assert cost.seconds([memory], peak) == 10
    assert cost.seconds([arithmetic, memory], peak) == 17


PAPER = ("alexnet_jax.summary", "--config=configs/nets/paper.py")


def test_the_summary_prints_what_a_step_costs() -> None:
    done = command(*PAPER, "--devices=2", "--flops=65e9", "--bandwidth=10e9", "--link=5e9")
    assert done.returncode == 0, done.stderr
    for number in ("724,406,816", "28,665,446,400", "185,448,144,896", "31,576,064", "4,078.301", "99.8 %"):
        assert number in done.stdout
    without = command(*PAPER, "--devices=2")
    assert "31,576,064" in without.stdout
    assert "ms" not in without.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PAPER, "--devices=3"], "--devices=3: must be 1, where all towers are, or a multiple of model.towers=2"),
        ([*PAPER, "--devices=2", "--flops=65e9"], "--bandwidth, --link missing"),
        ([*PAPER, "--flops=65e9", "--bandwidth=1e9", "--link=1e9"], "--devices missing"),
        ([*PAPER, "--devices=1", "--flops=0"], "--flops=0"),
        # A study trains on the devices there are, and does not take the flag.
        (
            ["alexnet_jax.main", "--config=configs/ablation_lrn.py", "--devices=2"],
            "Unknown command line flag 'devices'",
        ),
    ],
)
def test_what_has_no_cost_is_one_clear_line(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 1
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
