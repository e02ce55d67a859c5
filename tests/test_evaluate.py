"""Every held-out image counts once, whatever the batch size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, run_config

from alexnet_jax import augment, evaluate, model, train
from alexnet_jax.towers import AXIS


@pytest.mark.parametrize("batch_size", [250, 333, 1000, 1024])
@pytest.mark.parametrize("executor", ["vmap", "pmap"])
def test_means_are_those_over_all_images_at_once(batch_size: int, executor: str) -> None:
    config = run_config(**TINY, **{"eval.batch_size": batch_size, "train.executor": executor})
    dataset, towers = train.prepare(config)
    params = train.init_state(config, dataset).params
    found = evaluate.evaluator(config, dataset, towers)(towers.place(params))

    examples = [dataset.evaluation[i] for i in range(1000)]
    labels = np.array([example["label"] for example in examples])
    images = augment.centre_views(np.stack([example["image"] for example in examples]), config.data)
    net = model.AlexNet(config.model, 10)
    forward = jax.vmap(lambda p: net.apply({"params": p}, images, train=False), axis_name=AXIS, out_axes=None)
    logits = np.asarray(forward(params), np.float64)
    ranks = (logits > logits[np.arange(1000), labels][:, None]).sum(axis=1)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(1000), labels]
    assert found["eval/top1_error"] == pytest.approx((ranks >= 1).mean())
    assert found["eval/top5_error"] == pytest.approx((ranks >= 5).mean())
    assert found["eval/loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert set(found) == {"eval/loss", "eval/top1_error", "eval/top5_error"}


def test_errors_count_the_best_one_and_the_best_five() -> None:
    logits = jnp.array([[0.1, 0.9, 0.3, 0.2, 0.5, 0.6, 0.4]] * 3)
    errors = evaluate.per_image(logits, jnp.array([1, 4, 0]))
    assert errors["top1_error"].tolist() == [0, 1, 1]
    assert errors["top5_error"].tolist() == [0, 0, 1]


class Short:
    """A data set that says it is longer than what is read of it."""

    def __init__(self, source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source) + 1

    def __getitem__(self, position: int):
        return self._source[position]


def test_a_missed_image_is_an_error(monkeypatch: pytest.MonkeyPatch, tiny) -> None:
    dataset, towers = train.prepare(tiny)
    params = towers.place(train.init_state(tiny, dataset).params)
    run = evaluate.evaluator(tiny, dataclasses.replace(dataset, evaluation=Short(dataset.evaluation)), towers)
    batches = list(evaluate.data.eval_batches(dataset, tiny))
    monkeypatch.setattr(evaluate.data, "eval_batches", lambda *_: batches)
    with pytest.raises(RuntimeError, match="counted 1000 of 1001 held-out images"):
        run(params)
