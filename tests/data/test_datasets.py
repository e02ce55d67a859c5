"""Data sets are found by name, whole, and with their held-out images apart."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run_config, run_script

from alexnet_jax import batches, data, originals, prepare


def labels(source: data.Source) -> list[int]:
    return [int(source[position]["label"]) for position in range(len(source))]


def images(source: data.Source, size: int = 32) -> np.ndarray:
    return batches.read(source, np.arange(len(source)), size)["image"]


def contents(source: data.Source) -> set[bytes]:
    return {image.tobytes() for image in images(source)}


def test_embedded_set_keeps_its_held_out_images_to_itself() -> None:
    dataset = data.load(run_config().data)
    assert (len(dataset.train), dataset.validation, len(dataset.evaluation)) == (4000, None, 1000)
    assert (dataset.classes, dataset.channels) == (10, 1)
    assert not contents(dataset.train) & contents(dataset.evaluation)
    for source, each in ((dataset.train, 400), (dataset.evaluation, 100)):
        assert np.bincount(labels(source)).tolist() == [each] * 10


WITHOUT_TFDS = """
import sys
from conftest import run_config
from alexnet_jax import main, train
train.prepare(run_config())
assert "tensorflow_datasets" not in sys.modules
"""


def test_the_embedded_set_needs_no_tfds() -> None:
    """Whose import would be a good part of the time from the command to the first step."""
    done = run_script(WITHOUT_TFDS)
    assert done.returncode == 0, done.stderr


def test_validation_is_split_off_train_where_it_is_needed() -> None:
    """By a fixed rule: every twentieth; of the embedded set that is as many of each digit."""
    config = run_config().data
    whole, parts = data.load(config), data.load(config, validation=True)
    assert (len(parts.train), len(parts.validation), len(parts.evaluation)) == (3800, 200, 1000)
    assert np.bincount(labels(parts.validation)).tolist() == [20] * 10
    for position in (0, 7, 199):
        expected = whole.train[20 * position + 19]
        np.testing.assert_array_equal(parts.validation[position]["image"], expected["image"])
    assert not contents(parts.train) & contents(parts.validation)
    assert contents(parts.train) | contents(parts.validation) == contents(whole.train)


def test_the_config_can_name_another_validation_split() -> None:
    dataset = data.load(run_config(**{"data.validation_split": "test"}).data, validation=True)
    assert (len(dataset.train), len(dataset.validation)) == (4000, 1000)


@pytest.fixture(scope="module")
def prepared(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets with ``photos``, 32 pixels wide."""
    folder = tmp_path_factory.mktemp("data")
    prepare.prepare(originals.folder(photos), 32, str(folder))
    return folder


def photos_config(folder: Path, **changes):
    values = {"name": "photos", "data_dir": str(folder), "image_size": 32, "eval_split": "validation", **changes}
    return run_config("cifar10", **{f"data.{key}": value for key, value in values.items()}).data


def test_a_prepared_folder_is_read_by_its_name(prepared: Path) -> None:
    dataset = data.load(photos_config(prepared))
    assert (len(dataset.train), len(dataset.evaluation), dataset.channels) == (40, 10, 3)
    assert list(dataset.class_names) == ["cat", "dog"]
    assert np.bincount(labels(dataset.train)).tolist() == [20, 20]
    assert images(dataset.train).shape == (40, 32, 32, 3)
    assert dataset.folder == prepared / "photos" / "32px" / "1.0.0"


def test_slices_of_a_split_are_splits(prepared: Path) -> None:
    dataset = data.load(photos_config(prepared, train_split="train[:75%]", eval_split="train[75%:]"))
    assert (len(dataset.train), len(dataset.evaluation)) == (30, 10)
    assert not contents(dataset.train) & contents(dataset.evaluation)


def test_the_fingerprint_changes_with_the_training_images(prepared: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(prepared, copied, copy_function=shutil.copy2)
    config = photos_config(copied)
    fingerprints = [
        data.load(config).fingerprint,
        data.load(config, validation=True).fingerprint,
        data.load(photos_config(copied, train_split="train[:50%]")).fingerprint,
    ]
    assert data.load(photos_config(prepared)).fingerprint == fingerprints[0]
    (shard,) = (copied / "photos" / "32px" / "1.0.0").glob("*train*")
    shard.touch()
    fingerprints.append(data.load(config).fingerprint)
    assert all(one != other for one, other in itertools.combinations(fingerprints, 2))


def test_a_set_of_which_files_are_missing_is_refused(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    (shard,) = (tmp_path / "copy" / "photos" / "32px" / "1.0.0").glob("*train*")
    shard.unlink()
    with pytest.raises(
        ValueError, match=r"train.array_record-00000-of-00001: is missing, so photos is not whole; delete"
    ):
        data.load(photos_config(tmp_path / "copy"))


def test_a_damaged_image_is_named(prepared: Path, tmp_path: Path) -> None:
    dataset = data.load(photos_config(prepared))
    dataset.train._files = [{"image": b"\xff\xd8 nothing", "label": 0}]
    with pytest.raises(ValueError, match=r"photos/32px/1.0.0, train: image 0 is damaged .*; prepare the set again"):
        batches.read(dataset.train, np.array([0]), 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "cifar10"},
            r"data.name=cifar10: it is not prepared in .*nowhere.* with\n"
            r"    python -m alexnet_jax.prepare cifar10 --data_dir=.*nowhere",
        ),
        ({"name": "cifar11"}, r"cifar11: no such data set is prepared in .*nowhere, and TFDS has none"),
        ({"name": "mnist5k", "train_split": "train[:9%]"}, r"data.train_split=train\[:9%\]: mnist5k has no such split"),
        (
            {"name": "mnist5k", "eval_split": "validation"},
            r"eval_split=validation: mnist5k has no such split.*\['train', 'test'\]",
        ),
        ({"name": "mnist5k", "eval_split": "test", "validation_split": "val"}, r"validation_split=val: mnist5k has no"),
    ],
)
def test_a_data_set_that_is_not_there_is_answered_with_what_to_do(tmp_path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(photos_config(tmp_path / "nowhere", **changes))


def test_another_size_than_the_prepared_one_is_answered_with_the_sizes(prepared: Path) -> None:
    with pytest.raises(ValueError, match=r"data.image_size=64: photos is prepared at 32px; .* --size=64"):
        data.load(photos_config(prepared, image_size=64, crop=64))


def test_a_preparation_that_did_not_end_is_not_taken_for_a_set(tmp_path: Path) -> None:
    (tmp_path / "photos" / "32px" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"data.name=photos: its preparation in .*32px did not end; do it again"):
        data.load(photos_config(tmp_path))
