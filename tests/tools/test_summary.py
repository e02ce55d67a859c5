"""The summary's sizes of layers, and its command."""

import argparse
import re

import pytest

from alexnet_jax import model
from alexnet_jax.config import load_study
from alexnet_jax.tools import summary
from support import TINY, command, network_config, run_config


def printed(capsys: pytest.CaptureFixture[str], spec: str, *overrides: str, **arguments: int) -> str:
    """Return what the verb prints for a config."""
    defaults = {"config": load_study(spec, overrides), "classes": None, "channels": None}
    summary.main(argparse.Namespace(**defaults | arguments))
    return capsys.readouterr().out


def test_command_prints_the_totals_of_figure_2() -> None:
    done = command("alexnet_jax", "summary", "--config=configs/networks/paper.py")
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("60,965,224", "724,406,816", "659,272", "21,632", "4,608", "30,482,612", "all towers", "own tower"):
        assert text in done.stdout
    for bytes_sent in ("31,576,064", "18,761,216"):  # in a step of each layout
        assert bytes_sent in done.stdout


def test_classes_and_channels_default_to_those_of_the_embedded_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    default, explicit, other = (
        printed(capsys, "configs/base.py:embedded", **arguments)
        for arguments in ({}, {"classes": 10, "channels": 1}, {"classes": 11, "channels": 3})
    )
    assert default == explicit != other


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        (["--config.data.crop=30"], {}, "must fit its feature map"),
        (["--config.model.layers.conv2.features=255"], {}, "a multiple of model.towers"),
        ([], {"classes": 0}, "--classes=0: must be 1 or more"),
    ],
)
def test_network_that_cannot_be_built_raises(
    overrides: list[str], arguments: dict[str, int], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        printed(capsys, "configs/networks/paper.py", *overrides, **arguments)


def test_parameters_of_batch_normalisation_count_in_their_layer() -> None:
    plain = run_config(**TINY)
    normalised = run_config(**TINY | {"model.layers.conv2.then": ("batch_norm", "activation", "max_pool")})
    before, after = (summary.rows(config.model, 10, (23, 23, 1)) for config in (plain, normalised))
    for old, new in zip(before, after, strict=True):
        assert new.parameters - old.parameters == (2 * 8 if new.name == "conv2" else 0)  # scale and bias per channel
        assert new.multiply_adds == old.multiply_adds
    params = model.shapes(normalised.model, 10, (23, 23, 1))["params"]
    assert sum(row.parameters for row in after) == model.count_parameters(params)


def test_kernels_of_unshared_layers_are_counted_at_every_position() -> None:
    """cifar_11pct: local3 has a 3x3 kernel over 64 channels for each of 6x6 positions and 64 features."""
    row = next(row for row in summary.rows(network_config("cifar_11pct").model, 10, (24, 24, 3)) if row.kind == "local")
    height, width, features = row.maps
    weights = height * width * 3 * 3 * row.kernel[-1] * features
    assert row.kernel == (3, 3, 64)
    assert row.multiply_adds == weights
    assert row.parameters == weights + height * width * features


def test_one_tower_sends_nothing() -> None:
    config = run_config(**TINY | {"model.towers": 1})
    rows = summary.rows(config.model, 10, (23, 23, 1))
    assert [row.sent for row in rows] == [()] * len(config.model.order)
    assert rows[-1].name == config.model.order[-1]


def test_sizes_sum_up_the_rows() -> None:
    config = run_config(**TINY)
    sizes, rows = summary.sizes(config, 10, 1), summary.rows(config.model, 10, (23, 23, 1))
    assert sizes["parameters"] == sum(row.parameters for row in rows)
    assert sizes["multiply_adds"] == sum(row.multiply_adds for row in rows)
    assert sizes["maps"]["conv1"] == "23x23x8"
    assert sizes["maps"]["fc6"] == "16"
