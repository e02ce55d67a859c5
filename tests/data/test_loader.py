"""Tests of the batches: a function of (seed, step), with every image once in an epoch."""

import itertools
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_jax.data import loader
from support import run_config


class Numbered:
    """Images whose pixels and label are their position."""

    channels = 1

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"image": np.full((28, 28, 1), position, np.uint8), "label": position}


def train_labels(seed: int, start: int, stop: int) -> list[list[int]]:
    """Return the labels of the batches of 4 of 10 images."""
    changes: dict[str, Any] = {"train.batch_size": 4}
    config = run_config(**changes)
    batches = list(loader.train_batches(Numbered(10), config, seed=seed, start=start, stop=stop))
    for batch in batches:
        assert batch["image"].dtype == np.uint8
        assert (batch["image"][:, 0, 0, 0] == batch["label"]).all()
    return [batch["label"].tolist() for batch in batches]


def test_epochs_are_different_permutations() -> None:
    labels = list(itertools.chain(*train_labels(seed=0, start=0, stop=10)))
    epochs = [labels[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_of_a_seed_is_pinned() -> None:
    """A change would make resumed runs of older versions differ from uninterrupted ones."""
    assert train_labels(seed=0, start=0, stop=3) == [[4, 6, 2, 7], [3, 5, 9, 0], [8, 1, 9, 1]]


def test_batch_does_not_depend_on_first_step() -> None:
    assert train_labels(seed=1, start=3, stop=9) == train_labels(seed=1, start=0, stop=12)[3:9]
    assert train_labels(seed=1, start=0, stop=3) != train_labels(seed=2, start=0, stop=3)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 12))
def test_evaluation_reads_every_image_once_and_masks_padding(count: int, size: int) -> None:
    labels = []
    for batch in loader.all_batches(Numbered(count), run_config(), size):
        assert batch["image"].shape == (size, 28, 28, 1)
        assert batch["label"].shape == batch["mask"].shape == (size,)
        assert not batch["image"][~batch["mask"]].any()
        labels += batch["label"][batch["mask"]].tolist()
    assert labels == list(range(count))
