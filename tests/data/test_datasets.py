"""Tests of opening datasets by name, and of their splits."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from alexnet_jax.data import datasets, loader, prepare, sources
from support import run_config, run_script


def labels(source: datasets.Source) -> list[int]:
    return [int(source[position]["label"]) for position in range(len(source))]


def load_embedded(**changes: Any) -> datasets.Dataset:
    return datasets.load(run_config(**{f"data.{key}": value for key, value in changes.items()}).data)


def contents(source: datasets.Source) -> set[bytes]:
    return {image.tobytes() for image in loader.read(source, np.arange(len(source)), 32)["image"]}


def test_embedded_splits_are_balanced_and_disjoint() -> None:
    dataset = load_embedded()
    assert (len(dataset.train), dataset.validation, len(dataset.evaluation)) == (4000, None, 1000)
    assert (dataset.classes, dataset.channels) == (10, 1)
    assert not contents(dataset.train) & contents(dataset.evaluation)
    for source, count in ((dataset.train, 400), (dataset.evaluation, 100)):
        assert np.bincount(labels(source)).tolist() == [count] * 10


WITHOUT_TFDS = """
import sys
from support import run_config
from alexnet_jax import train
from alexnet_jax.studies import runner
train.open_run(run_config())
assert "tensorflow_datasets" not in sys.modules
"""


@pytest.mark.slow
def test_embedded_dataset_does_not_import_tfds() -> None:
    """The import would take a good part of the time to the first step."""
    process = run_script(WITHOUT_TFDS)
    assert process.returncode == 0, process.stderr


def test_every_nth_training_image_is_held_out() -> None:
    whole = load_embedded()
    split = load_embedded(validation_split="1/20")
    assert split.validation is not None
    assert (len(split.train), len(split.validation), len(split.evaluation)) == (3800, 200, 1000)
    assert np.bincount(labels(split.validation)).tolist() == [20] * 10
    for position in (0, 7, 199):
        expected = whole.train[20 * position + 19]
        np.testing.assert_array_equal(split.validation[position]["image"], expected["image"])
    assert not contents(split.train) & contents(split.validation)
    assert contents(split.train) | contents(split.validation) == contents(whole.train)


def test_validation_split_can_be_named() -> None:
    dataset = load_embedded(validation_split="test")
    assert dataset.validation is not None
    assert (len(dataset.train), len(dataset.validation)) == (4000, 1000)


@pytest.mark.parametrize("value", ["1/0", "1/1", "1/4001", "1/", "2/20", "1/x", "train/20"])
def test_malformed_validation_split_raises(value: str) -> None:
    with pytest.raises(
        ValueError, match=rf'data.validation_split={value}: must be "1/N" with N from 2 to 4000 .*; use'
    ):
        load_embedded(validation_split=value)


def test_subsample_is_evenly_spaced() -> None:
    source = load_embedded().train
    assert labels(datasets.subsample(source, 10)) == list(range(10))
    assert labels(datasets.subsample(source, 5000)) == labels(source)


@pytest.fixture(scope="module")
def prepared(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare `photos`, 32 pixels wide; return the folder of datasets."""
    folder = tmp_path_factory.mktemp("data")
    prepare.prepare(sources.folder(photos), 32, str(folder))
    return folder


def photos_config(folder: Path, **changes: Any) -> ConfigDict:
    values = {"name": "photos", "data_dir": str(folder), "image_size": 32, "eval_split": "validation", **changes}
    return run_config("cifar10", **{f"data.{key}": value for key, value in values.items()}).data


def copy(prepared: Path, folder: Path) -> tuple[Path, Path]:
    """Copy the datasets; return their folder and the file of the training images."""
    shutil.copytree(prepared, folder, copy_function=shutil.copy2)
    (train_file,) = (folder / "photos" / "32px" / "1.0.0").glob("*train*")
    return folder, train_file


def test_prepared_folder_is_opened_by_name(prepared: Path) -> None:
    dataset = datasets.load(photos_config(prepared))
    assert (len(dataset.train), len(dataset.evaluation), dataset.channels) == (40, 10, 3)
    assert list(dataset.class_names) == ["cat", "dog"]
    assert np.bincount(labels(dataset.train)).tolist() == [20, 20]
    assert loader.read(dataset.train, np.arange(40), 32)["image"].shape == (40, 32, 32, 3)
    assert dataset.folder == prepared / "photos" / "32px" / "1.0.0"


