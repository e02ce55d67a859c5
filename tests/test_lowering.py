"""Training step and predictor lower for GPUs and TPUs, which this machine need not have."""

import collections
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax import export
from ml_collections import ConfigDict

from alexnet_jax import model, optim, train
from alexnet_jax.evaluate import make_predictor
from support import TINY, noise_setup, random_statistics, run_config

MODERN: dict[str, Any] = {
    "optim.name": "adamw",
    "optim.schedule": "cosine",
    "model.activation": "gelu",
    "model.dtype": "bfloat16",
    **{f"model.layers.{name}.then": ("batch_norm", "activation", "max_pool") for name in ("conv1", "conv2")},
}
CONFIGS = {
    "small": run_config(**TINY),
    "modern": run_config(**TINY, **MODERN),
    "one_weird_trick": run_config(**TINY, **{"train.layout": "one_weird_trick"}),
    "paper": run_config("imagenet2012"),
}


def abstract(tree: Any) -> Any:
    """Return shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


@functools.cache
def programs(name: str, platform: str) -> dict[str, export.Exported]:
    """Return training step and predictor of one device, lowered for a platform from the shapes of their arguments."""
    config: ConfigDict = CONFIGS[name]
    setup, data = noise_setup(config, "vmap"), config.data
    channels, classes = setup.dataset.channels, setup.dataset.classes
    variables = model.shapes(config.model, classes, (data.crop, data.crop, channels))
    state = jax.eval_shape(functools.partial(train.new_state, config), variables)
    statistics = abstract(random_statistics(config, channels))
    images = jax.ShapeDtypeStruct((config.train.batch_size, data.image_size, data.image_size, channels), np.uint8)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((config.train.batch_size,), np.int32)}
    step: Any = train.make_train_step(setup)
    predict: Any = make_predictor(config, classes, setup.executor)
    scalars = abstract((np.uint32(0), np.int32(1), optim.peak_learning_rate(config.optim)))
    return {
        "step": export.export(step, platforms=[platform])(state, batch, statistics, *scalars),
        "predictor": export.export(predict.__wrapped__, platforms=[platform])(state.variables, statistics, images),
    }


def count_operations(program: export.Exported) -> collections.Counter[str]:
    """Return how often each StableHLO operation occurs."""
    return collections.Counter(re.findall(r"\bstablehlo\.(\w+)", program.mlir_module()))


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_step_and_predictor_lower_for_accelerators(name: str, platform: str) -> None:
    """They are plain StableHLO: nothing of another library, and no communication on one device."""
    for program in programs(name, platform).values():
        assert program.platforms == (platform,)
        operations = count_operations(program)
        assert operations["convolution"] >= 5
        assert not {"custom_call", "all_gather", "all_reduce", "reduce_scatter"} & operations.keys()
    logits = programs(name, platform)["predictor"].out_avals[0]
    assert logits.shape == (CONFIGS[name].train.batch_size, 1000 if name == "paper" else 10)
    assert logits.dtype == np.float32


@pytest.mark.parametrize("name", CONFIGS)
def test_programs_for_gpus_are_deterministic_and_not_grouped(name: str) -> None:
    """Scatters (of labels, of pooling) are slow and not deterministic on GPUs; so are grouped convolutions slow."""
    for program in programs(name, "cuda").values():
        assert not {"scatter", "select_and_scatter"} & count_operations(program).keys()
        groups = re.findall(r"(?:feature|batch)_group_count = (\d+)", program.mlir_module())
        assert len(groups) >= 10
        assert set(groups) == {"1"}


@pytest.mark.parametrize(("precision", "expected"), [("tensorfloat32", "HIGH"), ("float32", "HIGHEST")])
def test_all_products_have_the_configured_precision(
    precision: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, of convolutions, dense layers and colour noise; in training and in evaluation."""
    changes = {"train.matmul_precision": precision, "data.crop": 224, "data.image_size": 230}
    config = run_config("cifar10", **TINY | changes)
    monkeypatch.setitem(CONFIGS, precision, config)
    for program in programs(precision, "cuda").values():
        operations = count_operations(program)
        precisions = re.findall(r"precision(?:_config)? = \[([^\]]*)\]", program.mlir_module())
        assert len(precisions) == operations["convolution"] + operations["dot_general"]
        assert {name.split()[-1].rstrip(">") for each in precisions for name in each.split(", ")} == {expected}


@pytest.mark.parametrize("name", CONFIGS)
def test_cpus_run_their_own_kernels(name: str) -> None:
    """They have no select_and_scatter (pooling), and multiply matrices for the gradients of the convolutions."""
    operations = count_operations(programs(name, "cpu")["step"])
    assert not {"scatter", "select_and_scatter"} & operations.keys()
    assert operations["dot_general"] > count_operations(programs(name, "cuda")["step"])["dot_general"]
