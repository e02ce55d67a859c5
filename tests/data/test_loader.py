"""Batches are a function of (seed, step), and an epoch is every image once, however many processes share it."""

import itertools
from collections import Counter

import numpy as np
import pytest
from conftest import run_config
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_jax import batches


class Numbered:
    """Images that carry their own number."""

    channels = 1

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> dict:
        return {"image": np.full((28, 28, 1), position, np.uint8), "label": position}


def numbers(
    seed: int, start: int, stop: int, count: int = 10, batch_size: int = 4, share: tuple[int, int] = (0, 1)
) -> list[list[int]]:
    config = run_config(**{"train.batch_size": batch_size})
    read = list(batches.train_batches(Numbered(count), config, seed=seed, start=start, stop=stop, share=share))
    for batch in read:
        assert batch["image"].dtype == np.uint8
        assert (batch["image"][:, 0, 0, 0] == batch["label"]).all()
    return [batch["label"].tolist() for batch in read]


def test_every_epoch_is_another_permutation_of_the_whole_set() -> None:
    seen = list(itertools.chain(*numbers(seed=0, start=0, stop=10)))
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_sees_the_same_images_wherever_the_run_began() -> None:
    assert numbers(seed=1, start=3, stop=9) == numbers(seed=1, start=0, stop=12)[3:9]
    assert numbers(seed=1, start=0, stop=3) != numbers(seed=2, start=0, stop=3)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_every_batch(processes: int) -> None:
    """No image twice, none lost, and the same batch as one process has."""
    alone = numbers(seed=3, start=2, stop=7, batch_size=6)
    shared = [numbers(seed=3, start=2, stop=7, batch_size=6, share=(i, processes)) for i in range(processes)]
    for whole, *parts in zip(alone, *shared, strict=True):
        assert [len(part) for part in parts] == [6 // processes] * processes
        assert Counter(itertools.chain(*parts)) == Counter(whole)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.batch_size=4: must be a multiple of the 3 processes"):
        numbers(seed=0, start=0, stop=1, share=(0, 3))


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 12), processes=st.integers(1, 3))
def test_evaluation_has_every_image_once_and_masks_what_fills_up(count: int, size: int, processes: int) -> None:
    config = run_config(**{"eval.batch_size": size})
    seen = []
    for process in range(processes):
        of_process: list[int] = []
        for batch in batches.all_batches(Numbered(count), config, share=(process, processes)):
            assert batch["image"].shape == (size, 28, 28, 1)
            assert batch["label"].shape == batch["mask"].shape == (size,)
            assert not batch["image"][~batch["mask"]].any()
            of_process += batch["label"][batch["mask"]].tolist()
        assert of_process == sorted(of_process)
        seen += of_process
    assert sorted(seen) == list(range(count))