def test_default_folder_is_that_of_tfds(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(datasets.load(photos_config(Path(), data_dir="")).train) == 40
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert datasets.root("") == Path.home() / "tensorflow_datasets"


def test_splits_can_be_sliced(prepared: Path) -> None:
    dataset = datasets.load(photos_config(prepared, train_split="train[:75%]", eval_split="train[75%:]"))
    assert (len(dataset.train), len(dataset.evaluation)) == (30, 10)
    assert not contents(dataset.train) & contents(dataset.evaluation)


def test_fingerprint_changes_with_images_and_classes(prepared: Path, tmp_path: Path) -> None:
    """It is that of a copy, whose times are others."""
    folder, train_file = copy(prepared, tmp_path / "copy")
    train_file.touch()
    original, copied = (datasets.load(photos_config(path)) for path in (prepared, folder))
    assert original.fingerprint == copied.fingerprint
    content = bytearray(train_file.read_bytes())
    content[-1] ^= 1
    train_file.write_bytes(content)
    changed = datasets.load(photos_config(folder)).fingerprint
    (labels_file,) = train_file.parent.glob("label.labels.txt")
    labels_file.write_text("cat\nfox\n")
    renamed = datasets.load(photos_config(folder)).fingerprint
    assert len({original.fingerprint, changed, renamed}) == 3


def test_missing_file_raises(prepared: Path, tmp_path: Path) -> None:
    folder, train_file = copy(prepared, tmp_path / "copy")
    train_file.unlink()
    with pytest.raises(
        ValueError, match=r"name=photos: must be complete, but .*train.array_record.* is missing; delete"
    ):
        datasets.load(photos_config(folder))


def test_damaged_image_is_named(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.load(photos_config(prepared))
    monkeypatch.setattr(dataset.train, "_files", [{"image": b"\xff\xd8 damaged", "label": 0}])
    with pytest.raises(ValueError, match=r"photos/32px/1.0.0, train: image 0 is damaged .*; prepare the dataset again"):
        loader.read(dataset.train, np.array([0]), 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "cifar10"},
            r"data.name=cifar10: must be prepared, but is not in .*nowhere.*; prepare it with\n"
            r"    alexnet-jax prepare cifar10 --data_dir=.*nowhere",
        ),
        (
            {"name": "cifar11"},
            r"data.name=cifar11: must be 'mnist5k' .*, a dataset prepared in .*nowhere or a name .* TFDS catalogue; "
            r"prepare a folder of images with\n    alexnet-jax prepare FOLDER",
        ),
        (
            {"name": "mnist5k", "train_split": "train[:9%]"},
            r"data.train_split=train\[:9%\]: must be a split of mnist5k; use one of train, test",
        ),
        ({"name": "mnist5k", "eval_split": "validation"}, r"eval_split=validation: must be a split of mnist5k"),
        (
            {"name": "mnist5k", "eval_split": "test", "validation_split": "val"},
            r"validation_split=val: must be a split of mnist5k",
        ),
    ],
)
def test_missing_dataset_or_split_raises_with_remedy(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.load(photos_config(tmp_path / "nowhere", **changes))


def test_size_that_is_not_prepared_raises_with_prepared_sizes(prepared: Path) -> None:
    message = r"data.image_size=64: must be a size at which photos is prepared \(32px\); .* --size=64"
    with pytest.raises(ValueError, match=message):
        datasets.load(photos_config(prepared, image_size=64, crop=64))


def test_incomplete_preparation_raises(tmp_path: Path) -> None:
    (tmp_path / "photos" / "32px" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"data.name=photos: must be prepared completely, .*32px is incomplete; prepare"
    ):
        datasets.load(photos_config(tmp_path))


def test_folder_of_datasets_must_be_given_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(
        ValueError, match=r"data.data_dir=~/tensorflow_datasets: must be a folder, and there is no home"
    ):
        datasets.root("")


@pytest.mark.parametrize("split", ["train[:200%]", "train[5:5]", f"train[:{'9' * 5000}]"])
def test_impossible_slice_names_its_field(prepared: Path, split: str) -> None:
    with pytest.raises(ValueError, match=r"^data.train_split=train\[.*: must be a split or a slice of one"):
        datasets.load(photos_config(prepared, train_split=split))
