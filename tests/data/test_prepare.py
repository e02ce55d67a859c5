"""Tests of the preparation of datasets: from folders, archives and the TFDS catalogue, completely or not at all."""

import argparse
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from alexnet_jax.data import datasets, image_io, loader, prepare, sources
from support import run_config, run_script

Command = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return the command as a function, which returns its output or the message of its error."""

    def run_command(*arguments: object) -> str:
        parser = argparse.ArgumentParser()
        prepare.add_arguments(parser)
        try:
            prepare.main(parser.parse_args([str(argument) for argument in arguments]))
        except (ValueError, OSError) as error:
            return str(error)
        return capsys.readouterr().out

    return run_command


def load(name: str, folder: Path, size: int, eval_split: str) -> datasets.Dataset:
    changes: dict[str, Any] = {
        "data.name": name,
        "data.data_dir": str(folder),
        "data.image_size": size,
        "data.crop": 23,
        "data.eval_split": eval_split,
    }
    return datasets.load(run_config("cifar10", **changes).data)


def examples(source: datasets.Source, size: int) -> list[tuple[bytes, int]]:
    batch = loader.read(source, np.arange(len(source)), size)
    return [(image.tobytes(), int(label)) for image, label in zip(batch["image"], batch["label"], strict=True)]


def link_photos(photos: Path, target: Path) -> Path:
    """Make a folder of links, to which a test may add bad files."""
    for file in photos.rglob("*.jpg"):
        link = target / file.relative_to(photos)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return target


def test_folder_is_stored_resized_and_cropped(photos: Path, tmp_path: Path, run: Command) -> None:
    output = run(photos, f"--data_dir={tmp_path}", "--size=48")
    assert "train 40, validation 10 images of 2 classes" in output
    assert f"--config.data.name=photos --config.data.eval_split=validation --config.data.data_dir={tmp_path}" in output
    dataset = load("photos", tmp_path, 48, "validation")
    for source, split in ((dataset.train, "train"), (dataset.evaluation, "val")):
        expected = [
            (image_io.decode(image_io.encode_jpeg(file.read_bytes(), 48), 3).tobytes(), label)
            for label, name in enumerate(("cat", "dog"))
            for file in (photos / split / name).iterdir()
        ]
        assert sorted(examples(source, 48)) == sorted(expected)


def test_stored_order_does_not_depend_on_folder(photos: Path, tmp_path: Path, run: Command) -> None:
    stored = []
    for place in ("here", "there"):
        run(link_photos(photos, tmp_path / place / "pets"), f"--data_dir={tmp_path / place}", "--size=16")
        folder = tmp_path / place / "pets" / "16px" / "1.0.0"
        stored.append((folder / "pets-train.array_record-00000-of-00001").read_bytes())
    assert stored[0] == stored[1]


def test_existing_dataset_is_left_unchanged(photos: Path, tmp_path: Path, run: Command) -> None:
    first = run(photos, f"--data_dir={tmp_path}", "--size=16")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(photos, f"--data_dir={tmp_path}", "--size=16") == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_size_below_1_raises(photos: Path, tmp_path: Path, run: Command) -> None:
    assert "--size=0: must be at least 1" in run(photos, f"--data_dir={tmp_path}", "--size=0")


def test_all_bad_images_are_named_and_nothing_is_made(photos: Path, tmp_path: Path, run: Command) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    bad = [folder / "train" / "cat" / "cut.jpg", folder / "val" / "dog" / "notes.txt", folder / "train/dog/gone.jpg"]
    bad[0].write_bytes(next((photos / "train" / "cat").iterdir()).read_bytes()[:-300])
    bad[1].write_text("no image")
    bad[2].symlink_to(tmp_path / "nowhere")
    (folder / "train" / "cat" / ".DS_Store").write_text("hidden files are no images")
    message = run(folder, f"--data_dir={tmp_path}", "--size=16")
    assert message.startswith("pets: every file must be an image, but 3 cannot be read; repair or remove them, or give")
    assert all(f"\n{path}: " in message for path in bad)
    assert message.endswith("\nNothing was made")
    assert not list((tmp_path / "pets" / "16px").iterdir())

    output = run(folder, f"--data_dir={tmp_path}", "--size=16", "--skip_bad")
    assert "train 40, validation 10 images of 2 classes; 3 images cannot be read and are left out" in output
    info = tfds.builder_from_directory(tmp_path / "pets" / "16px" / "1.0.0").info
    assert info.metadata == {"bad_images": 3}


def test_class_without_readable_images_raises(photos: Path, tmp_path: Path, run: Command) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    for file in (folder / "val" / "dog").iterdir():
        file.unlink()
    (folder / "val" / "dog" / "bad.jpg").write_text("no image")
    message = run(folder, f"--data_dir={tmp_path}", "--size=16", "--skip_bad")
    assert "every class must have a readable image in every split, but validation has none of dog; add" in message


def add_empty_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "eel").mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "val").rename(folder / "held_out"),
            "pets: must have train/CLASS/IMAGE and .*, but has held_out, train; move",
        ),
        (lambda folder: (folder / "train").rename(folder / "val" / "x"), "pets: must have .*, but has val; move"),
        (lambda folder: (folder / "train" / "eel").symlink_to(folder / "train" / "cat"), "'eel' has none in .*/val "),
        (lambda folder: (folder / "val" / "eel").mkdir(), "'eel' has none in .*/train "),
        (add_empty_class, "train/eel: must not be empty; add images, or delete"),
        (
            lambda folder: (folder / "train" / "a.jpg").touch(),
            "train/a.jpg: must be a readable folder .*; move or delete",
        ),
        (
            lambda folder: (folder / "valid").symlink_to(folder / "val"),
            "must have one folder for validation, .* valid, ",
        ),
    ],
)
def test_folder_with_wrong_layout_raises(
    photos: Path, tmp_path: Path, run: Command, change: Callable[[Path], object], message: str
) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    change(folder)
    output = run(folder, f"--data_dir={tmp_path / 'out'}")
    assert re.search(message, output), output
    assert output.endswith("\nNothing was made")
    assert not (tmp_path / "out").exists()


def test_unreadable_folder_is_named(
    photos: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterdir = Path.iterdir

    def refuse(self: Path) -> Iterator[Path]:
        if self.name == "dog":
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    output = run(photos, f"--data_dir={tmp_path / 'out'}")
    assert "train/dog: must be a readable folder (Permission denied); move or delete it" in output


# A file size limit of 30 kB acts like a full disk.
FULL_DISK = """
import os, resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.argv[1:] = ["prepare", os.environ["PHOTOS"], "--size=64", "--data_dir=" + os.environ["DATA"]]
runpy.run_module("alexnet_jax", run_name="__main__")
"""


@pytest.mark.slow
def test_full_disk_leaves_nothing_behind(photos: Path, tmp_path: Path, run: Command) -> None:
    process = run_script(FULL_DISK, PHOTOS=str(photos), DATA=str(tmp_path))
    assert process.returncode == 1
    remedy = f"If the disk is full, free some space in {tmp_path}, or give another --data_dir\nNothing was made"
    assert remedy in process.stderr
    assert process.stderr.startswith("alexnet-jax prepare: ")
    assert "Traceback" not in process.stderr
    assert not list((tmp_path / "photos" / "64px").iterdir())
    assert "train 40" in run(photos, f"--data_dir={tmp_path}", "--size=64")


def test_killed_preparation_is_cleared_away(photos: Path, tmp_path: Path, run: Command) -> None:
    incomplete = tmp_path / "photos" / "16px" / "incomplete.ABCDEF_1.0.0"
    incomplete.mkdir(parents=True)
    (incomplete / "photos-train.array_record-00000-of-00001").write_text("half")
    assert "train 40" in run(photos, f"--data_dir={tmp_path}", "--size=16")
    assert [path.name for path in incomplete.parent.iterdir()] == ["1.0.0"]


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_archive_is_stored_losslessly(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command
) -> None:
    counts = {"train": 20, "test": 6}
    monkeypatch.setattr(sources, "CIFAR_COUNTS", counts)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (26, 32, 32, 3)).astype(np.uint8)
    labels = np.concatenate([np.resize(np.arange(3), 20), np.resize(np.arange(3), 6)]).astype(np.uint8)
    names = ["ape", "bee", "cow"]
    coarse_label = b"\x07" if classes == 100 else b""
    rows = [
        coarse_label + bytes([label]) + image.transpose(2, 0, 1).tobytes()
        for image, label in zip(images, labels, strict=True)
    ]
    if classes == 10:
        inner_folder, names_file = "cifar-10-batches-bin", "batches.meta.txt"
        members = {f"data_batch_{i + 1}.bin": rows[4 * i : 4 * i + 4] for i in range(5)} | {"test_batch.bin": rows[20:]}
    else:
        inner_folder, names_file = "cifar-100-binary", "fine_label_names.txt"
        members = {"train.bin": rows[:20], "test.bin": rows[20:]}
    with tarfile.open(tmp_path / f"cifar-{classes}-binary.tar.gz", "w:gz") as tar:
        add_member(tar, f"{inner_folder}/{names_file}", "\n".join(names).encode())
        for name, content in members.items():
            add_member(tar, f"{inner_folder}/{name}", b"".join(content))
    output = run(f"cifar{classes}", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'sets'}")
    assert "train 20, test 6 images of 3 classes" in output
    dataset = load(f"cifar{classes}", tmp_path / "sets", 32, "test")
    expected = [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    assert sorted(examples(dataset.train, 32)) == sorted(expected[:20])
    assert sorted(examples(dataset.evaluation, 32)) == sorted(expected[20:])
    assert list(dataset.class_names) == names

    monkeypatch.setattr(sources, "CIFAR_COUNTS", counts | {"test": 7})
    message = run(f"cifar{classes}", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'more'}")
    assert "must have 7 images for test, but has 6; download it again" in message


def make_jpeg(colour: tuple[int, int, int], mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (50, 40), colour).convert(mode).save(content, "JPEG")
    return content.getvalue()


def test_imagenet_lists_of_tfds_are_complete() -> None:
    lists = tfds.core.tfds_path("datasets/imagenet2012")
    classes, held_out = ((lists / name).read_text().split() for name in ("labels.txt", "validation_labels.txt"))
    assert len(set(classes)) == 1000
    assert len(held_out) == 50_000
    assert set(held_out) == set(classes)


def test_imagenet_is_read_from_its_two_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command) -> None:
    """Train: an archive per class; val: labels in the order of the names, whatever the archive's order."""
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    message = run("imagenet2012", f"--data_dir={tmp_path}")
    assert f"{manual / 'ILSVRC2012_img_train.tar'}: must be the archive ILSVRC2012_img_train.tar; download" in message
    assert "after registration, from image-net.org" in message

    (tmp_path / "labels.txt").write_text("n01\nn02\nn03\n")
    (tmp_path / "validation_labels.txt").write_text("n03\nn01\nn02\n")
    monkeypatch.setattr(tfds.core, "tfds_path", lambda path: tmp_path)
    monkeypatch.setattr(sources, "IMAGENET_COUNTS", {"train": 3, "validation": 3})
    with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as outer:
        for label in (1, 2, 0):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                mode = "CMYK" if label == 1 else "RGB"
                add_member(tar, f"n0{label + 1}_5.JPEG", make_jpeg((label * 100, 0, 99), mode))
            add_member(outer, f"n0{label + 1}.tar", inner.getvalue())
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (2, 0, 1):
            add_member(tar, f"ILSVRC2012_val_{number + 1:08d}.JPEG", make_jpeg((number * 100, 99, 0)))
    output = run("imagenet2012", f"--data_dir={tmp_path}", "--size=32")
    assert "train 3, validation 3 images of 3 classes" in output
    dataset = load("imagenet2012", tmp_path, 32, "validation")

    def red_by_label(source: datasets.Source) -> dict[int, int]:
        batch = loader.read(source, np.arange(len(source)), 32)
        return {int(label): round(image[16, 16, 0] / 100) for image, label in zip(*batch.values(), strict=True)}

    assert red_by_label(dataset.train) == {0: 0, 1: 1, 2: 2}
    assert red_by_label(dataset.evaluation) == {2: 0, 0: 1, 1: 2}

    content = (manual / "ILSVRC2012_img_val.tar").read_bytes()
    (manual / "ILSVRC2012_img_val.tar").write_bytes(content[:700])
    message = run("imagenet2012", f"--data_dir={tmp_path}", "--size=16")
    assert re.search(r"ILSVRC2012_img_val.tar: must be complete, but is damaged \(.*\); download it again", message)


