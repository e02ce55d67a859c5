"""Batches are a function of (seed, step), and an epoch is every image once."""

import itertools
import os

import numpy as np
import pytest
from conftest import TINY, command, run_config

from alexnet_jax import data


class Numbered:
    """Images that carry their own number."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> dict:
        return {"image": np.full((28, 28, 1), position, np.uint8), "label": position}


def numbers(seed: int, start: int, stop: int, count: int = 10, batch_size: int = 4) -> list[list[int]]:
    config = run_config(**{"train.batch_size": batch_size})
    dataset = data.DataSet(Numbered(count), Numbered(count), 10, 1)
    batches = list(data.train_batches(dataset, config, seed=seed, start=start, stop=stop))
    for batch in batches:
        assert batch["image"].dtype == np.uint8
        assert (batch["image"][:, 0, 0, 0] == batch["label"]).all()
    return [batch["label"].tolist() for batch in batches]


def test_every_epoch_is_another_permutation_of_the_whole_set() -> None:
    seen = list(itertools.chain(*numbers(seed=0, start=0, stop=10)))
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_sees_the_same_images_wherever_the_run_began() -> None:
    assert numbers(seed=1, start=3, stop=9) == numbers(seed=1, start=0, stop=12)[3:9]
    assert numbers(seed=1, start=0, stop=3) != numbers(seed=2, start=0, stop=3)


def test_evaluation_is_in_order_and_its_last_batch_is_masked() -> None:
    config = run_config(**{"eval.batch_size": 4})
    batches = list(data.eval_batches(data.DataSet(Numbered(4), Numbered(10), 10, 1), config))
    assert [batch["label"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert [batch["mask"].tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]


def test_embedded_set_keeps_its_held_out_images_to_itself() -> None:
    dataset = data.load(run_config().data)
    assert (len(dataset.train), len(dataset.evaluation)) == (4000, 1000)

    def images(source) -> set[bytes]:
        return {source[i]["image"].tobytes() for i in range(len(source))}

    assert not images(dataset.train) & images(dataset.evaluation)
    for source, each in ((dataset.train, 400), (dataset.evaluation, 100)):
        assert np.bincount([source[i]["label"] for i in range(len(source))]).tolist() == [each] * 10


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (64, 64), (8, 9)])
def test_images_of_any_size_become_central_squares(height: int, width: int, channels: int) -> None:
    """Half black, half white, with the border in the middle of the longer side: so it stays."""
    image = np.zeros((height, width, channels), np.uint8)
    if height > width:
        image[height // 2 :] = 255
    else:
        image[:, width // 2 :] = 255
    fitted = data._fit({"image": image, "label": 3}, 32)["image"]
    assert fitted.shape == (32, 32, channels)
    halves = fitted if height > width else fitted.swapaxes(0, 1)
    assert halves[:10].max() < 10
    assert halves[-10:].min() > 245


def test_images_of_the_right_size_are_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert data._fit({"image": image, "label": 3}, 32)["image"] is image


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.name": "cifar10", "data.data_dir": "nowhere"},
            r"""data.name=cifar10: it is not prepared as array_record in nowhere.*
    pip install tensorflow-cpu && python -c "import tensorflow_datasets as tfds; """
            r"""tfds.builder\('cifar10', file_format='array_record', data_dir='nowhere'\).download_and_prepare\(\)\"""",
        ),
        ({"data.name": "cifar11", "data.data_dir": "nowhere"}, r"data.name=cifar11: no such data set .* in nowhere"),
        ({"data.train_split": "train[:9%]"}, r"data.train_split=train\[:9%\]: mnist5k has no such split"),
        ({"data.eval_split": "validation"}, r"eval_split=validation: mnist5k has no such split.*\['train', 'test'\]"),
    ],
)
def test_a_data_set_that_is_not_there_is_answered_with_what_to_do(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(run_config(**changes).data)


@pytest.mark.slow
def test_a_prepared_tfds_set_is_read_by_its_name(shared_images, tmp_path) -> None:
    config = run_config("cifar10", **{"data.name": "cifar10_jpeg", "data.data_dir": str(shared_images)})
    dataset = data.load(config.data)
    assert (len(dataset.train), len(dataset.evaluation), dataset.classes, dataset.channels) == (50000, 10000, 10, 3)
    batch = next(data.train_batches(dataset, config, seed=0, start=0, stop=1))
    assert batch["image"].shape == (64, 32, 32, 3)

    small = TINY | {"train.epochs": 0.0005, "train.batch_size": 8, "train.checkpoint_every": 100}
    done = command(
        "alexnet_jax.main",
        "--config=configs/ablation_lrn.py:cifar10",
        "--config.data.name=cifar10_jpeg",
        "--config.seeds=(0,)",
        f"--workdir={tmp_path}",
        *(f"--config.{key}={value}" for key, value in small.items()),
        environment={"TFDS_DATA_DIR": os.fspath(shared_images)},
    )
    assert done.returncode == 0, done.stderr
    assert "no_lrn" in done.stdout