def test_missing_tensorflow_raises_with_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    message = run("fashion_mnist", f"--data_dir={tmp_path}")
    assert "fashion_mnist: TFDS must have TensorFlow to prepare it" in message
    assert "pip install tensorflow-cpu" in message
    assert "data.name=fashion_mnits: must be" in run("fashion_mnits", f"--data_dir={tmp_path}")


class Stock(tfds.core.GeneratorBasedBuilder):
    """A dataset of the TFDS catalogue like imagenette: JPEGs, by default of any size."""

    name = "stock"
    VERSION = tfds.core.Version("1.0.0")
    files: Path
    shape: tuple[int | None, ...] = (None, None, 3)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=self.shape, encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(self.files / split) for split in ("train", "val")}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in folder.rglob("*.jpg"):
            yield str(file), {"image": file, "label": int(file.parent.name == "dog")}


def test_photos_of_tfds_are_stored_again_resized(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command
) -> None:
    monkeypatch.setattr(Stock, "files", photos, raising=False)
    assert "stock: TFDS must have TensorFlow to prepare it" in run("stock", f"--data_dir={tmp_path}")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: True)
    output = run("stock", f"--data_dir={tmp_path}", "--size=48")
    assert "train 40, val 10 images of 2 classes" in output
    resized, original = (load(name, tmp_path, 48, "val") for name in ("stock", "stock:1.0.0"))
    assert resized.folder == tmp_path / "stock" / "48px" / "1.0.0"
    stored = [[source[i] for i in range(40)] for source in (resized.train, original.train)]
    labels = [sorted(int(example["label"]) for example in of_source) for of_source in stored]
    assert labels[0] == labels[1]
    shapes = [{image_io.decode(example["image"], 3).shape for example in of_source} for of_source in stored]
    assert shapes[0] == {(48, 48, 3)}
    assert not shapes[0] & shapes[1]


def test_tfds_images_of_one_size_stay_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command) -> None:
    monkeypatch.setattr(Stock, "files", tmp_path / "files", raising=False)
    monkeypatch.setattr(Stock, "shape", (50, 40, 3))
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: True)
    for split in ("train", "val"):
        (tmp_path / "files" / split / "dog").mkdir(parents=True)
        (tmp_path / "files" / split / "dog" / "1.jpg").write_bytes(make_jpeg((9, 9, 9)))
    assert "stock: prepared by TFDS; its images are of one size" in run("stock", f"--data_dir={tmp_path}")
    assert load("stock", tmp_path, 48, "val").train[0]["image"] == make_jpeg((9, 9, 9))
